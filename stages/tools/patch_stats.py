"""How long patches would be for other thresholds and maximum lengths, from the stored entropies, in seconds.

Shapes: n maps, T tokens of a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpar_core.choices import PatchMode
from dpar_core.data.shards import TokenShards
from dpar_core.patches.maps import EntropyMaps
from dpar_core.patches.rule import PatchRule, patch_starts_numpy

MOST_STEPS = 10_000  # numbers of a range
QUANTILES = (0.2, 0.4, 0.5, 0.6, 0.8)  # of the entropies, where nobody names a threshold
STEP = 0.1  # of the tokens, between thresholds that a sweep tries where nobody names one
SAMPLED_MAPS = 20_000  # maps that are looked at: the mean length is then known to about 0.1 %


@dataclass(frozen=True)
class ClassMean:
    """The mean number of patches of a class's images."""

    name: str
    patches: float


@dataclass(frozen=True)
class Cell:
    """What one rule gives. Patches are counted an image: mean, 5 and 95 per cent; classes with the fewest and the most."""

    threshold: float
    max_length: int | None
    mean_length: float
    patches: float
    low: float
    high: float
    fewest: ClassMean
    most: ClassMean


@dataclass(frozen=True)
class PatchStats:
    """A table of rules.

    maps: how many were looked at.
    whole: whether these are all.
    tokens: T.
    """

    cells: tuple[Cell, ...]
    maps: int
    whole: bool
    tokens: int


def patch_stats(
    tokens: Path,
    entropies: Path,
    *,
    thresholds: Sequence[float] | None,
    max_lengths: Sequence[int | None],
    mode: PatchMode = "entropy_rows",
    split: str = "train",
    limit: int = SAMPLED_MAPS,
) -> PatchStats:
    """Return what every threshold with every maximum gives on at most `limit` maps, chosen at random.

    thresholds: nats, None for quantiles of the entropies.
    max_lengths: tokens, None for no maximum.
    Raises FileNotFoundError or ValueError when entropies are missing or belong to other shards, ValueError for a rule that
    is none.
    """
    shards = TokenShards(tokens, split)
    sample = EntropyMaps(entropies, shards).sample(limit)
    if thresholds is None:
        thresholds = entropy_quantiles(sample.entropies)
    images = np.bincount(sample.labels, minlength=len(shards.meta.classes))
    cells = []
    for max_length in max_lengths:
        for threshold in thresholds:
            rule = PatchRule(mode, shards.meta.row_width, float(threshold), max_length)
            patches = patch_starts_numpy(sample.entropies, rule).sum(axis=1)
            sums = np.bincount(sample.labels, weights=patches, minlength=len(images))
            means = np.where(images > 0, sums / np.maximum(images, 1), np.nan)
            low, high = np.percentile(patches, [5, 95])
            extremes = [
                ClassMean(shards.meta.classes[number], float(means[number]))
                for number in (int(np.nanargmin(means)), int(np.nanargmax(means)))
            ]
            mean = float(patches.mean())
            cells.append(Cell(float(threshold), max_length, shards.meta.tokens / mean, mean, low, high, *extremes))
    return PatchStats(tuple(cells), len(sample.labels), sample.whole, shards.meta.tokens)


def entropy_quantiles(entropies: np.ndarray) -> list[float]:
    """Return thresholds in nats that keep the shares QUANTILES of tokens below them. entropies: (n, T), nan unknown."""
    found = np.nanquantile(entropies, QUANTILES)
    return list(dict.fromkeys(round(float(nats), 2) for nats in found))


def thresholds_around(entropies: np.ndarray, threshold: float) -> list[float]:
    """Return a threshold in nats with two below and two above it, each leaving STEP more of the tokens on its other side.

    entropies: (n, T), nan unknown. The ends of the data are where it stops.
    """
    known = np.sort(entropies[~np.isnan(entropies)])
    share = float(np.searchsorted(known, threshold) / len(known))
    shares = [share + STEP * number for number in (-2, -1, 1, 2)]
    beside = [round(float(np.quantile(known, one)), 2) for one in shares if 0 < one < 1]
    return sorted({threshold, *(nats for nats in beside if nats > 0)})


def parse_range(text: str) -> list[float]:
    """Read "7.6:8.1:0.1" (both ends included) or "7.6,7.8" as numbers. Raises ValueError with what was expected."""
    try:
        numbers = [float(part) for part in text.split(":" if ":" in text else ",")]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        if ":" not in text:
            return numbers
        first, last, step = numbers
        count = round((last - first) / step)
        if step <= 0 or not 0 <= count < MOST_STEPS or abs(first + count * step - last) > 1e-6 * max(abs(last), 1):
            raise ValueError
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(
            f"{text!r} is not a range: expected FIRST:LAST:STEP, ending at LAST, of at most {MOST_STEPS:,} numbers, or "
            "numbers with commas"
        ) from None
    return [round(first + number * step, 10) for number in range(count + 1)]


def parse_max_lengths(text: str) -> list[int | None]:
    """Read "1,2,4,none" as maximum lengths. Raises ValueError with what was expected."""
    found: list[int | None] = []
    for part in text.split(","):
        part = part.strip().lower()
        if part != "none" and not (part.isdecimal() and int(part) > 0):
            raise ValueError(f"maximum length {part!r}: expected a number of tokens from 1, or none")
        found.append(None if part == "none" else int(part))
    return found
