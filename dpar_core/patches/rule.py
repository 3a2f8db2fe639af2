"""Where patches begin: the batched rule and the incremental one (DPAR, Sec. 3.2).

Shapes: B images, T tokens of a grid with rows of G in raster order, M patches. e_t = H(x_t | x_<t) in nats is known
before x_t is sampled, so every decision here is causal; adding tokens never moves an earlier boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, assert_never, get_args

import numpy as np
import torch
from torch import Tensor

from dpar_core.choices import READ_ENTROPIES, PatchMode


@dataclass(frozen=True)
class PatchRule:
    """How an image is cut into patches.

    mode: "entropy_rows" (DPAR: cuts before tokens 0 and 1, at row starts and where e_t > threshold), "entropy" (no cuts at
    row starts), "static" (runs of static_length), "token" (one token per patch).
    threshold: nats, compared in float32, strictly.
    max_patch_length: runs longer than this are cut from the left; None: no maximum.

    Raises ValueError for values that make no rule.
    """

    mode: PatchMode
    row_width: int
    threshold: float | None = None
    max_patch_length: int | None = None
    static_length: int = 2

    def __post_init__(self) -> None:
        if self.mode not in get_args(PatchMode):
            raise ValueError(f"patch mode must be one of {', '.join(get_args(PatchMode))}; got {self.mode!r}")
        if self.reads_entropies and self.threshold is None:
            raise ValueError(f"patch mode {self.mode} needs a threshold in nats")
        for name in ("row_width", "static_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.max_patch_length is not None and self.max_patch_length < 1:
            raise ValueError(f"max_patch_length must be at least 1 or None; got {self.max_patch_length}")

    @property
    def reads_entropies(self) -> bool:
        """Whether the plan of an image depends on its entropies."""
        return self.mode in READ_ENTROPIES

    def fixed_cuts(self, tokens: int) -> np.ndarray:
        """Return the tokens before which a cut is made whatever the entropies are: (tokens,) bool."""
        position = np.arange(tokens)
        cuts: np.ndarray
        if self.mode == "token":
            cuts = np.ones(tokens, bool)
        elif self.mode == "static":
            cuts = position % self.static_length == 0
        elif self.mode == "entropy_rows":
            cuts = (position <= 1) | (position % self.row_width == 0)
        elif self.mode == "entropy":
            cuts = position <= 1
        else:
            assert_never(self.mode)
        return cuts

    def longest(self, tokens: int) -> int:
        """Return the largest number of tokens that a patch of an image of `tokens` can have."""
        between = np.diff(np.flatnonzero(self.fixed_cuts(tokens)), append=tokens)
        return min(int(between.max()), self.max_patch_length or tokens)


def patch_starts(entropies: Tensor, rule: PatchRule) -> Tensor:
    """Return which tokens begin a patch.

    A cut is made before a token at a fixed position (see `PatchRule.fixed_cuts`) or with an entropy above the threshold. A
    patch begins at each cut, and after every max_patch_length tokens without one (DPAR, Sec. 3.2).

    entropies: (B, T) float32 nats, entries 0 ignored (may be nan); any prefix of an image is allowed.
    Returns (B, T) bool. Raises ValueError for another dtype.
    """
    if entropies.dtype != torch.float32:
        raise ValueError(f"entropies must be float32, as rounding moves boundaries; got {entropies.dtype}")
    position = torch.arange(entropies.shape[1], device=entropies.device)
    cuts = torch.from_numpy(rule.fixed_cuts(entropies.shape[1])).to(entropies.device).expand(entropies.shape)
    if rule.reads_entropies:
        cuts = cuts | (entropies > torch.tensor(rule.threshold, dtype=torch.float32))
    if rule.max_patch_length is None:
        return cuts.clone()
    last_cut = torch.where(cuts, position, 0).cummax(dim=1).values
    return (position - last_cut) % rule.max_patch_length == 0


def starts_by_entropy(starts: np.ndarray, rule: PatchRule) -> np.ndarray:
    """Return which patches began by an entropy alone: neither at a fixed position nor for the maximum length.

    starts: (B, T) bool, made by the rule.
    Returns (B, T) bool.
    """
    found: np.ndarray = starts & ~rule.fixed_cuts(starts.shape[1])
    if rule.max_patch_length is not None:
        position = np.arange(starts.shape[1])
        last_start = np.maximum.accumulate(np.where(starts, position, 0), axis=1)
        found[:, 1:] &= position[1:] - last_start[:, :-1] < rule.max_patch_length
    return found


def patch_starts_numpy(entropies: np.ndarray, rule: PatchRule, *, chunk: int = 4096) -> np.ndarray:
    """Do what `patch_starts` does, fast for millions of maps on one core: (B, T) float32 -> (B, T) bool."""
    if entropies.dtype != np.float32:
        raise ValueError(f"entropies must be float32, as rounding moves boundaries; got {entropies.dtype}")
    tokens = entropies.shape[1]
    fixed = rule.fixed_cuts(tokens)
    starts = np.empty(entropies.shape, bool)
    position = np.arange(tokens, dtype=np.int16 if tokens < 2**15 else np.int32)
    for first in range(0, len(entropies), chunk):
        part = starts[first : first + chunk]
        if rule.reads_entropies:
            np.greater(entropies[first : first + chunk], np.float32(rule.threshold), out=part)
            part |= fixed
        else:
            part[:] = fixed
        if rule.max_patch_length is not None:
            distance = position - np.maximum.accumulate(np.where(part, position, 0).astype(position.dtype), axis=1)
            np.equal(distance % rule.max_patch_length, 0, out=part)
    return starts


class BoundaryState:
    """The rule token by token, as generation needs it; all rows of a batch at once, or some at places of their own.

    All tensors are on the host.
    last_cut: (B,) int64, position of the token after the last cut of each row.
    """

    def __init__(self, rule: PatchRule, rows: int) -> None:
        self.rule = rule
        self.last_cut = torch.zeros(rows, dtype=torch.int64)
        self._fixed = torch.zeros(0, dtype=torch.bool)

    def step(self, position: int | Tensor, entropies: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Return which rows begin a patch at `position`, given e_position (A,) float32 nats: (A,) bool.

        position: one for all rows, or (A,) int64, one per row.
        rows: (A,) int64, the rows meant (None: all).
        Positions of a row must come in order from 0; entropies at position 0 are ignored.
        """
        rule = self.rule
        if isinstance(position, int):
            position = torch.full(entropies.shape, position)
        if len(position) and int(position.max()) >= len(self._fixed):
            self._fixed = torch.from_numpy(rule.fixed_cuts(2 * int(position.max()) + 2))
        cut = self._fixed[position]
        if rule.reads_entropies:
            cut = cut | (entropies > torch.tensor(rule.threshold, dtype=torch.float32))
        last_cut = torch.where(cut, position, self.last_cut if rows is None else self.last_cut[rows])
        if rows is None:
            self.last_cut = last_cut
        else:
            self.last_cut[rows] = last_cut
        if rule.max_patch_length is None:
            return cut
        return (position - last_cut) % rule.max_patch_length == 0


class FlatLengths(NamedTuple):
    """Patch lengths of many images, one after another.

    lengths: (M_0 + M_1 + ...,) uint16.
    counts: (B,) int64, the M_b.
    """

    lengths: np.ndarray
    counts: np.ndarray


def flat_lengths(starts: np.ndarray) -> FlatLengths:
    """Turn (B, T) bool starts into the patch lengths of all images. Raises ValueError where token 0 begins no patch."""
    if not starts[:, 0].all():
        raise ValueError(f"token 0 must begin a patch; in image {int(np.argmin(starts[:, 0]))} of {len(starts)} it does not")
    # Each image begins with a start, so the last patch of an image ends where the first of the next one begins.
    lengths = np.diff(np.flatnonzero(starts), append=starts.size).astype(np.uint16)
    return FlatLengths(lengths, np.count_nonzero(starts, axis=1))


def lengths_from_starts(starts: np.ndarray) -> list[np.ndarray]:
    """Turn (B, T) bool starts into the patch lengths of each image: B arrays (M_b,) uint16 that sum to T."""
    lengths, counts = flat_lengths(np.asarray(starts))
    ends = counts.cumsum().tolist()
    return [lengths[first:last] for first, last in zip([0, *ends], ends)]


def starts_from_lengths(lengths: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    """Turn patch lengths (zero padding allowed) into (B, tokens) bool. Raises ValueError when they do not sum to it."""
    starts = np.zeros((len(lengths), tokens), bool)
    for row, one in zip(starts, lengths):
        one = np.asarray(one, dtype=np.int64)
        one = one[one > 0]
        if one.sum() != tokens:
            raise ValueError(f"patch lengths must sum to {tokens} tokens; got {one.sum()}")
        row[np.concatenate([[0], one.cumsum()[:-1]])] = True
    return starts


def mean_patch_length(entropies: np.ndarray, rule: PatchRule) -> float:
    """Return tokens per patch over all maps: entropies (B, T) float32."""
    return entropies.size / int(patch_starts_numpy(entropies, rule).sum())


def threshold_for_mean_length(entropies: np.ndarray, rule: PatchRule, target: float) -> float:
    """Return the threshold whose mean patch length comes nearest to `target` tokens, exact in float32.

    entropies: (B, T) float32 nats of the data the threshold is measured on.
    rule: everything but the threshold.
    Raises ValueError when no threshold comes within 5 %.

    Merging runs never adds a patch, so the mean grows with the threshold and bisection over the values that occur finds the
    best one; of two equally near ones the smaller.
    """
    candidates = np.unique(entropies[:, 1:])

    def mean(index: int) -> float:
        return mean_patch_length(entropies, replace(rule, threshold=float(candidates[index])))

    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if mean(middle) < target:
            low = middle + 1
        else:
            high = middle
    best = min({max(low - 1, 0), low}, key=lambda index: (abs(mean(index) - target), index))
    if abs(mean(best) - target) > 0.05 * target:
        raise ValueError(
            f"no threshold gives {target} tokens per patch: mode {rule.mode} with max_patch_length "
            f"{rule.max_patch_length} reaches {mean(0):.3f} to {mean(len(candidates) - 1):.3f} on this data"
        )
    return float(candidates[best])
