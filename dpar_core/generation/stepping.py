"""The networks as generation runs them: one position of some rows at a time, weights laid out for that once.

Norm weights and the attention scale are folded into the matrices behind them, w1 and w3 are one product, and on the
CPU matrices are packed for oneDNN, whose float32 result for a row does not depend on how many rows there are (two or
more) nor on the number of threads. Its bfloat16 kernels do not keep that promise (with AMX the last rows of a product
come out differently), so bfloat16 on a CPU means values rounded to bfloat16 and products in float32.
What comes out equals the module's own forward pass up to rounding.

Shapes: A rows that take part, D width, H heads, hd head dimension, V codebook entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar_core.generation.kv_cache import CachePlan, KVCache
from dpar_core.models.dpar import DPAR, PatchAttention
from dpar_core.models.gpt import GPT
from dpar_core.models.layers import NORM_EPS, Block
from dpar_core.models.rope import Rotary
from dpar_core.system import is_x86

PACKED_ROWS = 2  # below this many rows oneDNN takes another kernel, with other bits
PLAIN_ROWS = 16  # the BLAS behind F.linear chooses its kernel by the number of rows (and threads): it always gets this many


def can_pack(device: torch.device) -> bool:
    """Return whether oneDNN's packed matrices are there (torch builds for x86 CPUs have them)."""
    return (
        device.type == "cpu"
        and is_x86()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class Matrix:
    """A linear layer without bias: x (A, K) float32 -> (A, N) float32, rows independent of each other to the bit (CPU).

    `dtype` is what weights and inputs are rounded to; on other devices than the CPU the product runs in it as well.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, packed: bool | None = None) -> None:
        weight = weight.detach().to(dtype).contiguous()
        self.dtype, self.on_cpu = dtype, weight.device.type == "cpu"
        self.packed = can_pack(weight.device) if packed is None else packed
        if self.on_cpu:
            weight = weight.float()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if not self.on_cpu:
            return F.linear(x, self.weight).float()
        rows, x = len(x), x.float()
        if self.packed:
            if rows < PACKED_ROWS:
                x = F.pad(x, (0, 0, 0, PACKED_ROWS - rows))
            padded: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
            return padded[:rows]
        x = F.pad(x, (0, 0, 0, -rows % PLAIN_ROWS))
        return torch.cat([F.linear(part, self.weight) for part in x.split(PLAIN_ROWS)])[:rows]


def normalized(x: Tensor) -> Tensor:
    """Return x / rms(x) without the norm's weight (folded into the matrix behind it): (A, D) float32."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPS)


def complex_table(table: Rotary) -> Tensor:
    """Turn cos, sin (..., hd / 2) into complex numbers of the same shape (zeros stay zeros)."""
    return torch.complex(table.cos.float(), table.sin.float())


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent pairs of x (A, heads, hd) float32 by a complex table (A, hd / 2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(-2)


class BlockStepper:
    """One transformer block (layers.Block) for single positions."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, ffn = block.attention, block.feed_forward
        self.heads = attention.heads
        width = attention.wo.weight.shape[0]
        scale = torch.ones(3 * width, 1, device=attention.wo.weight.device)
        scale[:width] = (width // self.heads) ** -0.5
        self.wqkv = Matrix(attention.wqkv.weight.float() * block.attention_norm.weight.float() * scale, dtype)
        self.wo = Matrix(attention.wo.weight, dtype)
        w13 = torch.cat([ffn.w1.weight, ffn.w3.weight]).float() * block.ffn_norm.weight.float()
        self.w13, self.w2 = Matrix(w13, dtype), Matrix(ffn.w2.weight, dtype)

    def __call__(self, x: Tensor, table: Tensor, cache: KVCache, layer: int, plan: CachePlan) -> Tensor:
        """x: (A, D).
        table: (A, hd / 2) complex; writes and reads layer `layer` of the cache.
        Returns (A, D).
        """
        qkv = self.wqkv(normalized(x)).unflatten(-1, (3 * self.heads, -1))  # (A, 3 H, hd)
        qk = rotate_pairs(qkv[:, : 2 * self.heads], table)
        cache.write(layer, plan, qk[:, self.heads :], qkv[:, 2 * self.heads :])
        x = x + self.wo(cache.attend(layer, plan, qk[:, : self.heads]).flatten(1))
        gate, up = self.w13(normalized(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)


class Head:
    """Final norm and output layer: (A, D) -> logits (A, V) float32."""

    def __init__(self, model: GPT | DPAR, dtype: torch.dtype) -> None:
        self.output = Matrix(model.output.weight.float() * model.norm.weight.float(), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.output(normalized(x))


class GPTStepper:
    """A GPT for single positions: the baseline (position 0 is the class) or the entropy model (position 0 is token 0)."""

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.config = model.config
        self.blocks = [BlockStepper(block, dtype) for block in model.layers]
        self.head = Head(model, dtype)
        self.tokens = model.tok_embeddings.weight.detach().float()
        conditional = model.config.num_classes is not None
        self.classes = model.cls_embedding.embedding_table.weight.detach().float() if conditional else None
        self.table = complex_table(model.rotary)

    def new_cache(self, rows: int, dtype: torch.dtype) -> KVCache:
        return KVCache(
            layers=len(self.blocks),
            rows=rows,
            heads=self.config.heads,
            head_dim=self.config.width // self.config.heads,
            limit=len(self.table),
            device=self.tokens.device,
            dtype=dtype,
        )

    def __call__(self, x: Tensor, cache: KVCache, rows: Tensor, positions: Tensor) -> Tensor:
        """Run input vectors x (A, D) of `rows` at `positions` (A,), both on the host, and return logits (A, V)."""
        plan = cache.plan(rows, positions)
        table = self.table[plan.positions]
        for layer, block in enumerate(self.blocks):
            x = block(x, table, cache, layer, plan)
        return self.head(x)


class PatchReader:
    """PatchAttention for patches that are complete: tokens' keys and values wait in a cache of their own."""

    def __init__(self, attention: PatchAttention, dtype: torch.dtype) -> None:
        self.heads = attention.heads
        width = attention.wo.weight.shape[0]
        norm_q = attention.cross_attn_norm_q.weight.float() * (width // self.heads) ** -0.5
        norm_kv = attention.cross_attn_norm_kv.weight.float()
        self.wq = Matrix(attention.wq.weight.float() * norm_q, dtype)
        self.wkv = Matrix(torch.cat([attention.wk.weight, attention.wv.weight]).float() * norm_kv, dtype)
        self.wo = Matrix(attention.wo.weight, dtype)

    def write(self, x: Tensor, cache: KVCache, layer: int, plan: CachePlan) -> None:
        """Keep keys and values of token states x (A, D)."""
        kv = self.wkv(normalized(x)).unflatten(-1, (2 * self.heads, -1))
        cache.write(layer, plan, kv[:, : self.heads], kv[:, self.heads :])

    def read(self, q: Tensor, cache: KVCache, layer: int, plan: CachePlan) -> Tensor:
        """Refine patch vectors q (A, D) by their own tokens."""
        heads = self.wq(normalized(q)).unflatten(-1, (self.heads, -1))
        return q + self.wo(cache.attend(layer, plan, heads).flatten(1))


class DPARStepper:
    """The parts of a DPAR for single tokens and single patches."""

    def __init__(self, model: DPAR, dtype: torch.dtype) -> None:
        self.config = config = model.config
        self.head_dim = config.width // config.heads
        self.encoder = [BlockStepper(block, dtype) for block in model.local_encoder.layers]
        self.readers = [PatchReader(attention, dtype) for attention in model.local_encoder.cross_attn_layers]
        self.patch_blocks = [BlockStepper(block, dtype) for block in model.layers]
        self.decoder = [BlockStepper(block, dtype) for block in model.local_decoder.layers]
        copies = [
            copy.wo.weight.float() * copy.cross_attn_norm_kv.weight.float() for copy in model.local_decoder.cross_attn_layers
        ]
        self.copies = Matrix(torch.cat(copies), dtype)  # every decoder layer's Wo RMS(h) in one product
        self.head = Head(model, dtype)
        self.tokens = model.tok_embeddings.weight.detach().float()
        self.classes = model.cls_embedding.embedding_table.weight.detach().float()
        self.start = model.decoder_start_embedding.weight.detach().float()[0]
        self.table = complex_table(model.rotary)  # start first: (1 + T, hd / 2)

    def new_cache(self, layers: int, rows: int, limit: int, dtype: torch.dtype) -> KVCache:
        return KVCache(
            layers=layers,
            rows=rows,
            heads=self.config.heads,
            head_dim=self.head_dim,
            limit=limit,
            device=self.tokens.device,
            dtype=dtype,
        )
