"""Centre crops of a manifest's rows, which the stages that train on pixels share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dpar_core.data.images import BadImage, center_crop
from dpar_core.data.manifest import Row
from stages.data import ManifestOpener

CACHED_IMAGES = 20_000


class CenterCrops:
    """Centre crops of manifest rows, decoded when first asked for; the newest 20,000 stay in memory."""

    def __init__(self, rows: Sequence[Row], opener: ManifestOpener, size: int) -> None:
        self.rows, self.opener, self.size = rows, opener, size
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return (size, size, 3) uint8. Raises BadImage."""
        if index not in self._kept:
            self._kept[index] = center_crop(self.opener(self.rows[index]), self.size)
            if len(self._kept) > CACHED_IMAGES:
                self._kept.popitem(last=False)
        return self._kept[index]

    def batch(self, indices: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Return (n, size, size, 3) uint8; an unreadable image is replaced by the next readable one."""
        return np.stack([self._readable(int(i))[:, :: -1 if m else 1] for i, m in zip(indices, mirrored)])

    def _readable(self, index: int) -> np.ndarray:
        for offset in range(100):
            try:
                return self[(index + offset) % len(self)]
            except BadImage:
                continue
        raise ValueError(f"100 images in a row from {self.rows[index].source} cannot be read: check data.train")
