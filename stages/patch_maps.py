"""Cut every view into patches by its stored entropies: seconds for any threshold, maximum or mode (DPAR, Sec. 3.2)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpar_core.files import atomic_folder, atomic_path, atomic_write, write_json
from dpar_core.patch_maps import (
    RULE,
    EntropyMaps,
    pack_starts,
    parquet_name,
    write_lengths,
    write_rule,
    write_summary,
)
from dpar_core.patching import PatchRule, lengths_from_starts, patch_starts_numpy, threshold_for_mean_length
from dpar_core.shards import TokenShards
from stages import params as P
from stages.entropies import SPLITS
from stages.tracker import Tracker


@dataclass(frozen=True)
class Params:
    patching: P.Patching


@dataclass(frozen=True)
class Inputs:
    tokens: Path
    entropies: Path


@dataclass(frozen=True)
class Outputs:
    patch_maps: Path
    metrics: Path
    histogram: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write patch lengths, the rule with its threshold, and how long patches are."""
    maps = {split: EntropyMaps(inputs.entropies, TokenShards(inputs.tokens, split)) for split in SPLITS}
    train = maps["train"]
    tracker.log_input("entropies", inputs.entropies, train.digest)
    rule = make_rule(params.patching, train)
    made_by = {"tokens": train.shards.digest, "entropies": train.digest, "entropy_model": train.entropy_model}
    counts: dict[str, np.ndarray] = {}
    lengths: dict[str, np.ndarray] = {}
    images = sum(len(one.shards) for one in maps.values())
    with atomic_folder(outputs.patch_maps) as folder, tracker.progress(images, "patch_maps", unit="images") as progress:
        write_rule(folder / RULE, rule, made_by=made_by)
        names = [RULE]
        for split, one in maps.items():
            bits, per_image, histogram = [], [], np.zeros(one.shards.meta.tokens + 1, np.int64)
            for name, part in one.shards.shards():
                starts = patch_starts_numpy(one.shard(name), rule)
                write_lengths(folder / parquet_name(name), one.shards, part, starts, made_by=made_by)
                bits.append(pack_starts(starts, views=one.shards.meta.num_views))
                per_image.append(starts.sum(axis=1))
                histogram += np.bincount(np.concatenate(lengths_from_starts(starts)), minlength=len(histogram))
                names.append(parquet_name(name))
                progress.advance(part.stop - part.start)
            with atomic_path(folder / f"{split}.starts.npy") as temporary, open(temporary, "wb") as stream:
                np.save(stream, np.concatenate(bits))
            names.append(f"{split}.starts.npy")
            counts[split], lengths[split] = np.concatenate(per_image), histogram
        write_summary(folder, names, made_by=made_by)
    metrics = _metrics(rule, counts, tokens=train.shards.meta.tokens)
    write_json(outputs.metrics, metrics)
    _write_histogram(outputs.histogram, lengths)
    tracker.log_metrics(metrics)


def make_rule(patching: P.Patching, maps: EntropyMaps) -> PatchRule:
    """Return the rule of params.yaml; its threshold is measured on `maps` where a mean length is given instead."""
    given = PatchRule(
        patching.mode, maps.shards.meta.row_width, patching.threshold if patching.threshold is not None else 0.0,
        patching.max_patch_length, patching.static_length,
    )  # fmt: skip
    if not given.reads_entropies or patching.target_mean_length is None:
        return given
    threshold = threshold_for_mean_length(maps.all(), given, patching.target_mean_length)
    return PatchRule(given.mode, given.row_width, threshold, given.max_patch_length, given.static_length)


def _metrics(rule: PatchRule, counts: dict[str, np.ndarray], *, tokens: int) -> dict[str, float]:
    train = counts["train"]
    metrics = {
        "patch/mean_length": tokens * len(train) / float(train.sum()),
        "patch/patches_per_image": float(train.mean()),
        "patch/patches_5_percent": float(np.percentile(train, 5)),
        "patch/patches_95_percent": float(np.percentile(train, 95)),
        "patch/share_of_tokens": float(train.mean()) / tokens,
        "patch/validation_mean_length": tokens * len(counts["validation"]) / float(counts["validation"].sum()),
    }
    if rule.reads_entropies:
        metrics["patch/threshold_nats"] = float(rule.threshold)
    return metrics


def _write_histogram(path: Path, lengths: dict[str, np.ndarray]) -> None:
    longest = max(int(np.flatnonzero(h).max()) for h in lengths.values())
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["length", *lengths])
    for length in range(1, longest + 1):
        writer.writerow([length, *(int(h[length]) for h in lengths.values())])
    atomic_write(path, stream.getvalue())
