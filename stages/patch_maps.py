"""Cut every view into patches by its stored entropies: seconds for any threshold, maximum or mode (DPAR, Sec. 3.2)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dpar_core.data.manifest import SPLITS
from dpar_core.data.shards import TokenShards
from dpar_core.files import Damaged, atomic_folder, atomic_path, atomic_write, sha256_file, write_json
from dpar_core.patches.maps import (
    RULE,
    EntropyMaps,
    MadeBy,
    join_starts,
    pack_starts,
    parquet_name,
    read_rule,
    starts_name,
    write_lengths,
    write_rule,
    write_summary,
)
from dpar_core.patches.rule import PatchRule, flat_lengths, patch_starts_numpy, threshold_for_mean_length
from dpar_core.system import cpus
from stages import params as P
from stages.terminal import note
from stages.tracker import Tracker
from stages.workers.tasks import facts_of_unit, finish_unit, finished_unit, move_into_place, remove_leftovers, run_units

MEASURED_MAPS = 50_000  # a threshold is measured on so many maps: the mean length of all is then known to about 0.05 %


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


@dataclass(frozen=True)
class Histograms:
    """How often each value occurs.

    lengths: (T + 1,) int64, patches of each length.
    counts: images with so many patches.
    """

    lengths: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Histograms) -> Histograms:
        return Histograms(self.lengths + other.lengths, self.counts + other.counts)

    @property
    def maps(self) -> int:
        return int(self.counts.sum())

    @property
    def patches(self) -> int:
        return int(self.lengths.sum())

    def percentile(self, share: float) -> float:
        """Return the patches of an image below which `share` per cent of the images lie (as np.percentile)."""
        rank_at = share / 100 * (self.maps - 1)
        ends = np.cumsum(self.counts)
        low, high = (int(np.searchsorted(ends, rank, side="right")) for rank in (math.floor(rank_at), math.ceil(rank_at)))
        return low + (high - low) * (rank_at - math.floor(rank_at))


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write patch lengths, the rule with its threshold, and how long patches are; finished shards are kept."""
    remove_leftovers(work, *vars(outputs).values())
    maps = {split: EntropyMaps(inputs.entropies, TokenShards(inputs.tokens, split)) for split in SPLITS}
    train = maps["train"]
    tracker.log_input("entropies", inputs.entropies, train.digest)
    made_by = train.maps_made_by()
    rule = _kept_rule(work / RULE, train.made_by.entropy_model)
    if rule is None:
        rule, measured_on = make_rule(params.patching, train)
        write_rule(work / RULE, rule, made_by=made_by, facts={"threshold_measured_on_maps": measured_on})
    found = {split: _make_maps(one, rule, work, made_by, tracker) for split, one in maps.items()}
    with atomic_folder(outputs.patch_maps) as folder:
        names = [RULE]
        move_into_place(work / RULE, folder / RULE)
        for split, one in maps.items():
            names += [parquet_name(name) for name, _ in one.shards.shards()] + [starts_name(split)]
            for name, _ in one.shards.shards():
                move_into_place(work / parquet_name(name), folder / parquet_name(name))
            meta = one.shards.meta
            shape = (len(one.shards), meta.num_views, -(-meta.tokens // 8))
            parts = [work / f"{name}.starts.npy" for name, _ in one.shards.shards()]
            join_starts(folder / starts_name(split), parts, maps=shape)
        _write_histogram(outputs.histogram, {split: histograms.lengths for split, histograms in found.items()})
        write_summary(folder, names, made_by=made_by, facts={"patch_lengths_sha256": sha256_file(outputs.histogram)})
    metrics = _metrics(rule, found, tokens=train.shards.meta.tokens)
    metrics["patch/bytes_per_map"] = sum(f.stat().st_size for f in outputs.patch_maps.iterdir()) / sum(
        histograms.maps for histograms in found.values()
    )
    write_json(outputs.metrics, metrics)
    tracker.log_metrics(metrics)


def _kept_rule(path: Path, entropy_model: str) -> PatchRule | None:
    """Return the rule that an interrupted run found, None when there is none or it was damaged since."""
    if not path.exists():
        return None
    try:
        return read_rule(path, entropy_model=entropy_model)
    except Damaged as error:
        note(f"{error}; it is made again")
        return None


def make_rule(patching: P.Patching, maps: EntropyMaps) -> tuple[PatchRule, int]:
    """Return the rule of params.yaml, and the number of maps its threshold was measured on (0: it was given).

    Where a mean length is given in place of a threshold, it is measured on all maps, or on MEASURED_MAPS of them, chosen
    at random, where there are more. Raises ValueError when no threshold gives that length.
    """
    given = PatchRule(
        patching.mode,
        maps.shards.meta.row_width,
        patching.threshold if patching.threshold is not None else 0.0,
        patching.max_patch_length,
        patching.static_length,
    )
    if not given.reads_entropies or patching.target_mean_length is None:
        return given, 0
    sample = maps.sample(MEASURED_MAPS)
    threshold = threshold_for_mean_length(sample.entropies, given, patching.target_mean_length)
    rule = PatchRule(given.mode, given.row_width, threshold, given.max_patch_length, given.static_length)
    return rule, len(sample.entropies)


def _make_maps(maps: EntropyMaps, rule: PatchRule, work: Path, made_by: MadeBy, tracker: Tracker) -> Histograms:
    """Write the maps of a split into the work folder, as far as they are missing; return how long patches are."""
    parts = dict(maps.shards.shards())
    todo = [name for name in parts if finished_unit(work, name) is None]
    done = len(maps.shards) - sum(parts[name].stop - parts[name].start for name in todo)

    def make(name: str) -> None:
        make_map(maps, name, parts[name], rule, work, made_by)

    description = f"patch_maps {maps.shards.split}"
    with tracker.progress(len(maps.shards), description, done=done, unit="images") as progress:
        for name, _ in run_units(todo, lambda threads: make, section="patching", at_once=cpus()):
            progress.advance(parts[name].stop - parts[name].start)
    total: Histograms | None = None
    for name in parts:
        record = facts_of_unit(work, name)
        one = Histograms(*(np.array(record[field], np.int64) for field in ("lengths", "counts")))
        total = one if total is None else total + one
    assert total is not None, "a split has at least one shard"
    return total


def make_map(maps: EntropyMaps, name: str, part: slice, rule: PatchRule, work: Path, made_by: MadeBy) -> None:
    """Write the maps of one shard: lengths, boundaries as bits, and last how long its patches are."""
    starts = patch_starts_numpy(maps.shard(name), rule)
    write_lengths(work / parquet_name(name), maps.shards, part, starts, made_by=made_by)
    with atomic_path(work / f"{name}.starts.npy") as temporary, open(temporary, "wb") as stream:
        np.save(stream, pack_starts(starts, views=maps.shards.meta.num_views))
    record = {field: value.tolist() for field, value in asdict(histograms_of(starts)).items()}
    finish_unit(work, name, [parquet_name(name), f"{name}.starts.npy"], **record)


def histograms_of(starts: np.ndarray) -> Histograms:
    """Count patch lengths and patches per image: starts (B, T) bool."""
    tokens = starts.shape[1]
    lengths, counts = flat_lengths(starts)
    return Histograms(np.bincount(lengths, minlength=tokens + 1), np.bincount(counts, minlength=tokens + 1))


def _metrics(rule: PatchRule, found: Mapping[str, Histograms], *, tokens: int) -> dict[str, float]:
    train, validation = found["train"], found["validation"]
    metrics = {
        "patch/mean_length": tokens * train.maps / train.patches,
        "patch/patches_per_image": train.patches / train.maps,
        "patch/patches_5_percent": train.percentile(5),
        "patch/patches_95_percent": train.percentile(95),
        "patch/share_of_tokens": train.patches / train.maps / tokens,
        "patch/validation_mean_length": tokens * validation.maps / validation.patches,
    }
    if rule.threshold is not None and rule.reads_entropies:
        metrics["patch/threshold_nats"] = float(rule.threshold)
    return metrics


def _write_histogram(path: Path, lengths: Mapping[str, np.ndarray]) -> None:
    longest = max(int(np.flatnonzero(h).max()) for h in lengths.values())
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["length", *lengths])
    for length in range(1, longest + 1):
        writer.writerow([length, *(int(h[length]) for h in lengths.values())])
    atomic_write(path, stream.getvalue())
