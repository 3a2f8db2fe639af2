"""Rotary tables of tokens and of patches (method: RoFormer; LlamaGen's 2D form; DPAR, Sec. 3.3).

Shapes: T tokens of a G x G grid in raster order, M patches, hd head dimension. A table is a pair (cos, sin) of float32
tensors whose last dimension is hd / 2, one entry for each pair of adjacent elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpar_core.choices import ENCODED, PositionEncoding, head_multiple

BASE = 10000.0


class Rotary(NamedTuple):
    """cos, sin: (..., hd / 2) float32. Both zero where a position takes no part in the rotation (class, start)."""

    cos: Tensor
    sin: Tensor

    def at(self, index: Tensor | slice | int) -> Rotary:
        """Return the entries at these positions (a slice, or integer indices of any shape)."""
        return Rotary(self.cos[index], self.sin[index])


def frequencies(count: int, device: torch.device | str | None = None) -> Tensor:
    """Return f(i) = 10000^(-i / count) for i < count: (count,) float32."""
    return BASE ** -(torch.arange(count, device=device, dtype=torch.float32) / count)


def rotary(angles: Tensor) -> Rotary:
    """Turn angles (..., hd / 2) float32, radians, into a table."""
    return Rotary(angles.cos(), angles.sin())


def token_rotary(row_width: int, head_dim: int, *, leading: int) -> Rotary:
    """Return the 2D table of a grid's tokens after `leading` entries of zeros (class or start): (leading + T, hd / 2).

    The first hd/4 pairs turn by the row, the next hd/4 by the column. Raises ValueError if 4 does not divide hd.
    """
    if head_dim % 4:
        raise ValueError(f"2D rotary encoding needs a head dimension that 4 divides; got {head_dim}")
    f = frequencies(head_dim // 4)
    position = torch.arange(row_width * row_width)
    angles = torch.cat([(position // row_width)[:, None] * f, (position % row_width)[:, None] * f], dim=1)
    table = rotary(angles)
    zeros = torch.zeros(leading, head_dim // 2)
    return Rotary(torch.cat([zeros, table.cos]), torch.cat([zeros, table.sin]))


def patch_rotary(
    rows: Tensor, first_cols: Tensor, last_cols: Tensor, index: Tensor, head_dim: int, *, encoding: PositionEncoding
) -> Rotary:
    """Return the table of patches: (M, hd / 2).

    rows, first_cols, last_cols, index: (M,) integers: row of the patch's first token, column of its first and of its last
        token, number of the patch in its image.
    encoding: see choices.ENCODED.
    Raises ValueError for another encoding or a head dimension it does not divide.
    """
    known = {"row": rows, "first_column": first_cols, "last_column": last_cols, "number": index}
    counts = pairs_of(head_dim, encoding)
    angles = [known[name][:, None] * frequencies(count, rows.device) for name, count in zip(ENCODED[encoding], counts)]
    return rotary(torch.cat(angles, dim=1))


def pairs_of(head_dim: int, encoding: PositionEncoding) -> list[int]:
    """Return how many pairs of a head each coordinate of an encoding turns; they sum to hd / 2. Raises ValueError."""
    if encoding not in ENCODED:
        raise ValueError(f"position_encoding must be one of {', '.join(ENCODED)}; got {encoding!r}")
    others = len(ENCODED[encoding]) - 1
    if head_dim % head_multiple(encoding):
        raise ValueError(f"{encoding} needs a head dimension that {head_multiple(encoding)} divides; got {head_dim}")
    return [head_dim // 4, *[head_dim // 4 // others] * others] if others else [head_dim // 2]


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Turn adjacent pairs of x (..., n, heads, hd) by a table (..., n, hd / 2); float32 inside, x's dtype out."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = table.cos.unsqueeze(-2), table.sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).type_as(x)
