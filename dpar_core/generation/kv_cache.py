"""Keys and values of what was generated so far, and attention of a few rows over them.

Rows of a batch are at different positions, and at most steps only some of them move. So a row is addressed by its
number, and attention reads the caches of the rows that move in place: nothing is copied, gathered or padded to a
neighbour's length beyond a multiple of `BLOCK` masked positions. A row's result has the same bits whatever other rows
take part.

Shapes: R rows of the cache, A rows that take part in a step, H heads, hd head dimension, C capacity in positions
(a multiple of BLOCK), n positions seen by a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # softmax over a row padded to a multiple of this adds the same numbers in the same order
GROWTH = 32  # positions by which the keys grow; they are read whole, so short caches are kept short


def capacity(positions: int, limit: int) -> int:
    """Return the positions that a cache holds room for once `positions` of at most `limit` are in use."""
    grown = GROWTH * -(-positions // GROWTH)
    return min(grown, BLOCK * -(-limit // BLOCK))


class CachePlan(NamedTuple):
    """Which rows take part, where they write, and how to read: shared by all layers of one step.

    rows, positions: (A,) int64; each row writes at its position and sees all up to it.
    mask: (A, 1, C) float32 of 0 and -inf, None when every row sees all C positions.
    longest: largest count of positions seen.
    key_index, key_offsets, value_index, value_offsets: rows of the tables below, for the CPU form.
    """

    rows: Tensor
    positions: Tensor
    mask: Tensor | None
    longest: int
    key_index: Tensor | None = None
    key_offsets: Tensor | None = None
    value_index: Tensor | None = None
    value_offsets: Tensor | None = None


class KVCache:
    """The caches of a stack of attention layers that share rows and positions.

    On the CPU both products are weighted sums of table rows picked by index (`embedding_bag`): scores are sums of rows
    of the transposed keys (R H hd, C) weighted by the query, outputs are sums of rows of the values (R H limit, hd)
    weighted by the attention. That streams the caches of the moving rows at the memory's speed and adds in a fixed
    order. Elsewhere the moving rows are selected and attended to by scaled_dot_product_attention.
    """

    def __init__(
        self, *, layers: int, rows: int, heads: int, head_dim: int, limit: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows, self.heads, self.head_dim = rows, heads, head_dim
        self.limit, self.device, self.dtype = BLOCK * -(-limit // BLOCK), device, dtype
        self.capacity = 0
        self.in_place = device.type == "cpu"
        self.keys: list[Tensor] = [torch.empty(0, dtype=dtype, device=device)] * layers
        # The values may be large: untouched pages of zeros cost nothing.
        self.values = [torch.zeros(rows, heads, self.limit, head_dim, dtype=dtype, device=device) for _ in range(layers)]
        row_heads = torch.arange(rows * heads, device=device).view(rows, heads, 1)
        self._key_index = (row_heads * head_dim + torch.arange(head_dim, device=device)).flatten(1).int()
        self._value_base = (row_heads * self.limit).int()
        self._arange = torch.arange(max(self.limit, rows * heads * max(head_dim, 1)), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self.keys, *self.values])

    def plan(self, rows: Tensor, positions: Tensor) -> CachePlan:
        """Prepare one step: rows (A,) int64 without repeats, positions (A,) int64 to write at, both on the host.

        Raises ValueError past the limit.
        """
        longest = int(positions.max()) + 1
        if longest > self.limit:
            raise ValueError(f"position {longest - 1} lies beyond the cache's limit of {self.limit} positions")
        if longest > self.capacity:
            self._grow(capacity(longest, self.limit))
        full = longest == self.capacity and int(positions.min()) == longest - 1
        rows, positions = rows.to(self.device), positions.to(self.device)
        mask = None
        if not full:
            hidden = self._arange[: self.capacity] > positions[:, None]
            mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, float("-inf")).unsqueeze(1)
        if not self.in_place:
            return CachePlan(rows, positions, mask, longest)
        count = len(rows) * self.heads
        return CachePlan(
            rows,
            positions,
            mask,
            longest,
            key_index=self._key_index[rows].view(-1),
            key_offsets=self._arange[: count * self.head_dim : self.head_dim],
            value_index=(self._value_base[rows] + self._arange[:longest]).view(-1),
            value_offsets=torch.arange(0, count * longest, longest, dtype=torch.int32),
        )

    def write(self, layer: int, plan: CachePlan, k: Tensor, v: Tensor) -> None:
        """Store k, v (A, H, hd) at the step's positions."""
        if self.in_place:
            self.keys[layer][plan.rows, :, :, plan.positions] = k.to(self.dtype)
        else:
            self.keys[layer][plan.rows, :, plan.positions] = k.to(self.dtype)
        self.values[layer][plan.rows, :, plan.positions] = v.to(self.dtype)

    def attend(self, layer: int, plan: CachePlan, q: Tensor) -> Tensor:
        """Read what the rows see: q (A, H, hd), already scaled by hd^-1/2 -> (A, H, hd) float32."""
        if not self.in_place:
            return self._attend_selected(layer, plan, q)
        rows, heads, head_dim = q.shape
        assert plan.key_index is not None and plan.key_offsets is not None, "plans of this form have an index"
        assert plan.value_index is not None and plan.value_offsets is not None
        scores = (
            torch.embedding_bag(
                self.keys[layer].view(-1, self.capacity),
                plan.key_index,
                plan.key_offsets,
                False,
                0,
                False,
                q.to(self.dtype).reshape(-1),
            )[0]
            .float()
            .view(rows, heads, self.capacity)
        )
        if plan.mask is not None:
            scores += plan.mask
        weights = scores.softmax(-1).to(self.dtype)[..., : plan.longest].reshape(-1)
        return (
            torch.embedding_bag(
                self.values[layer].view(-1, head_dim),
                plan.value_index,
                plan.value_offsets,
                False,
                0,
                False,
                weights,
            )[0]
            .float()
            .view(rows, heads, head_dim)
        )

    def _attend_selected(self, layer: int, plan: CachePlan, q: Tensor) -> Tensor:
        k, v = self.keys[layer][plan.rows], self.values[layer][plan.rows, :, : self.capacity]
        mask = None if plan.mask is None else plan.mask.unsqueeze(1).to(self.dtype)
        out = F.scaled_dot_product_attention(q.to(self.dtype).unsqueeze(2), k, v, attn_mask=mask, scale=1.0)
        return out.squeeze(2).float()

    def _grow(self, wanted: int) -> None:
        for layer, old in enumerate(self.keys):
            shape = (self.rows, self.heads, self.head_dim, wanted)
            if not self.in_place:
                shape = (self.rows, self.heads, wanted, self.head_dim)
            new = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if self.capacity:
                into = new[..., : self.capacity] if self.in_place else new[:, :, : self.capacity]
                into.copy_(old)
            self.keys[layer] = new
        self.capacity = wanted
