"""Centre crops of a manifest's rows, which the stages that train on pixels share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpar_core.data.images import BadImage, center_crop
from dpar_core.data.manifest import Row
from dpar_core.data.splits import counted
from stages.data import ManifestOpener

CACHED_IMAGES = 20_000


class Crops(NamedTuple):
    """Crops of some rows.

    images: (n, size, size, 3) uint8.
    indices: (n,) int64, the rows they are of.
    """

    images: np.ndarray
    indices: np.ndarray


class CenterCrops:
    """Centre crops of manifest rows, decoded when first asked for; the newest 20,000 stay in memory.

    bad: why a row that was asked for cannot be read, by its index.
    """

    def __init__(self, rows: Sequence[Row], opener: ManifestOpener, size: int) -> None:
        self.rows, self.opener, self.size = rows, opener, size
        self.bad: dict[int, str] = {}
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return (size, size, 3) uint8. Raises BadImage."""
        if index in self.bad:
            raise BadImage(self.bad[index])
        if index not in self._kept:
            try:
                self._kept[index] = center_crop(self.opener(self.rows[index]), self.size)
            except BadImage as error:
                self.bad[index] = str(error)
                raise
            if len(self._kept) > CACHED_IMAGES:
                self._kept.popitem(last=False)
        return self._kept[index]

    def readable(self, indices: Iterable[int]) -> Crops:
        """Return the rows that can be read; the others are left out. Raises ValueError when none can."""
        found = {}
        for index in map(int, indices):
            try:
                found[index] = self[index]
            except BadImage:
                continue
        if not found:
            raise ValueError(f"no image can be read, {self.rows[0].source} and the others of its split: check data")
        return Crops(np.stack(list(found.values())), np.array(list(found), np.int64))

    def batch(self, indices: np.ndarray, mirrored: np.ndarray) -> Crops:
        """Return a crop for each index; in place of an unreadable image the next readable one is taken."""
        taken = np.array([self._next_readable(int(index)) for index in indices], np.int64)
        return Crops(np.stack([self[int(i)][:, :: -1 if m else 1] for i, m in zip(taken, mirrored)]), taken)

    def note(self, split: str) -> str | None:
        """Return a sentence on the images that were asked for and could not be read, None where all could."""
        if not self.bad:
            return None
        first = min(self.bad)
        verb = "cannot be read and is" if len(self.bad) == 1 else "cannot be read and are"
        shown = f"{self.rows[first].source}: {self.bad[first]}"
        return f"warning: {counted(len(self.bad), f'{split} image')} {verb} left out (first: {shown})"

    def _next_readable(self, index: int) -> int:
        for offset in range(100):
            other = (index + offset) % len(self)
            try:
                self[other]
            except BadImage:
                continue
            return other
        raise ValueError(f"100 images in a row from {self.rows[index].source} cannot be read: check data.train")
