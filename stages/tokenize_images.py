"""Encode every view of every image into webdataset shards of tokens."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpar_core.choices import EncodePrecision
from dpar_core.data.images import VIEW_COUNTS, BadImage, views
from dpar_core.data.manifest import SPLITS, Manifest, Row, Rows, read_manifest
from dpar_core.data.shards import ShardContents, TokenMeta, TokenSample, write_index, write_shard
from dpar_core.data.sources import block_of
from dpar_core.data.splits import counted, first_few
from dpar_core.files import atomic_folder, write_json
from dpar_core.models.load import read_trained
from dpar_core.models.vq import VQ, encode_at, most_images, to_float
from stages import params as P
from stages.data import ManifestOpener
from stages.terminal import print_fitted
from stages.tracker import Tracker
from stages.workers.tasks import facts_of_unit, finish_unit, finished_unit, move_into_place, remove_leftovers, run_units

BAD_IMAGES, BOTH_SPLITS = "bad_images.json", "images_in_both_splits.json"
MOST_MOVED = 0.05  # share of tokens that a lower precision may change
_MEASURED_SHARDS = 8  # shards, evenly spaced; the share is measured on a batch of each
_AHEAD = 3  # batches that are decoded before the network asks for them
_MOST_STREAMS = 4  # batches a CPU encodes at once: each holds its activations, some 1.5 GB for 8 views of 256 pixels
_MIXING = 7  # seed of the order of images in shards: fixed, as it decides nothing but the layout of files


@dataclass(frozen=True)
class Params:
    data: P.Data
    tokenize_images: P.TokenizeImages


@dataclass(frozen=True)
class Inputs:
    manifest: Path
    tokenizer: Path


@dataclass(frozen=True)
class Outputs:
    tokens: Path
    metrics: Path


@dataclass(frozen=True)
class Shard:
    """A unit of work: the manifest rows that make a shard. indices: (n,) int64."""

    name: str
    split: str
    indices: np.ndarray


@dataclass(frozen=True)
class Bad:
    """An image that could not be used, and why."""

    key: str
    source: str
    reason: str


class Finished(NamedTuple):
    """What a finished shard holds, which images it lacks, and the names of its images' pixels (`pixel_name`), in order."""

    contents: ShardContents
    bad: list[Bad]
    pixels: list[str]


class Ready(NamedTuple):
    """An image that is ready to be encoded.

    views: (n, S, S, 3) uint8.
    pixels: see `pixel_name`.
    """

    row: Row
    views: np.ndarray
    pixels: str


def pixel_name(images: np.ndarray) -> str:
    """Return 16 hex digits that name the pixels of an image's first view (images: its views, (n, S, S, 3) uint8)."""
    return hashlib.sha256(np.ascontiguousarray(images[0])).hexdigest()[:16]


def identity(params: Params) -> dict[str, Any]:
    """Return what of the params decides the tokens: who computes them does not."""
    settings = params.tokenize_images.model_dump(mode="json", exclude={"workers"})
    data = params.data.model_dump(mode="json", include={"image_size", "views"})
    return {"data": data, "tokenize_images": settings}


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write the shards, one at a time; those that an interrupted run finished are kept."""
    remove_leftovers(work, outputs.tokens, outputs.metrics)
    manifest = read_manifest(inputs.manifest)
    settings, share = params.tokenize_images, params.data.max_bad_share
    if settings.precision == "tf32" and device != "cuda":
        raise ValueError(f"tokenize_images.precision tf32 needs an NVIDIA GPU, and this run is on {device}: set it to fp32")
    tracker.log_input("manifest", inputs.manifest, manifest.digest)
    build = functools.partial(ShardTokenizer, inputs, params, work.absolute(), device, Path.cwd())
    plan = plan_shards(manifest, settings.shard_images)
    done = [shard for shard in plan if is_done(shard, manifest, work, params.data)]
    names = {shard.name for shard in done}
    counts: dict[str, float] = {}
    if settings.precision != "fp32":
        counts[f"tokens/{settings.precision}_moved_share"] = build(1).moved_share(plan)
    total = {split: sum(len(shard.indices) for shard in plan if shard.split == split) for split in SPLITS}
    bad = {
        split: [one for shard in done if shard.split == split for one in read_contents(shard, work).bad] for split in SPLITS
    }
    _check_shares(bad, total, share)
    ready = sum(len(shard.indices) for shard in done)
    with tracker.progress(len(manifest.rows), "tokenize_images", done=ready, unit="images") as progress:
        todo = [shard for shard in plan if shard.name not in names]
        for shard, _ in run_units(todo, build, workers=settings.workers, device=device, section="tokenize_images"):
            progress.advance(len(shard.indices))
            bad[shard.split] += read_contents(shard, work).bad
            _check_shares(bad, total, share)
    for split, ones in bad.items():
        if ones:
            print_fitted(
                f"warning: left out: {counted(len(ones), f'{split} image')} (first: {ones[0].source}: {ones[0].reason}); "
                f"see {outputs.tokens / BAD_IMAGES}"
            )
    _refuse_lost_classes(plan, manifest, work, params.data)
    counts |= publish(plan, token_meta(manifest, inputs.tokenizer, params), work, outputs.tokens)
    write_json(outputs.metrics, counts)
    tracker.log_metrics(counts)
    tracker.log_artifact(outputs.tokens / BAD_IMAGES)


def load_tokenizer(path: Path, device: str) -> tuple[VQ, str]:
    """Return the tokenizer of a weights file, ready to use, and the file's digest."""
    trained = read_trained(path, "tokenizer")
    return trained.build(device), trained.digest


def token_meta(manifest: Manifest, tokenizer: Path, params: Params) -> TokenMeta:
    """Return what the tokens will be."""
    trained = read_trained(tokenizer, "tokenizer")
    config, size, name = trained.config, params.data.image_size, params.data.views
    grid = size // config.downsample
    return TokenMeta(
        grid,
        config.codebook_size,
        name,
        VIEW_COUNTS[name],
        size,
        manifest.classes,
        trained.digest,
        manifest.digest,
        params.tokenize_images.precision,
    )


def plan_shards(manifest: Manifest, shard_images: int) -> list[Shard]:
    """Spread the images of each split over shards, in a fixed order that mixes the classes.

    Images that are read together (rows of one row group of a Parquet file) stay together.
    """
    shards = []
    for split in SPLITS:
        chosen = np.array([row for row, name in enumerate(manifest.rows.table["split"].to_pylist()) if name == split])
        if not len(chosen):
            raise ValueError(f"the manifest has no {split} images: check data.{split} in params.yaml")
        sources = manifest.rows.take(chosen).table["source"].to_pylist()
        blocks = [block_of(source) for source in sources] if block_of(sources[0]) else range(len(sources))
        firsts = np.flatnonzero([at == 0 or block != blocks[at - 1] for at, block in enumerate(blocks)])
        order = np.argsort(np.random.Philox(key=np.uint64(_MIXING)).random_raw(len(firsts)), kind="stable")
        parts = np.split(chosen, firsts[1:])
        mixed = np.concatenate([parts[number] for number in order])
        for number, first in enumerate(range(0, len(mixed), shard_images)):
            shards.append(Shard(f"{split}-{number:06d}.tar", split, mixed[first : first + shard_images]))
    return shards


def read_contents(shard: Shard, work: Path) -> Finished:
    """Return what is known of a finished shard. Raises Damaged, FileNotFoundError."""
    return _finished(facts_of_unit(work, shard.name))


def _finished(facts: dict[str, Any]) -> Finished:
    return Finished(ShardContents(**facts["contents"]), [Bad(**bad) for bad in facts["bad"]], facts["pixels"])


def is_done(shard: Shard, manifest: Manifest, work: Path, data: P.Data) -> bool:
    """Return whether a shard is finished and whole. One whose bad images can be used by now is made again."""
    found = finished_unit(work, shard.name)
    if found is None:
        return False
    opener = ManifestOpener(manifest)
    for bad in _finished(found).bad:
        try:
            row = manifest.find(bad.key)
            assert row is not None, "a shard holds rows of its manifest"
            views(opener(row), data.image_size, data.views)
        except BadImage:
            continue
        return False
    return True


class ShardTokenizer:
    """Makes shards: images are decoded in threads while the network works on the batches before.

    On CPUs several batches are encoded at once, each by few threads: convolutions as small as a tokenizer's use many
    threads badly. A GPU takes one batch after the other.
    """

    def __init__(self, inputs: Inputs, params: Params, work: Path, device: str, base: Path, threads: int) -> None:
        """base: the folder that relative paths start from, as an actor may run in another one."""
        manifest = read_manifest(base / inputs.manifest)
        self.rows, self.opener = manifest.rows, ManifestOpener(manifest, base=base)
        self.model, _ = load_tokenizer(base / inputs.tokenizer, device)
        self.settings, self.device, self.work = params.tokenize_images, device, work
        assert params.tokenize_images.precision != "auto", "the runner settles precisions"
        self.precision: EncodePrecision = params.tokenize_images.precision
        self.size, self.views = params.data.image_size, params.data.views
        if self.size % self.model.config.downsample:
            raise ValueError(
                f"data.image_size {self.size} is not a multiple of {self.model.config.downsample}, the downsampling of "
                f"{inputs.tokenizer}"
            )
        self.per_batch = max(self.settings.batch_size // VIEW_COUNTS[self.views], 1)  # images
        most, views = most_images(self.model.config, self.size), self.per_batch * VIEW_COUNTS[self.views]
        if device != "cpu" and views > most:
            raise ValueError(
                f"tokenize_images.batch_size {self.settings.batch_size} makes tensors of 2^31 elements or more from views "
                f"of {self.size} pixels: set it to {most} or less"
            )
        self.pool = ThreadPoolExecutor(max(threads, 2), thread_name_prefix="decode")
        self.streams = max(min(threads, _MOST_STREAMS), 1) if device == "cpu" else 1
        each = max(threads // self.streams, 1)
        self.encoders = ThreadPoolExecutor(
            self.streams, thread_name_prefix="encode", initializer=torch.set_num_threads, initargs=(each,)
        )

    def __call__(self, shard: Shard) -> None:
        """Make one shard in the work folder."""
        bad: list[Bad] = []
        pixels: list[str] = []
        contents = write_shard(self.work / shard.name, self._samples(self.rows.take(shard.indices), bad, pixels))
        listed = [asdict(one) for one in bad]
        finish_unit(self.work, shard.name, [shard.name], contents=asdict(contents), bad=listed, pixels=pixels)

    def encode(self, images: np.ndarray, *, precision: EncodePrecision | None = None) -> Tensor:
        """Return the tokens of at most a batch of views: (n, S, S, 3) uint8 -> (n, T) int64, on the device.

        The network always sees a full batch (the rest is black), so that no kernel works on another shape and the tokens
        of a view do not depend on how many neighbours it has.
        """
        full = self.per_batch * VIEW_COUNTS[self.views]
        stack = torch.zeros(full, *images.shape[1:], dtype=torch.uint8, pin_memory=self.device == "cuda")
        stack[: len(images)] = torch.from_numpy(images)
        pixels = to_float(stack.to(self.device, non_blocking=True))
        return encode_at(self.model, pixels, precision or self.precision).flatten(1)[: len(images)]

    def moved_share(self, plan: Sequence[Shard]) -> float:
        """Return the share of tokens that differ from fp32, on a batch from each of some shards, evenly spaced.

        Raises ValueError when it is too large.
        """
        count = min(_MEASURED_SHARDS, len(plan))
        moved = seen = 0
        for shard in (plan[number * len(plan) // count] for number in range(count)):
            # Twice a batch is looked at, so that bad images leave enough; if all are bad, their share stops the stage later.
            for batch in itertools.islice(self._batches(self.rows.take(shard.indices[: 2 * self.per_batch]), []), 1):
                images = np.concatenate([one.views for one in batch])
                moved += int((self.encode(images) != self.encode(images, precision="fp32")).sum())
                seen += len(images)
        share = moved / max(seen * (self.size // self.model.config.downsample) ** 2, 1)
        if share > MOST_MOVED:
            raise ValueError(
                f"tokenize_images.precision {self.settings.precision} changes {share:.1%} of the tokens of {seen} views "
                f"from {count} shards, more than {MOST_MOVED:.0%}: set it to fp32"
            )
        return share

    def _samples(self, rows: Rows, bad: list[Bad], pixels: list[str]) -> Iterator[TokenSample]:
        """Yield the samples of readable rows in order, and note their pixels; put the others into `bad`."""
        waiting: deque[tuple[list[Ready], Future[Tensor]]] = deque()
        for batch in self._batches(rows, bad):
            pixels += [one.pixels for one in batch]
            waiting.append((batch, self.encoders.submit(self._encode_batch, batch)))
            # A batch's tokens are fetched when every stream has its next one.
            if len(waiting) > 2 * self.streams:
                yield from self._samples_of(*waiting.popleft())
        while waiting:
            yield from self._samples_of(*waiting.popleft())

    def _encode_batch(self, batch: Sequence[Ready]) -> Tensor:
        return self.encode(np.concatenate([one.views for one in batch]))

    def _samples_of(self, batch: Sequence[Ready], coming: Future[Tensor]) -> Iterator[TokenSample]:
        tokens = coming.result()
        codes = tokens.cpu().numpy().astype(np.uint16).reshape(len(batch), -1, tokens.shape[1])
        for (row, _, _), of_image in zip(batch, codes):
            info = {"source": row.source, "box": list(row.box) if row.box else None, "class": row.class_name}
            yield TokenSample(row.key, row.label, of_image, info)

    def _batches(self, rows: Rows, bad: list[Bad]) -> Iterator[list[Ready]]:
        """Yield the readable images' views, `per_batch` images at a time; only the last batch may be shorter."""
        queue: deque[tuple[Row, Future[tuple[np.ndarray, str]]]] = deque()
        batch: list[Ready] = []
        coming = iter(rows)
        while True:
            while len(queue) < _AHEAD * self.per_batch and (row := next(coming, None)) is not None:
                queue.append((row, self.pool.submit(self._views, row)))
            if not queue:
                break
            row, future = queue.popleft()
            try:
                batch.append(Ready(row, *future.result()))
            except BadImage as error:
                bad.append(Bad(row.key, row.source, str(error)))
            if len(batch) == self.per_batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _views(self, row: Row) -> tuple[np.ndarray, str]:
        images = views(self.opener(row), self.size, self.views)
        return images, pixel_name(images)


def _check_shares(bad: Mapping[str, Sequence[Bad]], total: Mapping[str, int], allowed: float) -> None:
    """Refuse too many bad images of a split: a small one may lack most of its images where few are bad in all."""
    for split, ones in bad.items():
        if len(ones) > allowed * total[split]:
            shown = "; ".join(f"{one.source}: {one.reason}" for one in ones[:3])
            raise ValueError(
                f"{len(ones)} of {total[split]} {split} images cannot be read, more than data.max_bad_share {allowed:g} "
                f"allows (first: {shown}): mend or remove them, or raise data.max_bad_share"
            )


def _refuse_lost_classes(plan: Sequence[Shard], manifest: Manifest, work: Path, data: P.Data) -> None:
    """Refuse a class whose training images are all bad, unless classes without images are kept."""
    count = len(manifest.classes)
    found = (read_contents(shard, work).contents.labels for shard in plan if shard.split == "train")
    there = sum((np.bincount(np.array(labels, np.int64), minlength=count) for labels in found), np.zeros(count, np.int64))
    lost = [name for name, listed, read in zip(manifest.classes, manifest.counts("train"), there) if listed and not read]
    if lost and data.empty_classes != "keep":
        raise ValueError(
            f"none of the training images of {len(lost)} of {count} classes can be read ({first_few(lost)}): mend or remove "
            "them, or set data.empty_classes to keep"
        )


def images_in_both_splits(plan: Sequence[Shard], work: Path) -> list[dict[str, str]]:
    """Return the keys of validation images whose pixels are those of a training image, each with that one's key."""

    def images(split: str) -> Iterator[tuple[str, str]]:
        for shard in plan:
            if shard.split == split:
                found = read_contents(shard, work)
                yield from zip(found.contents.keys, found.pixels)

    validation = dict(images("validation"))
    training: dict[str, str] = {}
    wanted = set(validation.values())
    for key, pixels in images("train"):
        if pixels in wanted:
            training.setdefault(pixels, key)
    return [{"validation": key, "train": training[name]} for key, name in validation.items() if name in training]


def publish(plan: Sequence[Shard], meta: TokenMeta, work: Path, tokens: Path) -> dict[str, float]:
    """Put finished shards, the index and the list of bad images in place, all at once; return counts and sizes.

    Bytes per image: on disk with everything, of bare uint16 tokens, and the least that holds the codes.
    """
    found = [read_contents(shard, work) for shard in plan]
    contents, bad = [one.contents for one in found], [asdict(bad) for one in found for bad in one.bad]
    both = images_in_both_splits(plan, work)
    if both:
        shown = first_few(f"{pair['validation']} = {pair['train']}" for pair in both)
        repeated, verb = counted(len(both), "validation image"), "has" if len(both) == 1 else "have"
        print_fitted(f"warning: {repeated} {verb} the pixels of training images, first view by first view: {shown}")
    for split in SPLITS:
        if not any(one.keys for shard, one in zip(plan, contents) if shard.split == split):
            raise ValueError(f"no {split} image can be read: check data.{split} in params.yaml")
    with atomic_folder(tokens) as folder:
        for shard in plan:
            move_into_place(work / shard.name, folder / shard.name)
        write_index(folder, meta, [(shard.name, shard.split) for shard in plan], contents=contents)
        write_json(folder / BAD_IMAGES, bad)
        write_json(folder / BOTH_SPLITS, both)
    images = sum(len(one.keys) for one in contents)
    return {
        "tokens/images": images,
        "tokens/shards": len(plan),
        "tokens/bad_images": len(bad),
        "tokens/images_in_both_splits": len(both),
        "tokens/bytes_per_image": sum(file.stat().st_size for file in tokens.iterdir()) / images,
        "tokens/uint16_bytes_per_image": 2 * meta.num_views * meta.tokens,
        "tokens/least_bytes_per_image": math.ceil(meta.num_views * meta.tokens * math.log2(meta.codebook_size) / 8),
    }
