"""Encode every view of every image into webdataset shards of tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpar_core.files import atomic_folder, load_weights, write_json
from dpar_core.images import VIEW_COUNTS, BadImage, views
from dpar_core.manifest import Manifest, Row, read_manifest
from dpar_core.shards import SUMMARY, Sample, TokenMeta, write_index, write_shard
from dpar_core.tokenizer import VQ, VQConfig, to_float
from stages import params as P
from stages.data import ImageOpener
from stages.tracker import Tracker

DECODERS = 4  # threads that decode images while the network works


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
class Bad:
    """An image that could not be used, and why."""

    key: str
    source: str
    reason: str


def load_tokenizer(path: Path, device: str) -> tuple[VQ, str]:
    """Return the tokenizer of a weights file, ready to use, and the file's digest."""
    weights = load_weights(path, kind="vq")
    model = VQ(VQConfig(**weights.config)).to(device).eval()
    model.load_state_dict(weights.state)
    return model.requires_grad_(False), weights.digest


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write the shards, one at a time; those that an interrupted run finished are kept."""
    manifest = read_manifest(inputs.manifest)
    model, digest = load_tokenizer(inputs.tokenizer, device)
    tracker.log_input("manifest", inputs.manifest, manifest.digest)
    settings, size = params.tokenize_images, params.data.image_size
    if settings.workers:
        raise ValueError("tokenize_images.workers above 0 is not built yet: set it to 0 (this process)")
    meta = TokenMeta(
        size // model.config.downsample, model.config.codebook_size, params.data.views, VIEW_COUNTS[params.data.views],
        size, manifest.classes, digest, manifest.digest,
    )  # fmt: skip
    plan = list(_plan(manifest, settings.shard_images))
    done = [name for name, _, _ in plan if (work / f"{name}.json").exists()]
    images = sum(len(rows) for name, _, rows in plan if name in done)
    opener = ImageOpener(manifest)
    bar = tracker.progress(len(manifest.rows), "tokenize_images", done=images, unit="images")
    with bar as progress, ThreadPoolExecutor(DECODERS) as pool:
        for name, _, rows in plan:
            if name in done:
                continue
            bad: list[Bad] = []
            samples = _encode(rows, opener, model, params, pool, bad, device=device)
            write_shard(work / name, (sample for sample in samples if progress.advance(1) is None))
            write_json(work / f"{name}.json", [vars(one) for one in bad])
    _check_share(work, plan, len(manifest.rows), params.data.max_bad_share)
    _publish(work, plan, meta, outputs)
    counts = {"tokens/images": _images(outputs.tokens), "tokens/shards": len(plan)}
    counts["tokens/bad_images"] = len(manifest.rows) - counts["tokens/images"]
    counts["tokens/bytes_per_image"] = sum(f.stat().st_size for f in outputs.tokens.iterdir()) / counts["tokens/images"]
    write_json(outputs.metrics, counts)
    tracker.log_metrics(counts)


def _plan(manifest: Manifest, shard_images: int) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield (shard name, split, its rows). Rows are spread over the shards in a fixed order that mixes the classes."""
    for split in ("train", "validation"):
        rows = manifest.split(split)
        mixed = [rows[i] for i in np.argsort(np.random.Philox(key=np.uint64(7)).random_raw(len(rows)), kind="stable")]
        for number, first in enumerate(range(0, len(rows), shard_images)):
            yield f"{split}-{number:06d}.tar", split, mixed[first : first + shard_images]


def _encode(
    rows: Sequence[Row],
    opener: ImageOpener,
    model: VQ,
    params: Params,
    pool: ThreadPoolExecutor,
    bad: list[Bad],
    *,
    device: str,
) -> Iterator[Sample]:
    """Yield the samples of readable rows in order; put the others into `bad`."""
    name, size = params.data.views, params.data.image_size
    bf16 = params.tokenize_images.precision == "bf16"
    per_batch = max(params.tokenize_images.batch_size // VIEW_COUNTS[name], 1)

    def look(row: Row) -> np.ndarray | BadImage:
        try:
            return views(opener(row), size, name)
        except BadImage as error:
            return error

    parts = [rows[first : first + per_batch] for first in range(0, len(rows), per_batch)]
    ahead = [pool.submit(look, row) for row in parts[0]] if parts else []
    for number, part in enumerate(parts):
        found = [future.result() for future in ahead]
        # The next batch is decoded while the network works on this one.
        ahead = [pool.submit(look, row) for row in parts[number + 1]] if number + 1 < len(parts) else []
        good = []
        for row, images in zip(part, found):
            if isinstance(images, BadImage):
                bad.append(Bad(row.key, row.source, str(images)))
            else:
                good.append((row, images))
        if not good:
            continue
        stack = torch.from_numpy(np.concatenate([images for _, images in good])).to(device)
        with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            codes = model.encode(to_float(stack)).flatten(1).cpu().numpy().astype(np.uint16)
        for (row, _), tokens in zip(good, codes.reshape(len(good), -1, codes.shape[1])):
            yield Sample(row.key, row.label, tokens, {"source": row.source, "box": list(row.box) if row.box else None})


def _bad_images(work: Path, plan: Sequence[tuple[str, str, list[Row]]]) -> list[dict]:
    return [bad for name, _, _ in plan for bad in json.loads((work / f"{name}.json").read_text())]


def _check_share(work: Path, plan: Sequence[tuple[str, str, list[Row]]], total: int, allowed: float) -> None:
    bad = _bad_images(work, plan)
    if len(bad) > allowed * total:
        shown = "; ".join(f"{one['source']}: {one['reason']}" for one in bad[:3])
        raise ValueError(
            f"{len(bad)} of {total} images cannot be read, more than data.max_bad_share {allowed:g} allows "
            f"(first: {shown}): mend or remove them, or raise data.max_bad_share"
        )


def _publish(work: Path, plan: Sequence[tuple[str, str, list[Row]]], meta: TokenMeta, outputs: Outputs) -> None:
    """Put finished shards, the index and the list of bad images in place, all at once."""
    with atomic_folder(outputs.tokens) as folder:
        for name, _, _ in plan:
            os.link(work / name, folder / name)
        write_index(folder, meta, [(name, split) for name, split, _ in plan])
        write_json(folder / "bad_images.json", _bad_images(work, plan))


def _images(folder: Path) -> int:
    return json.loads((folder / SUMMARY).read_text())["samples"]
