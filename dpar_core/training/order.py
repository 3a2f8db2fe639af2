"""Which image and which view a training step sees: a function of (seed, step) alone.

The images of all epochs form one endless line: epoch 0 in its random order, then epoch 1 in another, and so on. Step s
takes positions s * batch_size ... (s + 1) * batch_size - 1 of it. So no epoch loses images, a step may span two epochs,
every rank gets the same number of images, and nothing needs to be stored to go on at step s, with any number of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

_ORDER, _VIEW = 0, 1  # streams of the random generator


class Picks(NamedTuple):
    """Images of a batch: indices (n,) int64 into the data set, views (n,) int64."""

    indices: np.ndarray
    views: np.ndarray


@lru_cache(maxsize=2)
def _epoch(images: int, views: int, seed: int, epoch: int) -> Picks:
    """Return the order of one epoch and the view that each position shows (one random view per image)."""
    # Only the raw streams of a bit generator are promised to stay the same between NumPy versions.
    keys = _raw(seed, epoch, _ORDER, images)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    view = (_raw(seed, epoch, _VIEW, images) % np.uint64(views)).astype(np.int64)
    order.setflags(write=False)
    view.setflags(write=False)
    return Picks(order, view)


def _raw(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    key = np.array([seed, (epoch << 1) | stream], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


class DataOrder:
    """The order of a training set of `images` images with `views` views each, in batches of `batch_size` images.

    Raises ValueError when there is nothing to choose from.
    """

    def __init__(self, *, images: int, views: int, batch_size: int, seed: int) -> None:
        if images < 1 or views < 1:
            raise ValueError(f"training needs at least one image with one view; found {images} images, {views} views")
        self.images, self.views, self.batch_size, self.seed = images, views, batch_size, seed

    def batch(self, step: int) -> Picks:
        """Return what all ranks together see in `step` (0 is the first): batch_size images."""
        return self.positions(step * self.batch_size, (step + 1) * self.batch_size)

    def part(self, step: int, *, rank: int, ranks: int, micro: int = 0, micros: int = 1) -> Picks:
        """Return what one rank sees in micro-batch `micro` of `micros` of a step.

        Pieces are consecutive runs of the step's batch, micro-batch by micro-batch, rank by rank within each.
        Raises ValueError when the batch does not divide into ranks x micros equal pieces.
        """
        pieces = ranks * micros
        if self.batch_size % pieces:
            raise ValueError(
                f"a batch of {self.batch_size} images does not divide into {ranks} workers x {micros} micro-batches: "
                f"make it a multiple of {pieces}"
            )
        size = self.batch_size // pieces
        first = step * self.batch_size + (micro * ranks + rank) * size
        return self.positions(first, first + size)

    def positions(self, first: int, last: int) -> Picks:
        """Return positions first ... last - 1 of the endless line."""
        indices, views = [], []
        while first < last:
            epoch, offset = divmod(first, self.images)
            order, view = _epoch(self.images, self.views, self.seed, epoch)
            end = min(self.images, offset + last - first)
            indices.append(order[offset:end])
            views.append(view[offset:end])
            first += end - offset
        return Picks(np.concatenate(indices), np.concatenate(views))


def fixed_subset(images: int, wanted: int) -> np.ndarray:
    """Return indices (n,) int64 of an evenly spaced subset of `wanted` of `images` images (0, or too many: all).

    For images in random order, as in token shards; of ordered ones it may meet some classes alone (see `random_subset`).
    """
    if wanted <= 0 or wanted >= images:
        return np.arange(images, dtype=np.int64)
    return np.arange(wanted, dtype=np.int64) * images // wanted


def random_subset(images: int, wanted: int) -> np.ndarray:
    """Return indices (n,) int64, ascending, of a random subset of `wanted` of `images` images (too many: all).

    Always the same one, and whatever order the images have, class by class or in turns: each is as likely as any other.
    """
    return np.sort(np.random.default_rng(0).permutation(images)[:wanted]).astype(np.int64)
