"""Stages sample_dpar and sample_llamagen: sample images by class plan, as the ADM evaluator reads them.

Image i has seed `sample.seed + i` and a class that follows from i (balanced) or from its seed (random). Batches are
units of work that appear whole or not at all, sampled here or by Ray workers; no image depends on how they are cut.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from dpar_core.data.splits import counted, first_few
from dpar_core.evaluation.sample_files import write_arrays, write_samples
from dpar_core.files import atomic_folder, atomic_path, digest_of, write_record
from dpar_core.models.memory import CACHE_SHARE, fitting_images
from dpar_core.patches.rule import lengths_from_starts, starts_from_lengths
from dpar_core.pictures import labelled_grid, save_png
from stages import params as P
from stages.artifacts import METRICS, SAMPLE_GRID, SAMPLE_IMAGES, SAMPLE_PROTOCOL, SAMPLE_TOKENS, TIMINGS, artifact_digest
from stages.shared.sampler import Files, Sampler, log_inputs
from stages.terminal import print_fitted
from stages.tracker import Progress, Tracker
from stages.workers.cluster import Node
from stages.workers.tasks import KeptLast, finish_unit, finished_unit, run_units

GRID_CLASSES, GRID_COLUMNS = 10, 8


@dataclass(frozen=True)
class Params:
    sample: P.Sample


@dataclass(frozen=True)
class DPARInputs:
    model: Path
    entropy_model: Path
    tokenizer: Path
    patch_rule: Path


@dataclass(frozen=True)
class DPAROutputs:
    samples: Path


@dataclass(frozen=True)
class LlamaGenInputs:
    model: Path
    equal_time: Path
    tokenizer: Path


@dataclass(frozen=True)
class LlamaGenOutputs:
    samples: Path
    equal_time: Path


def run_dpar(params: Params, inputs: DPARInputs, outputs: DPAROutputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Draw images from DPAR."""
    log_inputs(tracker, inputs, "model", "entropy_model", "tokenizer")
    files = Files(inputs.model, inputs.tokenizer, inputs.entropy_model, inputs.patch_rule)
    sample_images(params.sample, files, outputs.samples, tracker, device=device, work=work / "dpar", prefix="")


def run_llamagen(
    params: Params, inputs: LlamaGenInputs, outputs: LlamaGenOutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Sample images from the baseline as it was when it had trained for as many steps, and for as long, as DPAR."""
    log_inputs(tracker, inputs, "model", "equal_time", "tokenizer")
    for model, target, prefix in (
        (inputs.model, outputs.samples, ""),
        (inputs.equal_time, outputs.equal_time, "equal_time/"),
    ):
        files = Files(model, inputs.tokenizer)
        sample_images(params.sample, files, target, tracker, device=device, work=work / target.name, prefix=prefix)


def label_of(index: int, *, plan: str, seed: int, classes: Sequence[int]) -> int:
    """Return the class of image `index`: balanced plans go round the classes, random ones ask the image's own seed."""
    if plan == "balanced":
        return classes[index % len(classes)]
    return classes[int(np.random.Generator(np.random.Philox(key=[seed + index, 1])).integers(len(classes)))]


def too_few_for_classes(images: int, classes: int) -> str:
    """Return what to know of a balanced plan with fewer images than classes; an empty text for others."""
    if images >= classes:
        return ""
    return (
        f"{counted(images, 'image')} of a balanced plan {'is' if images == 1 else 'are'} of the first {images:,} of "
        f"{classes:,} classes alone, so distances to a reference of all classes are too large: sample more, or take plan "
        "random"
    )


@dataclass(frozen=True)
class SampleJob:
    """What a worker needs to sample any batch.

    content: digest of the files.
    work: where batches are put, on storage that all workers see.
    """

    files: Files
    content: str
    sample: str
    device: str
    work: str

    @property
    def section(self) -> P.Sample:
        return P.Sample.model_validate_json(self.sample)

    def batches(self) -> list[int]:
        """Numbers of all batches."""
        return list(range(-(-self.section.images // self.section.batch_size)))

    def path(self, batch: int) -> Path:
        return Path(self.work) / f"batch-{batch:06d}.npz"


_KEPT: KeptLast[Sampler] = KeptLast()


def sampler_of(job: SampleJob) -> Sampler:
    """Return the job's sampler; the files are read once per process, another job on them takes the networks over."""
    section = job.section
    key = (job.files, job.content, job.device, section.gate)
    sampler = _KEPT.get(key, lambda: Sampler(job.files, section, device=job.device))
    if sampler.sample != section:
        sampler = _KEPT.value = sampler.with_settings(section)
    return sampler


def sample_batch(job: SampleJob, batch: int, progress: Callable[[int], None] | None = None) -> int:
    """Sample one batch and put it into the work folder, whole or not at all; return its number of images."""
    sample, sampler = job.section, sampler_of(job)
    indices = range(batch * sample.batch_size, min((batch + 1) * sample.batch_size, sample.images))
    labels = [label_of(i, plan=sample.plan, seed=sample.seed, classes=sampler.trained_labels) for i in indices]
    started = time.perf_counter()
    sampled = sampler.generate(labels, [sample.seed + i for i in indices], progress=progress)
    between = time.perf_counter()
    images = sampler.pixels(sampled.tokens, resize=sample.resize)
    tokens = sampled.tokens.cpu().numpy().astype(np.uint16 if sampler.config.codebook_size <= 65536 else np.uint32)
    lengths = sampled.patch_lengths or [np.ones(tokens.shape[1], np.int64)] * len(tokens)
    starts = np.packbits(starts_from_lengths(lengths, tokens.shape[1]), axis=1)
    seconds = np.array([between - started, time.perf_counter() - between])
    with atomic_path(job.path(batch)) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, images=images, labels=np.array(labels), tokens=tokens, starts=starts, seconds=seconds)
    finish_unit(Path(job.work), job.path(batch).name, [job.path(batch).name])
    return len(labels)


SMALLER_BATCH = "set sample.batch_size to {} or less, the images stay the same"


def check_memory(sampler: Sampler, images: int, *, workers: int = 1, way_out: str = SMALLER_BATCH) -> None:
    """Refuse caches that cannot fit, before anything is sampled.

    images: sampled at a time by each of the workers that share this machine's memory.
    way_out: what to do about it; {} is replaced by the number that fits.
    Raises ValueError in a sentence.
    """
    wanted = sampler.generator.cache_bytes(images) * workers
    free = psutil.virtual_memory().available
    if sampler.device.type == "cuda":
        free = torch.cuda.mem_get_info(sampler.device)[0]
    if wanted > CACHE_SHARE * free:
        fitting = fitting_images(wanted, images, free)
        who = f", by each of {workers} workers on one machine," if workers > 1 else ""
        raise ValueError(
            f"sampling {images} images at a time{who} needs {wanted / 2**30:.1f} GiB of caches, of {free / 2**30:.1f} GiB "
            f"free: {way_out.format(fitting)}"
        )


def sample_images(
    sample: P.Sample, files: Files, target: Path, tracker: Tracker, *, device: str, work: Path, prefix: str
) -> None:
    """Draw images from files into the folder `target`, going on with the batches that are in `work`.

    prefix: before the names of metrics.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = Files(*(path and path.resolve() for path in vars(files).values()))
    content = digest_of([path and artifact_digest(path) for path in vars(files).values()])
    job = SampleJob(files, content, sample.model_dump_json(), device, str(work.resolve()))
    sampler = sampler_of(job)
    check_memory(sampler, min(sample.batch_size, sample.images))
    if sampler.untrained:
        names = [sampler.class_names[label] for label in sorted(sampler.untrained)]
        what = counted(len(names), "class", "classes")
        print_fitted(
            f"sample {target.name}: {what} had no training images and {'is' if len(names) == 1 else 'are'} left out "
            f"({first_few(names)})"
        )
    if sample.plan == "balanced" and (note := too_few_for_classes(sample.images, len(sampler.trained_labels))):
        print_fitted(f"sample {target.name}: {note}")
    left = [batch for batch in job.batches() if finished_unit(work, job.path(batch).name) is None]
    done = sample.images - sum(_size(sample, batch) for batch in left)
    with tracker.progress(sample.images, f"sample {target.name}", done=done, unit="images") as progress:
        advance = _whole_images(progress, sampler.config.tokens)

        def check(nodes: list[Node]) -> None:
            if not device.startswith("cuda"):  # on GPUs every worker has one of its own
                largest = max(_size(sample, batch) for batch in left)
                check_memory(sampler, largest, workers=-(-sample.workers // len(nodes)))

        build = (
            functools.partial(_batch_sampler, job)
            if sample.workers
            else lambda threads: _batch_sampler(job, threads, advance)
        )
        for _, count in run_units(left, build, workers=sample.workers, device=device, section="sample", check=check):
            if sample.workers:
                progress.advance(count)
    _publish(job, sampler, target, tracker, prefix=prefix)


def _size(sample: P.Sample, batch: int) -> int:
    return min(sample.batch_size, sample.images - batch * sample.batch_size)


def _whole_images(progress: Progress, tokens: int) -> Callable[[int], None]:
    """Turn counts of tokens into steps of whole images."""
    settled = 0

    def advance(count: int) -> None:
        nonlocal settled
        before, settled = settled // tokens, settled + count
        progress.advance(settled // tokens - before)

    return advance


def _batch_sampler(job: SampleJob, threads: int, advance: Callable[[int], None] | None = None) -> Callable[[int], int]:
    """Return the function that samples a batch of the job. advance: called with counts of tokens."""
    return lambda batch: sample_batch(job, batch, advance)


def batch_arrays(job: SampleJob, name: str) -> Iterator[np.ndarray]:
    """Yield one array of every batch sampled, in order: images, labels, tokens, starts (packed bits) or seconds."""
    for batch in job.batches():
        with np.load(job.path(batch), allow_pickle=False) as archive:
            yield archive[name]


def _publish(job: SampleJob, sampler: Sampler, target: Path, tracker: Tracker, *, prefix: str) -> None:
    sample, config = job.section, sampler.config
    labels = np.concatenate(list(batch_arrays(job, "labels")))
    starts = np.unpackbits(np.concatenate(list(batch_arrays(job, "starts"))), axis=1, count=config.tokens).astype(bool)
    seconds = np.sum(list(batch_arrays(job, "seconds")), axis=0)
    metrics = patch_metrics(sampler, starts)
    timings = {
        "seconds": float(seconds.sum()),
        "draw_seconds": float(seconds[0]),
        "decode_seconds": float(seconds[1]),
        "draw_images_per_s": len(labels) / float(seconds[0]),  # decoding to pixels left out
        "workers": sample.workers,
        "cpus": os.cpu_count() or 1,
    }
    with atomic_folder(target) as folder:
        write_samples(folder / SAMPLE_IMAGES, batch_arrays(job, "images"), labels)
        tokens = np.concatenate(list(batch_arrays(job, "tokens")))
        write_arrays(folder / SAMPLE_TOKENS, tokens=tokens, starts=np.packbits(starts, axis=1))
        save_png(grid_picture(job, sampler, labels), folder / SAMPLE_GRID)
        write_record(folder / SAMPLE_PROTOCOL, protocol(sampler, sample))
        write_record(folder / METRICS, metrics)
        write_record(folder / TIMINGS, timings)
    tracker.log_metrics({prefix + name: value for name, value in metrics.items()})
    tracker.log_metrics({f"{prefix}perf/images_per_s": timings["draw_images_per_s"]})
    tracker.log_picture(target / SAMPLE_GRID)


def protocol(sampler: Sampler, sample: P.Sample) -> dict[str, Any]:
    """Return how a set of samples came about, as JSON data with a digest: what makes scores comparable."""
    content = {
        **sampler.protocol(),
        "images": sample.images,
        "plan": sample.plan,
        "first_seed": sample.seed,
        "num_classes": sampler.num_classes,
        "classes": sampler.class_names,
        "image_size": sample.resize or sampler.image_size,
        "resized_from": sampler.image_size if sample.resize else None,
    }
    return {**content, "digest": digest_of(content)}


def patch_metrics(sampler: Sampler, starts: np.ndarray) -> dict[str, float]:
    """Return what patches were like: starts (N, T) bool, where patches begin."""
    counts = starts.sum(axis=1)
    metrics = {
        "sample/images": len(starts),
        "patch/mean_length": starts.size / float(counts.sum()),
        "patch/patches_per_image": float(counts.mean()),
        "patch/patches_5_percent": float(np.percentile(counts, 5)),
        "patch/patches_95_percent": float(np.percentile(counts, 95)),
    }
    rule = sampler.settings.rule
    if rule is not None and rule.reads_entropies and rule.threshold is not None:
        metrics["patch/threshold_nats"] = float(rule.threshold)
    return metrics


def grid_picture(job: SampleJob, sampler: Sampler, labels: np.ndarray) -> Image.Image:
    """Lay out the first samples of up to ten classes, one class per row."""
    wanted = {int(c): [int(i) for i in np.flatnonzero(labels == c)[:GRID_COLUMNS]] for c in np.unique(labels)}
    wanted = dict(list(wanted.items())[:GRID_CLASSES])
    chosen: dict[int, np.ndarray] = {}
    first = 0
    for images in batch_arrays(job, "images"):
        for index in (i for of_class in wanted.values() for i in of_class):
            if first <= index < first + len(images):
                chosen[index] = images[index - first]
        first += len(images)
        if len(chosen) == sum(map(len, wanted.values())):
            break
    rows = [np.stack([chosen[i] for i in of_class]) for of_class in wanted.values()]
    size = rows[0].shape[1]
    title = f"{'DPAR' if sampler.is_dpar else 'LlamaGen baseline'}, cfg {sampler.settings.cfg_scale:g}"
    return labelled_grid(rows, [sampler.class_names[c] for c in wanted], title=title, factor=max(128 // size, 1))


def patch_lengths(folder: Path) -> list[np.ndarray]:
    """Return the patch lengths of a folder of samples: N arrays (M,) uint16."""
    with np.load(folder / SAMPLE_TOKENS, allow_pickle=False) as archive:
        tokens = archive["tokens"].shape[1]
        return lengths_from_starts(np.unpackbits(archive["starts"], axis=1, count=tokens).astype(bool))
