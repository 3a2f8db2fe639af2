"""DPAR: the paper's figure in one file (arXiv 2512.21867, Sec. 3).

tokens -> patch encoder -> one vector per patch -> patch transformer, one step per patch -> patch decoder -> next token.

Shapes: B images, T tokens per image (G x G raster), V codebook entries, D width, H heads, hd head dimension;
M_b patches of image b, P = sum of M_b packed rows, K = P - B complete patches (the last patch of an image is never
needed as input), S longest patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.models.configs import DPARConfig as DPARConfig
from dpar_core.models.layers import Block, LabelEmbedder, PackedCausal, RMSNorm, Stack, initialize
from dpar_core.models.loss import output_loss
from dpar_core.models.rope import Rotary, patch_rotary, token_rotary
from dpar_core.patches.layout import PatchLayout

LONGEST_GATHERED = 8  # patches up to this long are pooled as (K, S) rows, longer ones as segments
ROWS_MULTIPLE = 16  # on a CPU, packed rows are rounded up to this, see `spare_rows`


def spare_rows(rows: int, device: torch.device) -> int:
    """Return how many rows to add to a packed list so that few shapes occur.

    oneDNN builds and keeps a kernel for every new shape, and packed batches hardly ever have the same number of rows
    twice: without this, a training step on a CPU slows down by a sixth over a few hundred steps (docs/log.md).
    """
    return -rows % ROWS_MULTIPLE if device.type == "cpu" else 0


class PatchAttention(nn.Module):
    """q += Wo MHA(RMS(q), RMS(x)) where a patch sees its own tokens alone; no rotary positions, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.cross_attn_norm_q = RMSNorm(width)
        self.cross_attn_norm_kv = RMSNorm(width)
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, q_KD: Tensor | None, x_BnD: Tensor, pool: _Gathered | _Segments) -> Tensor:
        """Let patches read their tokens x: vectors q (K, D), or without any the maxima of the tokens -> (K, D)."""
        return pool.refine(self, pool.maximum(x_BnD) if q_KD is None else q_KD, x_BnD)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (..., D) token states -> k, v: (..., D)."""
        normed = self.cross_attn_norm_kv(x)
        return self.wk(normed), self.wv(normed)

    def attend(self, q_KD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask: Tensor) -> Tensor:
        """Add what each patch reads from its own tokens: q (K, D), k and v (K, S, D), mask (K, S) -> (K, D)."""
        q = self.wq(self.cross_attn_norm_q(q_KD)).unflatten(-1, (self.heads, -1))  # (K, H, hd)
        k, v = k_KSD.unflatten(-1, (self.heads, -1)), v_KSD.unflatten(-1, (self.heads, -1))
        scores = (q.unsqueeze(1) * k).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5  # (K, S, H)
        weights = scores.masked_fill(~mask.unsqueeze(-1), float("-inf")).softmax(dim=1).type_as(v)
        read: Tensor = self.wo((weights.unsqueeze(-1) * v).sum(1).flatten(-2))
        return q_KD + read

    def attend_segments(self, q_KD: Tensor, k_UD: Tensor, v_UD: Tensor, patch_U: Tensor) -> Tensor:
        """Do what `attend` does for tokens in a flat list: k, v (U, D), patch_U (U,) the patch of each -> (K, D)."""
        q = self.wq(self.cross_attn_norm_q(q_KD)).unflatten(-1, (self.heads, -1))
        k, v = k_UD.unflatten(-1, (self.heads, -1)), v_UD.unflatten(-1, (self.heads, -1))
        scores = (F.embedding(patch_U, q.flatten(1)).view_as(k) * k).sum(-1, dtype=torch.float32) * k.shape[-1] ** -0.5
        peak = segment_max(scores.detach(), patch_U, len(q_KD))
        weights = (scores - peak[patch_U]).exp()  # (U, H)
        total = torch.zeros_like(peak).index_add(0, patch_U, weights)
        weighted = (weights / total[patch_U]).unsqueeze(-1) * v.float()
        read = torch.zeros(len(q_KD), *v.shape[1:], device=v.device).index_add(0, patch_U, weighted)
        added: Tensor = self.wo(read.flatten(-2).type_as(v))
        return q_KD + added


def segment_max(x_UD: Tensor, segment_U: Tensor, segments: int) -> Tensor:
    """Return the element-wise maximum of the rows of each segment: (segments, D)."""
    index = segment_U[:, None].expand_as(x_UD)
    return x_UD.new_full((segments, x_UD.shape[1]), float("-inf")).scatter_reduce(0, index, x_UD, "amax")


class CopyPatch(nn.Module):
    """y_t += Wo RMS(h_p) for every token t of patch p, the copy operation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_attn_norm_kv = RMSNorm(width)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, y_BnD: Tensor, h_PD: Tensor, patch_ids: Tensor, slots: Slots | None) -> Tensor:
        """Add to token states what each reads from its patch; patch_ids: (B, n); slots: where `spread` can use them."""
        added = self.wo(self.cross_attn_norm_kv(h_PD))
        if slots is None or not torch.compiler.is_compiling():  # eager, rows of slots move more bytes than sorting costs
            return y_BnD + F.embedding(patch_ids, added)
        return y_BnD + spread(added, patch_ids, slots)


class LocalEncoder(nn.Module):
    """Blocks over all tokens, and after each a refinement of the patch vectors."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        width, heads, count = config.width, config.heads, config.encoder_layers
        self.layers = Stack[Block](Block(width, heads, config.hidden) for _ in range(count))
        self.cross_attn_layers = Stack[PatchAttention](PatchAttention(width, heads) for _ in range(count))


class LocalDecoder(nn.Module):
    """Before each block over all tokens, the state of the patch that holds the token."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        width, heads, count = config.width, config.heads, config.decoder_layers
        self.layers = Stack[Block](Block(width, heads, config.hidden) for _ in range(count))
        self.cross_attn_layers = Stack[CopyPatch](CopyPatch(width) for _ in range(count))


class DPAR(nn.Module):
    """Class-conditional autoregressive model whose large transformer steps once per patch."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        self.config = config
        head_dim = config.width // config.heads
        self.cls_embedding = LabelEmbedder(config.num_classes, config.width, class_dropout=config.class_dropout)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.local_encoder = LocalEncoder(config)
        self.layers = Stack[Block](
            Block(config.width, config.heads, config.hidden, dropout=config.dropout) for _ in range(config.patch_layers)
        )
        self.decoder_start_embedding = nn.Embedding(1, config.width)
        self.local_decoder = LocalDecoder(config)
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        table = token_rotary(config.row_width, head_dim, leading=1)
        self.register_buffer("rotary_cos", table.cos, persistent=False)
        self.register_buffer("rotary_sin", table.sin, persistent=False)
        initialize(self, output=self.output)

    rotary_cos: Tensor
    rotary_sin: Tensor

    @property
    def rotary(self) -> Rotary:
        """The decoder's table, start vector first: (1 + T, hd / 2); the encoder's is the same without the start."""
        return Rotary(self.rotary_cos, self.rotary_sin)

    @property
    def packed_blocks(self) -> list[nn.Module]:
        """The modules that see packed rows, of which every batch has another number."""
        return [*self.local_encoder.cross_attn_layers, *self.layers, *self.local_decoder.cross_attn_layers]

    def forward(self, tokens: Tensor, labels: Tensor, layout: PatchLayout, *, targets: Tensor | None = None) -> Tensor:
        """Predict every token from the tokens before it.

        tokens: (B, n) or (B, n - 1) int64 for a layout over n <= T tokens (the last one is never read).
        labels: (B,) int64 in [0, classes].
        layout: the patches of the n tokens.
        Returns logits (B, n, V), where position t predicts token t; with targets, (B, n) int64, their mean cross-entropy in
        nats per token instead: () float32.
        """
        fed = tokens[:, : layout.tokens - 1]
        x_BnD, patches_KD = self.encode(fed, layout)
        h_PD = self.transform_patches(patches_KD, labels, layout)
        y = self.norm(self.decode(x_BnD, h_PD, layout))
        return self.output(y) if targets is None else output_loss(y, self.output.weight, targets)

    def encode(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """Return the token states x' (B, n, D) and the vectors of the complete patches (K, D).

        Rows past K, if any, hold nothing (see `spare_rows`).
        """
        x = self.tok_embeddings(tokens)
        table = self.rotary.at(slice(1, 1 + x.shape[1]))
        pool = _Gathered(layout, x.shape[1]) if layout.longest <= LONGEST_GATHERED else _Segments(layout, x.shape[1])
        patches: Tensor | None = None
        for block, attention in zip(self.local_encoder.layers, self.local_encoder.cross_attn_layers):
            x = block(x, table)
            patches = attention(patches, x, pool)
        assert patches is not None, "the encoder has a layer"
        return x, patches

    def transform_patches(self, patches_KD: Tensor, labels: Tensor, layout: PatchLayout) -> Tensor:
        """Run [class, P_0, P_1, ...] of every image through the patch transformer; row k serves patch k: (P, D).

        Rows past P, if any, hold nothing (see `spare_rows`).
        """
        classes = self.cls_embedding(labels)
        first = layout.offsets[:-1]
        # Row 0 of an image is its class and row k its patch k - 1, so each complete patch moves up by one row.
        ids, spare = _complete(layout), spare_rows(layout.patches, classes.device)
        x: Tensor = classes.new_zeros(layout.patches + spare, classes.shape[1]).index_copy(0, first, classes)
        x = x.index_copy(0, ids + 1, patches_KD[: len(ids)].type_as(x))
        x = F.dropout(x, self.config.dropout, self.training)
        table = Rotary(*(F.pad(part, (0, 0, 0, spare)) for part in self.patch_table(layout)))
        attend = PackedCausal(layout.offsets, rows=layout.patches, longest=layout.most_patches, limit=layout.tokens)
        for block in self.layers:
            x = block(x, table, attend)
        return x

    def patch_table(self, layout: PatchLayout) -> Rotary:
        """Return the rotary table of the packed rows [class, P_0, ...] of every image: (P, hd / 2)."""
        head_dim = self.config.width // self.config.heads
        table = patch_rotary(
            layout.rows,
            layout.first_cols,
            layout.last_cols,
            layout.index,
            head_dim,
            encoding=self.config.position_encoding,
        )
        keep = torch.ones(layout.patches, 1, device=layout.offsets.device)
        keep[layout.offsets[:-1]] = 0
        return Rotary(table.cos.roll(1, 0) * keep, table.sin.roll(1, 0) * keep)

    def decode(self, x_BnD: Tensor, h_PD: Tensor, layout: PatchLayout) -> Tensor:
        """Run [start, x'_0, ...] through the patch decoder: (B, n, D) before the final norm."""
        start = self.decoder_start_embedding.weight.expand(layout.images, 1, -1)
        y = torch.cat([start.type_as(x_BnD), x_BnD], dim=1)
        table = self.rotary.at(slice(y.shape[1]))
        slots = copy_slots(layout)
        for block, copy in zip(self.local_decoder.layers, self.local_decoder.cross_attn_layers):
            y = block(copy(y, h_PD, layout.patch_ids, slots), table)
        return y


def _complete(layout: PatchLayout) -> Tensor:
    """Packed numbers of all patches but the last of each image: (K,) int64."""
    keep = torch.ones(layout.patches, dtype=torch.bool, device=layout.offsets.device)
    keep[layout.offsets[1:] - 1] = False
    # K is known without asking the device, so this does not wait for it.
    return torch.nonzero_static(keep, size=layout.patches - layout.images).flatten()


class Slots(NamedTuple):
    """The tokens of some patches as rows of S slots; a short patch has its first token in the slots left over.

    token_KS: (K, S) int64, place of each slot's token among all n tokens of all images.
    mask_KS: (K, S) bool, False where a slot is left over.
    """

    token_KS: Tensor
    mask_KS: Tensor

    @staticmethod
    def of(layout: PatchLayout, patches_K: Tensor, *, tokens: int | None = None) -> Slots:
        """Lay out the patches with these numbers, in images of `tokens` tokens (default: the layout's)."""
        image = torch.searchsorted(layout.offsets, patches_K, right=True) - 1
        within = torch.arange(layout.longest, device=patches_K.device)
        mask = within < layout.lengths[patches_K, None]
        first = image * (layout.tokens if tokens is None else tokens) + layout.starts[patches_K]
        return Slots(first[:, None] + torch.where(mask, within, 0), mask)


class _Spread(torch.autograd.Function):
    """Rows of patches for their tokens. To sum, an embedding sorts all numbers backward; here they are rows already."""

    @staticmethod
    def forward(ctx: Any, h_PD: Tensor, patch_ids: Tensor, token_PS: Tensor, mask_PS: Tensor) -> Tensor:
        ctx.save_for_backward(token_PS, mask_PS)
        ctx.rows = len(h_PD)
        return F.embedding(patch_ids, h_PD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        token_PS, mask_PS = ctx.saved_tensors
        grads_PSD = F.embedding(token_PS, grad.flatten(0, 1)).masked_fill(~mask_PS.unsqueeze(-1), 0)
        return F.pad(grads_PSD.sum(1), (0, 0, 0, ctx.rows - len(token_PS))), None, None, None


def spread(h_PD: Tensor, patch_ids: Tensor, slots: Slots) -> Tensor:
    """Return the row of its patch for every token, as F.embedding does: h (P, D), patch_ids (B, n) -> (B, n, D).

    slots: of all P patches; their tokens are summed in the backward pass. h may have spare rows after P.
    """
    apply: Callable[..., Tensor] = _Spread.apply
    return apply(h_PD, patch_ids, *slots)


def copy_slots(layout: PatchLayout) -> Slots | None:
    """Return the slots of all patches for `spread`, or None where an embedding serves better.

    That is for long patches, and on a CPU, where its backward pass does not sort (and rounds every sum in bfloat16).
    """
    device = layout.offsets.device
    if layout.longest > LONGEST_GATHERED or device.type == "cpu":
        return None
    return Slots.of(layout, torch.arange(layout.patches, device=device))


class _Collect(torch.autograd.Function):
    """Rows of tokens by slots. No two slots that count hold the same token, so the backward pass is a look-up as well."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_KS: Tensor, slot_N: Tensor) -> Tensor:
        ctx.save_for_backward(slot_N)
        return F.embedding(token_KS, x_ND)

    @staticmethod
    def backward(ctx: Any, grad_KSD: Tensor) -> tuple[Tensor, None, None]:
        (slot_N,) = ctx.saved_tensors
        found = F.embedding(slot_N.clamp(min=0), grad_KSD.flatten(0, 1))
        return found.masked_fill(slot_N.unsqueeze(-1) < 0, 0), None, None


class _Gathered:
    """Pooling over the tokens of each complete patch, gathered to (K, S) rows; for short patches.

    slot_N: for every token the number of its slot, -1 in the last patch of an image.
    """

    def __init__(self, layout: PatchLayout, tokens: int) -> None:
        ids = _complete(layout)
        token, mask = Slots.of(layout, ids, tokens=tokens)
        patch = layout.patch_ids[:, :tokens]
        image = torch.arange(layout.images, device=ids.device)[:, None]  # one patch of every earlier image is left out
        slot = (patch - image) * layout.longest + torch.arange(tokens, device=ids.device) - layout.starts[patch]
        self.slot_N = torch.where(patch < layout.offsets[1:, None] - 1, slot, -1).flatten()
        spare = spare_rows(len(ids), ids.device)  # each is a patch of the first token
        self.token, self.mask = F.pad(token, (0, 0, 0, spare)), F.pad(mask, (0, 0, 0, spare))
        self.mask[len(ids) :, 0] = True

    def _gather(self, x: Tensor) -> Tensor:
        apply: Callable[..., Tensor] = _Collect.apply
        return apply(x.flatten(0, 1), self.token, self.slot_N)

    def maximum(self, x_BnD: Tensor) -> Tensor:
        return self._gather(x_BnD).masked_fill(~self.mask.unsqueeze(-1), float("-inf")).amax(dim=1)

    def refine(self, attention: PatchAttention, patches_KD: Tensor, x_BnD: Tensor) -> Tensor:
        k, v = attention.keys_values(x_BnD)
        return attention.attend(patches_KD, self._gather(k), self._gather(v), self.mask)


class _Segments:
    """Pooling over the tokens of each complete patch as segments of the flat token list; for patches of any length."""

    def __init__(self, layout: PatchLayout, tokens: int) -> None:
        ids = layout.patch_ids[:, :tokens]
        image = torch.arange(layout.images, device=ids.device)[:, None]
        complete = (ids < layout.offsets[1:, None] - 1).flatten()
        self.used = torch.nonzero_static(complete, size=layout.complete_tokens).flatten()
        self.patch = (ids - image).flatten()[self.used]  # one patch of every earlier image is left out
        self.patches = layout.patches - layout.images

    def maximum(self, x_BnD: Tensor) -> Tensor:
        return segment_max(x_BnD.flatten(0, 1)[self.used], self.patch, self.patches)

    def refine(self, attention: PatchAttention, patches_KD: Tensor, x_BnD: Tensor) -> Tensor:
        k, v = attention.keys_values(x_BnD.flatten(0, 1)[self.used])
        return attention.attend_segments(patches_KD, k, v, self.patch)
