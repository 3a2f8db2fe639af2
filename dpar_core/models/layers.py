"""The transformer block shared by every network here (Llama's, as LlamaGen uses it), and the forms attention takes.

Shapes: B images, n positions, N packed positions of all images, D width, H heads, hd head dimension, F FFN width.
A block does not know how its positions are laid out: the `attend` object it is called with does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.models.rope import Rotary, rotate

NORM_EPS = 1e-5
ALONE = 4_000_000  # squared positions times width from which on a CPU an image attends alone, see `PackedCausal`
SHORT = 192  # positions up to which the plain way is taken on a CPU, see `causal_attention`


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a weight; eps 1e-5.

    Where x and the weight have one dtype, that is one kernel; in half precision on CUDA it rounds once, at its end.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and (x.is_cuda or x.dtype == torch.float32):
            return F.rms_norm(x, (x.shape[-1],), self.weight, NORM_EPS)
        return F.rms_norm(x.float(), (x.shape[-1],), None, NORM_EPS).type_as(x) * self.weight


class Attend(Protocol):
    """How queries see keys and values: q, k, v (..., H, hd) in the caller's layout -> the same shape."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over all earlier positions and the own one: (B, H, n, hd) -> (B, H, n, hd).

    On a CPU the fused kernel's backward pass in bfloat16 takes three times as long as plain matrix products while
    sequences are short (measured; docs/log.md), so those take the plain way.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= SHORT and torch.is_grad_enabled():
        return plain_causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Do the same written out: softmax(q k / sqrt(hd)) v, the softmax in float32."""
    positions = q.shape[-2]
    later = torch.ones(positions, positions, dtype=torch.bool, device=q.device).triu(1)
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
    weights: Tensor = scores.masked_fill(later, float("-inf")).softmax(dim=-1).type_as(v)
    return weights @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over all earlier positions and the own one: (B, n, H, hd)."""
    return causal_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class PackedCausal:
    """Causal attention inside each image for positions packed without padding: (N, H, hd), and spare rows after them.

    offsets: (B + 1,) int64, where each image's positions begin.
    rows: N.
    longest: the largest count (both given, as reading them from the device would wait for it).
    limit: what no count ever exceeds, so that compiled code is the same for all batches (default: longest).

    Where the device has attention over lists of different lengths (CUDA in half precision), no row is padded or spare. On a
    CPU large images attend one after the other, without padding. Elsewhere, and for small images, whose calls cost more than
    padding in bfloat16 (docs/log.md), attention alone sees padded rows (right padding is harmless under a causal mask). All
    other layers run on the N packed rows.
    """

    def __init__(self, offsets: Tensor, *, rows: int, longest: int, limit: int | None = None) -> None:
        self.offsets, self.rows, self.longest, self.limit = offsets, rows, longest, limit or longest
        self.bounds = offsets.to(torch.int32)  # where each image's positions begin and end, as the ragged kernel reads it
        image = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff(), output_size=rows)
        within = torch.arange(rows, device=offsets.device) - offsets[:-1][image]
        self.slots_N = image * longest + within  # the row of each packed position among the padded ones
        self.kernel = _ragged_kernel() if offsets.is_cuda and _has_flash_attention(offsets.device) else None
        self.counts = offsets.diff().tolist() if offsets.device.type == "cpu" else []  # `alone` reads them, there only

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernel is not None and _fits_flash_attention(q):
            return self.ragged(q, k, v)
        return self.alone(q, k, v) if self.pays_alone(q) else self.padded(q, k, v)

    def pays_alone(self, q: Tensor) -> bool:
        """Whether images are large enough for a call each, see ALONE; compiled code stays one graph."""
        large = self.longest**2 * q.shape[-1] * q.shape[-2] >= ALONE
        return large and q.device.type == "cpu" and not torch.compiler.is_compiling()

    def alone(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let one image after the other attend to its own rows."""
        parts = zip(*(x[: self.rows].split(self.counts) for x in (q, k, v)))
        out = torch.cat([causal(*(x[None] for x in part))[0] for part in parts])
        return F.pad(out, (0, 0, 0, 0, 0, len(q) - self.rows))

    def ragged(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let every image attend to its own rows in one kernel, without padding."""
        assert self.kernel is not None
        causal_window = (-1, 0)
        bounds, limit = self.bounds, self.limit
        out: Tensor = self.kernel(q, k, v.contiguous(), bounds, bounds, limit, limit, window_size=causal_window)
        return out

    def padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Lay images side by side, as long as the longest, attend, and take the rows that are not padding."""
        images, spare = len(self.offsets) - 1, len(q) - self.rows
        packed = torch.stack((q, k, v), dim=1)[: self.rows]  # (N, 3, H, hd)
        laid = packed.new_zeros(images * self.longest, *packed.shape[1:]).index_copy(0, self.slots_N, packed)
        q, k, v = laid.view(images, self.longest, *packed.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
        out = causal_attention(q, k, v)  # (B, H, longest, hd)
        return F.pad(out.transpose(1, 2).flatten(0, 1)[self.slots_N], (0, 0, 0, 0, 0, spare))


def _ragged_kernel() -> Callable[..., Any]:
    # Imported here, as it brings torch's compiler along: a second of every start, for a kernel that only CUDA has.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def has_ragged_attention(q: Tensor) -> bool:
    """Whether torch's kernel for lists of different lengths takes this tensor: FlashAttention's conditions."""
    return q.is_cuda and _has_flash_attention(q.device) and _fits_flash_attention(q)


def _has_flash_attention(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _fits_flash_attention(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection in the order q, k, v, no biases, rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, table: Rotary, attend: Attend) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out: Tensor = self.wo(attend(rotate(q, table), rotate(k, table), v).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: W2 (silu(W1 x) * W3 x), no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """x += Wo Attn(RMS(x)); x += FFN(RMS(x)). Dropout on both branches while training."""

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, hidden)
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)
        self.dropout = dropout

    def forward(self, x: Tensor, table: Rotary, attend: Attend = causal) -> Tensor:
        """x: (..., n, D).
        table: (..., n, hd / 2), the positions of x.
        attend: see `Attend`.
        Returns x's shape.
        """
        x = x + F.dropout(self.attention(self.attention_norm(x), table, attend), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), self.dropout, self.training)


M = TypeVar("M", bound=nn.Module)


class Stack(nn.ModuleList, Generic[M]):
    """A list of modules of one type."""

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())


class LabelEmbedder(nn.Module):
    """A table of classes + 1 rows; the last is the null class, which replaces a label with some chance in training."""

    def __init__(self, num_classes: int, width: int, *, class_dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        self.class_dropout = class_dropout

    @property
    def null_label(self) -> int:
        return self.embedding_table.num_embeddings - 1

    def forward(self, labels: Tensor) -> Tensor:
        """labels: (B,) int64 in [0, classes]; returns (B, D)."""
        if self.training and self.class_dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.class_dropout
            labels = torch.where(drop, self.null_label, labels)
        embedded: Tensor = self.embedding_table(labels)
        return embedded


@torch.no_grad()
def initialize(model: nn.Module, *, output: nn.Linear) -> None:
    """Set the initial values: every Linear and Embedding N(0, 0.02), norms 1, the output layer 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    nn.init.zeros_(output.weight)
