"""The patches of a batch as one packed, ragged list.

Shapes: B images, T tokens per image, M_b patches of image b, P = sum of M_b packed patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchLayout:
    """Which token belongs to which patch, and where each patch lies.

    patch_ids: (B, T) int64, packed number of the patch that holds each token.
    offsets: (B + 1,) int64, first packed patch of each image.
    index, lengths, rows, first_cols, last_cols: (P,) int64: number in its image, tokens, row of the first token, columns of
        the first and of the last token.
    starts: (P,) int64, first token in its image.
    most_patches, longest: largest M_b, largest length.
    complete_tokens: tokens of all patches but the last of each image.
    """

    patch_ids: Tensor
    offsets: Tensor
    index: Tensor
    lengths: Tensor
    starts: Tensor
    rows: Tensor
    first_cols: Tensor
    last_cols: Tensor
    most_patches: int
    longest: int
    complete_tokens: int

    @staticmethod
    def from_lengths(lengths: Sequence[np.ndarray], *, row_width: int) -> PatchLayout:
        """Build the layout of a batch on the CPU.

        lengths: for each image its patch lengths (zeros are padding), all images with the same number of tokens.
        Raises ValueError when the sums differ, or an image has no patch.
        """
        kept = [one[one > 0] for one in (np.asarray(one, dtype=np.int64) for one in lengths)]
        totals = {int(one.sum()) for one in kept}
        if len(totals) != 1 or 0 in totals:
            raise ValueError(f"all images of a batch must have the same number of tokens, over 0; got {sorted(totals)}")
        tokens = totals.pop()
        counts = np.array([len(one) for one in kept], dtype=np.int64)
        packed = np.concatenate(kept)
        offsets = np.concatenate([[0], counts.cumsum()])
        image = np.repeat(np.arange(len(kept)), counts)
        flat_starts = packed.cumsum() - packed
        starts = flat_starts - image * tokens
        arrays = {
            "patch_ids": np.repeat(np.arange(len(packed)), packed).reshape(len(kept), tokens),
            "offsets": offsets,
            "index": np.arange(len(packed)) - offsets[:-1][image],
            "lengths": packed,
            "starts": starts,
            "rows": starts // row_width,
            "first_cols": starts % row_width,
            "last_cols": (starts + packed - 1) % row_width,
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        complete = int(starts[offsets[1:] - 1].sum())
        return PatchLayout(**tensors, most_patches=int(counts.max()), longest=int(packed.max()), complete_tokens=complete)

    @property
    def images(self) -> int:
        """Images in the batch, B."""
        return self.patch_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens an image, T."""
        return self.patch_ids.shape[1]

    @property
    def patches(self) -> int:
        """Packed patches, P."""
        return self.lengths.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PatchLayout:
        """Return the layout on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def each(self, change: Callable[[Tensor], Tensor]) -> PatchLayout:
        """Return the layout with every tensor changed."""
        changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return PatchLayout(**changed)
