"""The operations of a static step as Triton kernels, for CUDA; results as static_ops.TorchOps, up to rounding.

What is fused: a norm with what is added before it, rotary positions and cache writes with attention over the cache in
place, silu with its product, guidance with sampling, entropy with the patch rule. Products of up to SMALL rows are read
once by a kernel of their own, norm, residual and silu included; larger ones go to cuBLAS.

Imported on CUDA alone, as Triton comes with torch's CUDA builds only. Shapes as in static_ops.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dpar_core.generation.sampling import filter_logits, guide
from dpar_core.generation.static_ops import Apart, LaunchPlan, Opened, StaticCache, keep_logits
from dpar_core.generation.stepping import BlockStepper, Matrix, PatchReader
from dpar_core.models.layers import NORM_EPS

if TYPE_CHECKING:
    from dpar_core.generation.static import StaticDPAR, StaticGPT

SMALL = 4  # rows up to which a product is bound by reading its matrix, and has a kernel of its own
FUSED = 0  # rows above SMALL up to which norm, residual and silu are part of the product (benchmarks/gpu.py --fused)
EPS = tl.constexpr(NORM_EPS)
LOG2E = tl.constexpr(1.4426950408889634)
LANES = tl.constexpr(128)  # tokens of the codebook in a row of a sampling tile


class Stream(NamedTuple):
    """The residual stream: x (A, D) float32, and what is still to be added to it (A, D), in the matrices' dtype."""

    x: Tensor
    pending: Tensor | None


# Kernels. Pointers first, then sizes, then constants. `x_ptr` and the like are tensors; the wrappers give their shapes.


@triton.jit
def _gemv(
    x_ptr,
    add_ptr,
    w_ptr,
    res_ptr,
    out_ptr,
    R,
    N,
    add_stride,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIR: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    RES: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """out = W norm(x + add), with SWIGLU silu(W1 .) * (W3 .), with RES added to res + add."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r0 = tl.program_id(1) * 2
    r1 = tl.minimum(r0 + 1, R - 1)
    y0 = tl.zeros([BN], tl.float32)
    y1 = tl.zeros([BN], tl.float32)
    g0 = tl.zeros([BN], tl.float32)
    g1 = tl.zeros([BN], tl.float32)
    s0 = 0.0
    s1 = 0.0
    for start in tl.static_range(0, K, BK):
        k = start + tl.arange(0, BK)
        there = k < K
        # The matrix first: everything else waits while it is under way.
        w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=there[None, :], other=0.0)
        if SWIGLU:
            w3 = tl.load(w_ptr + (n[:, None] + N) * K + k[None, :], mask=there[None, :], other=0.0)
        x0 = tl.load(x_ptr + r0 * K + k, mask=there, other=0.0).to(tl.float32)
        if ADD and not RES:
            x0 += tl.load(add_ptr + r0 * add_stride + k, mask=there, other=0.0).to(tl.float32)
        if PAIR:
            x1 = tl.load(x_ptr + r1 * K + k, mask=there, other=0.0).to(tl.float32)
            if ADD and not RES:
                x1 += tl.load(add_ptr + r1 * add_stride + k, mask=there, other=0.0).to(tl.float32)
        y0 += tl.sum(w.to(tl.float32) * x0[None, :], axis=1)
        if SWIGLU:
            g0 += tl.sum(w3.to(tl.float32) * x0[None, :], axis=1)
        if NORM:
            s0 += tl.sum(x0 * x0, axis=0)
        if PAIR:
            y1 += tl.sum(w.to(tl.float32) * x1[None, :], axis=1)
            if SWIGLU:
                g1 += tl.sum(w3.to(tl.float32) * x1[None, :], axis=1)
            if NORM:
                s1 += tl.sum(x1 * x1, axis=0)
    if NORM:
        scale0 = 1.0 / tl.sqrt(s0 / K + EPS)
        y0 *= scale0
        g0 *= scale0
    if SWIGLU:
        y0 = y0 / (1.0 + tl.exp(-y0)) * g0
    if RES:
        y0 += tl.load(res_ptr + r0 * N + n)
        if ADD:
            y0 += tl.load(add_ptr + r0 * add_stride + n).to(tl.float32)
    tl.store(out_ptr + r0 * N + n, y0)
    if PAIR:
        if NORM:
            scale1 = 1.0 / tl.sqrt(s1 / K + EPS)
            y1 *= scale1
            g1 *= scale1
        if SWIGLU:
            y1 = y1 / (1.0 + tl.exp(-y1)) * g1
        if RES:
            y1 += tl.load(res_ptr + r1 * N + n)
            if ADD:
                y1 += tl.load(add_ptr + r1 * add_stride + n).to(tl.float32)
        tl.store(out_ptr + r1 * N + n, y1)


@triton.jit
def _product(
    x_ptr,
    add_ptr,
    w_ptr,
    res_ptr,
    out_ptr,
    M,
    N,
    add_stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    RES: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Do what `_gemv` does for tiles of rows, on tensor cores: rows are rounded before their norm divides the sums."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = m[:, None].to(tl.int64)
    there = (m < M)[:, None] & (n < N)[None, :]
    y = tl.zeros([BM, BN], tl.float32)
    g = tl.zeros([BM, BN], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        known = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + row * K + k[None, :], mask=known, other=0.0)
        if NORM:
            if ADD:
                x += tl.load(add_ptr + row * add_stride + k[None, :], mask=known, other=0.0)
            squares += tl.sum(x * x, axis=1)
        at = n[None, :] * K + k[:, None]
        held = (n < N)[None, :] & (k < K)[:, None]
        w = tl.load(w_ptr + at, mask=held, other=0.0)
        x = x.to(w.dtype)
        y = tl.dot(x, w, y, input_precision="ieee")
        if SWIGLU:
            g = tl.dot(x, tl.load(w_ptr + N * K + at, mask=held, other=0.0), g, input_precision="ieee")
    if NORM:
        scale = (1.0 / tl.sqrt(squares / K + EPS))[:, None]
        y *= scale
        g *= scale
    if SWIGLU:
        y = y / (1.0 + tl.exp(-y)) * g
    if RES:
        y += tl.load(res_ptr + row * N + n[None, :], mask=there, other=0.0)
        if ADD:
            y += tl.load(add_ptr + row * add_stride + n[None, :], mask=there, other=0.0)
    tl.store(out_ptr + row * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _add_norm(
    x_ptr,
    pending_ptr,
    add_ptr,
    sum_ptr,
    out_ptr,
    D,
    add_stride,
    BD: tl.constexpr,
    PENDING: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
):
    """sum = x + pending + add; out = sum / rms(sum)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    mask = d < D
    x = tl.load(x_ptr + row * D + d, mask=mask, other=0.0)
    if PENDING:
        x += tl.load(pending_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(add_ptr + row * add_stride + d, mask=mask, other=0.0)
    if KEEP:
        tl.store(sum_ptr + row * D + d, x, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + EPS)
    tl.store(out_ptr + row * D + d, (x * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul(g_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out = silu(g[:, :N]) * g[:, N:]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    gate = tl.load(g_ptr + row * 2 * N + n, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(g_ptr + row * 2 * N + N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    qkv_ptr,
    table_ptr,
    kv_ptr,
    rows_ptr,
    slots_ptr,
    active_ptr,
    out_ptr,
    half,
    H,
    C,
    B,
    shift,
    HD: tl.constexpr,
    HDP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVE: tl.constexpr,
    PER_ROW: tl.constexpr,
    APART: tl.constexpr,
):
    """Turn q and k, write k and v at the row's slot, attend to all slots up to it: one program per row and head.

    Slots are one for all, PER_ROW one each, APART one per image, rows beyond B being the other half of the same images.
    """
    a = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, HDP)
    there = d < HD
    pair = d // 2
    other = d ^ 1
    sign = tl.where(d % 2 == 0, -1.0, 1.0)
    row = tl.load(rows_ptr + a) if ROWS else a.to(tl.int64)
    own = a % B if APART else a
    slot = tl.load(slots_ptr + (own if PER_ROW or APART else 0))
    live = tl.load(active_ptr + own) if ACTIVE else slot >= 0
    turn = a.to(tl.int64) if PER_ROW else slot + shift
    width = H * HD
    base = qkv_ptr + a.to(tl.int64) * 3 * width + h * HD
    cos = tl.load(table_ptr + turn * HD + pair * 2, mask=there, other=0.0)
    sin = tl.load(table_ptr + turn * HD + pair * 2 + 1, mask=there, other=0.0) * sign
    q = tl.load(base + d, mask=there, other=0.0).to(tl.float32) * cos
    q += tl.load(base + other, mask=there, other=0.0).to(tl.float32) * sin
    k = tl.load(base + width + d, mask=there, other=0.0).to(tl.float32) * cos
    k += tl.load(base + width + other, mask=there, other=0.0).to(tl.float32) * sin
    v = tl.load(base + 2 * width + d, mask=there, other=0.0)
    k_ptr = kv_ptr + (row * H + h) * C * HD
    v_ptr = k_ptr + half
    k = k.to(kv_ptr.dtype.element_ty)
    v = v.to(kv_ptr.dtype.element_ty)
    tl.store(k_ptr + slot * HD + d, k, mask=there & live)
    tl.store(v_ptr + slot * HD + d, v, mask=there & live)
    # Every line of a tile keeps a softmax of its own, and they are joined once at the end, so that no step of the loop
    # waits for the other warps. All start from the row's own score, which is finite.
    q = q * LOG2E
    score = tl.sum(q * k.to(tl.float32), axis=0)
    most = tl.zeros([BLOCK], tl.float32) + score
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, HDP], tl.float32)
    end = tl.where(live, slot, 0)
    for start in range(0, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        seen = (p < end)[:, None] & there[None, :]
        at = p[:, None] * HD + d[None, :]
        keys = tl.load(k_ptr + at, mask=seen, other=0.0)
        values = tl.load(v_ptr + at, mask=seen, other=0.0)
        scores = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
        scores = tl.where(p < end, scores, float("-inf"))
        new = tl.maximum(most, scores)
        old = tl.exp2(most - new)
        weights = tl.exp2(scores - new)
        total = total * old + weights
        out = out * old[:, None] + values.to(tl.float32) * weights[:, None]
        most = new
    top = tl.max(most, axis=0)
    share = tl.exp2(most - top)
    itself = tl.exp2(score - top)
    whole = tl.sum(total * share, axis=0) + itself
    result = (tl.sum(out * share[:, None], axis=0) + v.to(tl.float32) * itself) / whole
    result = tl.where(live, result, 0.0)
    tl.store(out_ptr + a.to(tl.int64) * width + h * HD + d, result.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _attend_members(
    q_ptr,
    kv_ptr,
    lanes_ptr,
    lengths_ptr,
    out_ptr,
    half,
    H,
    S,
    HD: tl.constexpr,
    HDP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Attend to the tokens of the patch that ends: one program per image and head."""
    a = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, HDP)
    there = d < HD
    row = tl.load(lanes_ptr + a) if ROWS else a.to(tl.int64)
    end = tl.load(lengths_ptr + a)
    q = tl.load(q_ptr + a.to(tl.int64) * H * HD + h * HD + d, mask=there, other=0.0).to(tl.float32)
    k_ptr = kv_ptr + (row * H + h) * S * HD
    v_ptr = k_ptr + half
    most = tl.sum(q * 0.0, axis=0) + float("-inf")
    total = tl.sum(q * 0.0, axis=0)
    out = q * 0.0
    for start in range(0, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        seen = (p < end)[:, None] & there[None, :]
        at = p[:, None] * HD + d[None, :]
        keys = tl.load(k_ptr + at, mask=seen, other=0.0).to(tl.float32)
        values = tl.load(v_ptr + at, mask=seen, other=0.0).to(tl.float32)
        scores = tl.where(p < end, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=0))
        weights = tl.exp(scores - new)
        old = tl.exp(most - new)
        total = total * old + tl.sum(weights, axis=0)
        out = out * old + tl.sum(values * weights[:, None], axis=0)
        most = new
    tl.store(out_ptr + a.to(tl.int64) * H * HD + h * HD + d, (out / total).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _embed(tokens_ptr, table_ptr, classes_ptr, position_ptr, out_ptr, B, D, BD: tl.constexpr, CLASSES: tl.constexpr):
    """out = table[tokens]; with CLASSES the class at position 0, rows beyond B being the unconditional half."""
    a = tl.program_id(0)
    d = tl.arange(0, BD)
    mask = d < D
    token = tl.load(tokens_ptr + a % B)
    x = tl.load(table_ptr + token * D + d, mask=mask, other=0.0)
    if CLASSES:  # noqa: SIM102, decided by the compiler, what follows by the kernel
        if tl.load(position_ptr) == 0:
            x = tl.load(classes_ptr + a * D + d, mask=mask, other=0.0)
    tl.store(out_ptr + a * D + d, x, mask=mask)


@triton.jit
def _take_up(
    x_ptr,
    pending_ptr,
    x1_ptr,
    pending1_ptr,
    kv_ptr,
    members_ptr,
    at_ptr,
    moves_ptr,
    first_ptr,
    state_ptr,
    peak_ptr,
    half,
    H,
    S,
    B,
    HD: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING1: tl.constexpr,
    FIRST: tl.constexpr,
    HALVES: tl.constexpr,
    APART: tl.constexpr,
):
    """Keep keys and values of a token for its patch; FIRST: also x' and the maximum. APART: of images that move."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    mask = d < D
    if APART:
        mask = mask & tl.load(moves_ptr + b)
    within = tl.load(at_ptr + (b if APART else 0)) - tl.load(first_ptr + b)
    at = ((b * H + d // HD) * S + within) * HD + d % HD
    k = tl.load(kv_ptr + b * 2 * D + d, mask=mask, other=0.0)
    v = tl.load(kv_ptr + b * 2 * D + D + d, mask=mask, other=0.0)
    tl.store(members_ptr + at, k.to(members_ptr.dtype.element_ty), mask=mask)
    tl.store(members_ptr + half + at, v.to(members_ptr.dtype.element_ty), mask=mask)
    if FIRST:
        x = tl.load(x_ptr + b * D + d, mask=mask, other=0.0)
        if PENDING:
            x += tl.load(pending_ptr + b * D + d, mask=mask, other=0.0).to(tl.float32)
        for copy in tl.static_range(HALVES):
            tl.store(state_ptr + (b + copy * B) * D + d, x, mask=mask)
        x1 = tl.load(x1_ptr + b * D + d, mask=mask, other=0.0)
        if PENDING1:
            x1 += tl.load(pending1_ptr + b * D + d, mask=mask, other=0.0).to(tl.float32)
        peak = tl.load(peak_ptr + b * D + d, mask=mask, other=0.0)
        tl.store(peak_ptr + b * D + d, tl.where(within == 0, x1, tl.maximum(peak, x1)), mask=mask)


@triton.jit
def _open(
    lanes_ptr,
    begins_ptr,
    first_ptr,
    index_ptr,
    position_ptr,
    source_ptr,
    turns_ptr,
    rows_ptr,
    slots_ptr,
    active_ptr,
    lengths_ptr,
    table_ptr,
    k,
    B,
    scratch,
    W: tl.constexpr,
    PAIRS: tl.constexpr,
    PP: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    AHEAD: tl.constexpr,
    APART: tl.constexpr,
):
    """Move an image that begins a patch on to it: its slot, rows, rotary table, and the length of the patch that ends."""
    i = tl.program_id(0)
    lane = tl.load(lanes_ptr + i) if ROWS else i.to(tl.int64)
    begins = tl.load(begins_ptr + lane)
    first = tl.load(first_ptr + lane)
    index = tl.load(index_ptr + lane)
    position = tl.load(position_ptr + (lane if APART else 0)) + AHEAD
    slot = index + 1
    if not AHEAD:
        slot = tl.where(begins, slot, scratch)
    j = tl.arange(0, PP)
    mask = j < PAIRS
    source = tl.load(source_ptr + j, mask=mask, other=0)
    last = tl.maximum(position - 1, 0) % W
    value = tl.where(source == 0, first // W, tl.where(source == 1, first % W, last))
    value = tl.where(source == 3, tl.maximum(index, 0), value)
    keep = tl.where(position == 0, 0.0, 1.0)
    cos = tl.load(turns_ptr + (value * PAIRS + j) * 2, mask=mask, other=0.0) * keep
    sin = tl.load(turns_ptr + (value * PAIRS + j) * 2 + 1, mask=mask, other=0.0) * keep
    for half in tl.static_range(HALVES):
        a = i + half * k
        tl.store(rows_ptr + a, lane + half * B)
        tl.store(slots_ptr + a, slot)
        tl.store(active_ptr + a, begins)
        tl.store(table_ptr + (a * PAIRS + j) * 2, cos, mask=mask)
        tl.store(table_ptr + (a * PAIRS + j) * 2 + 1, sin, mask=mask)
    tl.store(lengths_ptr + i, tl.maximum(position - first, 1))
    if not AHEAD:
        tl.store(first_ptr + lane, tl.where(begins, position, first))
        tl.store(index_ptr + lane, tl.where(begins, index + 1, index))
    if APART:
        tl.store(begins_ptr + lane, lane < 0)  # false: it waits no longer


@triton.jit
def _spread(
    q_ptr,
    pending_ptr,
    classes_ptr,
    position_ptr,
    out_ptr,
    k,
    D,
    BD: tl.constexpr,
    PENDING: tl.constexpr,
    CLASSES: tl.constexpr,
    APART: tl.constexpr,
):
    """The patch vectors once per half; at position 0 the classes."""
    a = tl.program_id(0)
    d = tl.arange(0, BD)
    mask = d < D
    x = tl.load(q_ptr + (a % k) * D + d, mask=mask, other=0.0)
    if PENDING:
        x += tl.load(pending_ptr + (a % k) * D + d, mask=mask, other=0.0).to(tl.float32)
    if CLASSES:  # noqa: SIM102, decided by the compiler, what follows by the kernel
        if tl.load(position_ptr + (a % k if APART else 0)) == 0:
            x = tl.load(classes_ptr + a * D + d, mask=mask, other=0.0)
    tl.store(out_ptr + a * D + d, x, mask=mask)


@triton.jit
def _keep(copies_ptr, rows_ptr, active_ptr, copied_ptr, N, BLOCK: tl.constexpr):
    """copied[rows] = copies, for rows that begin a patch."""
    a = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + a)
    live = tl.load(active_ptr + a)
    y = tl.load(copies_ptr + a.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(copied_ptr + row * N + n, y, mask=(n < N) & live)


@triton.jit
def _commit(copies_ptr, begins_ptr, copied_ptr, first_ptr, index_ptr, position_ptr, B, N, BLOCK: tl.constexpr):
    """copied = copies for rows that begin a patch, and move their images on to it."""
    a = tl.program_id(0)
    lane = a % B
    begins = tl.load(begins_ptr + lane)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (n < N) & begins
    y = tl.load(copies_ptr + a.to(tl.int64) * N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(copied_ptr + a.to(tl.int64) * N + n, y, mask=mask)
    if begins & (tl.program_id(1) == 0) & (a < B):
        tl.store(first_ptr + lane, tl.load(position_ptr) + 1)
        tl.store(index_ptr + lane, tl.load(index_ptr + lane) + 1)


@triton.jit
def _guided(logits_ptr, b, v, mask, V, scale, uncond, GUIDED: tl.constexpr):
    x = tl.load(logits_ptr + b.to(tl.int64) * V + v, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        u = tl.load(logits_ptr + (b + uncond).to(tl.int64) * V + v, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(scale == 1.0, x, u + scale * (x - u))
    return x


@triton.jit
def _sample(
    logits_ptr,
    scales_ptr,
    uniforms_ptr,
    given_ptr,
    position_ptr,
    current_ptr,
    tokens_ptr,
    kept_ptr,
    image_ptr,
    begins_ptr,
    at_ptr,
    moves_ptr,
    done_ptr,
    B,
    T,
    V,
    temperature,
    NB: tl.constexpr,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    KEEP: tl.constexpr,
    APART: tl.constexpr,
):
    """Guide, and invert the cumulative distribution: blocks of 128 tokens first, then the tokens of one block.

    APART: of images that wait for no patch and have a token left, which go on to the next.
    """
    b = tl.program_id(0)
    image = b.to(tl.int64)
    position = tl.load(position_ptr + (b if APART else 0))
    moves = b >= 0
    if APART:
        image = tl.load(image_ptr + b)
        moves = (tl.load(begins_ptr + b) == 0) & (tl.load(done_ptr + b) == 0)
    scale = tl.load(scales_ptr + position)
    v = tl.arange(0, NB)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x = _guided(logits_ptr, b, v, v < V, V, scale, B, GUIDED)
    if KEEP:
        tl.store(kept_ptr + (image * T + position) * V + v, x, mask=(v < V) & moves)
    x = tl.where(v < V, x / temperature, float("-inf"))
    most = tl.max(tl.max(x, axis=1), axis=0)
    if GREEDY:
        token = tl.min(tl.min(tl.where(x == most, v, V), axis=1), axis=0)
    else:
        sums = tl.sum(tl.exp(x - most).to(tl.float64), axis=1)
        target = tl.load(uniforms_ptr + image * T + position) * tl.sum(sums, axis=0)
        upto = tl.cumsum(sums, axis=0)
        block = tl.minimum(tl.sum((upto <= target).to(tl.int32), axis=0), NB - 1)
        before = tl.sum(tl.where(tl.arange(0, NB) < block, sums, 0.0), axis=0)
        w = block * LANES + tl.arange(0, LANES)
        y = _guided(logits_ptr, b, w, w < V, V, scale, B, GUIDED) / temperature
        e = tl.exp(tl.where(w < V, y, float("-inf")) - most)
        inside = tl.cumsum(e.to(tl.float64), axis=0) + before
        token = block * LANES + tl.sum((inside <= target).to(tl.int32), axis=0)
        # Sums in another order: never beyond the last token of the block that has a probability.
        token = tl.minimum(token, tl.max(tl.where(e > 0, w, block * LANES), axis=0))
    given = tl.load(given_ptr + image * T + position)
    token = tl.where(given >= 0, given, token.to(tl.int64))
    tl.store(current_ptr + b, token, mask=moves)
    tl.store(tokens_ptr + image * T + position, token, mask=moves)
    if APART:
        tl.store(at_ptr + b, position, mask=moves)
        tl.store(moves_ptr + b, moves)
        tl.store(done_ptr + b, moves, mask=moves & (position == T - 1))
        tl.store(position_ptr + b, position + 1, mask=moves & (position < T - 1))


@triton.jit
def _decide(
    logits_ptr,
    fixed_ptr,
    threshold_ptr,
    at_ptr,
    last_cut_ptr,
    begins_ptr,
    entropies_ptr,
    starts_ptr,
    count_ptr,
    image_ptr,
    moves_ptr,
    done_ptr,
    stride,
    V,
    NB: tl.constexpr,
    AHEAD: tl.constexpr,
    LONGEST: tl.constexpr,
    ALONE: tl.constexpr,
    APART: tl.constexpr,
):
    """Entropy of the logits, and the patch rule (static_ops.TorchOps.decide). APART: of images that move."""
    b = tl.program_id(0)
    image = b.to(tl.int64)
    at = tl.load(at_ptr + (b if APART else 0)) + AHEAD
    moves = b >= 0
    if APART:
        image = tl.load(image_ptr + b)
        moves = tl.load(moves_ptr + b) != 0
    v = tl.arange(0, NB)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x = tl.load(logits_ptr + b.to(tl.int64) * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    most = tl.max(tl.max(x, axis=1), axis=0)
    less = tl.where(v < V, x - most, 0.0)
    e = tl.where(v < V, tl.exp(less), 0.0)
    total = tl.sum(tl.sum(e, axis=1), axis=0)
    entropy = tl.log(total) - tl.sum(tl.sum(e * less, axis=1), axis=0) / total
    fixed = tl.load(fixed_ptr + at)
    last = tl.load(last_cut_ptr + b)
    if AHEAD == 0:
        certain = fixed
        if LONGEST > 0:
            certain = certain | ((at - tl.where(fixed, at, last)) % LONGEST == 0)
        entropy = tl.where(certain, float("nan"), entropy)
    gate = fixed | (entropy > tl.load(threshold_ptr))
    last = tl.where(gate, at, last)
    begins = gate
    if LONGEST > 0:
        begins = (at - last) % LONGEST == 0
    tl.store(last_cut_ptr + b, last, mask=moves)
    tl.store(entropies_ptr + image * stride + at, entropy, mask=moves)
    tl.store(starts_ptr + image * stride + at, begins, mask=moves)
    if APART:
        begins = begins & (tl.load(done_ptr + b) == 0)
    tl.store(begins_ptr + b, begins, mask=moves)
    if ALONE:
        tl.store(count_ptr, begins.to(tl.int32))


@triton.jit
def _compact(begins_ptr, lanes_ptr, count_ptr, B, BB: tl.constexpr):
    """Images that begin a patch first, in order, and how many they are."""
    i = tl.arange(0, BB)
    begins = tl.load(begins_ptr + i, mask=i < B, other=0).to(tl.int32)
    upto = tl.cumsum(begins, axis=0)
    count = tl.sum(begins, axis=0)
    rank = tl.where(begins > 0, upto - 1, count + i - upto)
    tl.store(lanes_ptr + rank, i.to(tl.int64), mask=i < B)
    tl.store(count_ptr, count)


@triton.jit
def _refill(
    image_ptr,
    position_ptr,
    first_ptr,
    index_ptr,
    last_cut_ptr,
    begins_ptr,
    done_ptr,
    fresh_ptr,
    taken_ptr,
    finished_ptr,
    total_ptr,
    count_ptr,
    T,
    B,
    BB: tl.constexpr,
):
    """Number the images that take the place of those that are done, and count the tokens that are settled."""
    b = tl.arange(0, BB)
    there = b < B
    total = tl.load(total_ptr)
    image = tl.load(image_ptr + b, mask=there, other=0)
    done = tl.load(done_ptr + b, mask=there, other=0) != 0
    free = there & done & (image < total)
    ones = free.to(tl.int64)
    taken = tl.load(taken_ptr)
    image = tl.where(free, tl.minimum(taken + tl.cumsum(ones, axis=0) - 1, total), image)
    fresh = free & (image < total)
    many = tl.sum(ones, axis=0)
    finished = tl.load(finished_ptr) + many
    tl.store(taken_ptr, taken + many)
    tl.store(finished_ptr, finished)
    tl.store(image_ptr + b, image, mask=there)
    position = tl.load(position_ptr + b, mask=there, other=0)
    position = tl.where(fresh, 0, position)
    done = done & (fresh == 0)
    zero = tl.zeros([BB], tl.int64)
    tl.store(position_ptr + b, position, mask=there)
    tl.store(first_ptr + b, zero, mask=fresh)
    tl.store(index_ptr + b, zero - 1, mask=fresh)
    tl.store(last_cut_ptr + b, zero, mask=fresh)
    tl.store(begins_ptr + b, fresh, mask=fresh)
    tl.store(done_ptr + b, done, mask=there)
    tl.store(fresh_ptr + b, fresh, mask=there)
    live = tl.where(there & (image < total), position + done.to(tl.int64), 0)
    tl.store(count_ptr, (finished * T + tl.sum(live, axis=0)).to(tl.int32))


@triton.jit
def _enter(
    fresh_ptr,
    image_ptr,
    labels_ptr,
    table_ptr,
    start_ptr,
    classes_ptr,
    state_ptr,
    B,
    D,
    BD: tl.constexpr,
    HALVES: tl.constexpr,
):
    """The class and the first state of images that have just taken a place."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    mask = (d < D) & (tl.load(fresh_ptr + b) != 0)
    label = tl.load(labels_ptr + tl.load(image_ptr + b))
    tl.store(classes_ptr + b * D + d, tl.load(table_ptr + label * D + d, mask=mask, other=0.0), mask=mask)
    start = tl.load(start_ptr + d, mask=mask, other=0.0)
    for half in tl.static_range(HALVES):
        tl.store(state_ptr + (b + half * B) * D + d, start, mask=mask)


def gemv_tile(outputs: int, columns: int, matrices: int) -> tuple[int, int, int]:
    """Choose rows and columns of a matrix that a program of `_gemv` reads, and its warps (measured, docs/gpu.md).

    One warp reads whole rows with all loads under way at once: more warps would have to wait for each other.
    """
    block_k = min(triton.next_power_of_2(columns), 4096)
    most = {4096: 1, 2048: 2, 1024: 2}.get(block_k, 4) // matrices
    return next(size for size in (4, 2, 1) if size <= max(1, most) and outputs % size == 0), block_k, 1


def product_tile(rows: int, outputs: int) -> tuple[int, int, int]:
    """Choose rows, outputs and columns of a tile of `_product`: the most that still gives every SM one (not measured)."""
    for rows_of_tile, outputs_of_tile in ((64, 64), (64, 32), (32, 32)):
        if -(-rows // rows_of_tile) * -(-outputs // outputs_of_tile) >= 132:
            return rows_of_tile, outputs_of_tile, 64
    return (16 if rows <= 16 else 32), 32, 128


def attend_tile(programs: int, positions: int) -> tuple[int, int]:
    """Choose positions that a program of `_attend` reads at a time, and its warps (measured, docs/gpu.md).

    Few programs read all positions at once; many leave each to one warp, which never waits for another.
    """
    return (min(256, triton.next_power_of_2(positions)), 8) if programs < 264 else (16, 1)


class TritonOps:
    """The operations as Triton kernels. launches: how many kernels were launched, or captured, so far."""

    def __init__(self) -> None:
        self.launches = 0
        self.float_logits = True  # of torch.mm with out_dtype, tried once

    def go(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel."""
        self.launches += 1
        kernel[grid](*arguments, **constants)

    def linear(self, h: Tensor, matrix: Matrix) -> Tensor:
        self.launches += 1
        return F.linear(h, matrix.weight)

    def fused(
        self,
        matrix: Matrix,
        x: Tensor,
        *,
        norm: bool = False,
        add: Tensor | None = None,
        res: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor:
        """Multiply in one kernel with all around it: x (A, K) -> (A, N), see `_gemv` and `_product`.

        The result is in float32 for few rows and where it is the stream (res), else in the dtype of the matrix.
        """
        weight = matrix.weight
        rows, columns = len(x), weight.shape[1]
        outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
        dtype = torch.float32 if rows <= SMALL or res is not None else weight.dtype
        out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
        if rows > SMALL:
            block_m, block_n, block_k = product_tile(rows, outputs)
            self.go(
                _product,
                (-(-rows // block_m), -(-outputs // block_n)),
                x,
                x if add is None else add,
                weight,
                x if res is None else res,
                out,
                rows,
                outputs,
                0 if add is None else add.stride(0),
                K=columns,
                BM=block_m,
                BN=block_n,
                BK=block_k,
                NORM=norm,
                ADD=add is not None,
                RES=res is not None,
                SWIGLU=swiglu,
                num_warps=4,
                num_stages=4,
            )
            return out
        block_n, block_k, warps = gemv_tile(outputs, columns, 2 if swiglu else 1)
        self.go(
            _gemv,
            (outputs // block_n, -(-rows // 2)),
            x,
            x if add is None else add,
            weight,
            x if res is None else res,
            out,
            rows,
            outputs,
            0 if add is None else add.stride(0),
            K=columns,
            BN=block_n,
            BK=block_k,
            PAIR=rows > 1,
            NORM=norm,
            ADD=add is not None,
            RES=res is not None,
            SWIGLU=swiglu,
            num_warps=warps,
        )
        return out

    def add_norm(self, stream: Stream, dtype: torch.dtype, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the stream with all that is to be added, and the same normalized, in the matrices' dtype."""
        x, pending = stream
        keep = pending is not None or add is not None
        total = torch.empty_like(x) if keep else x
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.go(
            _add_norm,
            (len(x),),
            x,
            x if pending is None else pending,
            x if add is None else add,
            total,
            out,
            x.shape[1],
            0 if add is None else add.stride(0),
            BD=triton.next_power_of_2(x.shape[1]),
            PENDING=pending is not None,
            ADD=add is not None,
            KEEP=keep,
            num_warps=4,
        )
        return total, out

    def project(self, matrix: Matrix, x: Stream | Tensor) -> Tensor:
        stream = _stream(x)
        large = matrix.weight.shape[0] >= 4 * matrix.weight.shape[1]
        if fuses(stream) and not (large and len(stream.x) > SMALL):
            return self.fused(matrix, stream.x, norm=True)
        _, h = self.add_norm(stream, matrix.weight.dtype)
        if large and matrix.dtype != torch.float32 and self.float_logits:
            try:
                self.launches += 1
                return torch.mm(h, matrix.weight.t(), out_dtype=torch.float32)
            except (TypeError, RuntimeError):
                self.float_logits = False
        return self.linear(h, matrix)

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return self._embed(table, tokens, len(tokens), table, tokens, classes=False)

    def embed_or_class(self, engine: StaticGPT, halves: int) -> Tensor:
        rows = halves * engine.images
        return self._embed(engine.stepper.tokens, engine.current, rows, engine.classes, engine.position, classes=True)

    def _embed(
        self, table: Tensor, tokens: Tensor, rows: int, class_vectors: Tensor, position: Tensor, *, classes: bool
    ) -> Tensor:
        width = table.shape[1]
        out = torch.empty(rows, width, dtype=torch.float32, device=table.device)
        self.go(
            _embed,
            (rows,),
            tokens,
            table,
            class_vectors,
            position,
            out,
            len(tokens),
            width,
            BD=triton.next_power_of_2(width),
            CLASSES=classes,
        )
        return out

    def placed(
        self,
        cache: StaticCache,
        slots: Tensor,
        table: Tensor,
        *,
        shift: int,
        halves: int = 1,
        moves: Tensor | None = None,
    ) -> LaunchPlan:
        return LaunchPlan(slots, table, shift, active=moves)

    def attend(self, qkv: Tensor, cache: StaticCache, layer: int, plan: LaunchPlan, dtype: torch.dtype) -> Tensor:
        """Attend in the cache: qkv (A, 3 D) as the product gives it -> (A, D) in dtype."""
        held = cache.layers[layer]
        _, _, heads, positions, head_dim = held.shape
        rows = len(qkv)
        out = torch.empty(rows, heads * head_dim, dtype=dtype, device=qkv.device)
        block, warps = attend_tile(rows * heads, positions)
        per_row = plan.shift is None
        self.go(
            _attend,
            (rows, heads),
            qkv,
            plan.table,
            held,
            plan.slots if plan.rows is None else plan.rows,
            plan.slots,
            plan.slots if plan.active is None else plan.active,
            out,
            held.stride(0),
            heads,
            positions,
            len(plan.slots),
            plan.shift or 0,
            HD=head_dim,
            HDP=triton.next_power_of_2(head_dim),
            BLOCK=block,
            ROWS=plan.rows is not None,
            ACTIVE=plan.active is not None,
            PER_ROW=per_row,
            APART=not per_row and len(plan.slots) > 1,
            num_warps=warps,
        )
        return out

    def block(
        self,
        block: BlockStepper,
        x: Stream | Tensor,
        cache: StaticCache,
        layer: int,
        plan: LaunchPlan,
        add: Tensor | None = None,
    ) -> Stream:
        stream = _stream(x)
        dtype = block.wqkv.weight.dtype
        if fuses(stream):
            x = stream.x
            qkv = self.fused(block.wqkv, x, norm=True, add=add)
            out = self.attend(qkv, cache, layer, plan, qkv.dtype)
            x = self.fused(block.wo, out, res=x, add=add)
            out = self.fused(block.w13, x, norm=True, swiglu=True)
            return Stream(self.fused(block.w2, out, res=x), None)
        x, h = self.add_norm(stream, dtype, add)
        out = self.attend(self.linear(h, block.wqkv), cache, layer, plan, dtype)
        x, h = self.add_norm(Stream(x, self.linear(out, block.wo)), dtype)
        gates = self.linear(h, block.w13)
        hidden = gates.shape[1] // 2
        out = torch.empty(len(x), hidden, dtype=dtype, device=x.device)
        self.go(_silu_mul, (len(x), -(-hidden // 1024)), gates, out, hidden, BLOCK=1024, num_warps=4)
        return Stream(x, self.linear(out, block.w2))

    def take_up(self, engine: StaticDPAR, x: Stream | Tensor, first_x: Stream | Tensor, members: list[Tensor]) -> None:
        last, first = _stream(x), _stream(first_x)
        for layer, (kv, held) in enumerate(zip(members, engine.members.layers)):
            _, _, heads, positions, head_dim = held.shape
            width = heads * head_dim
            self.go(
                _take_up,
                (len(kv),),
                last.x,
                last.x if last.pending is None else last.pending,
                first.x,
                first.x if first.pending is None else first.pending,
                kv,
                held,
                engine.last_token,
                engine.first if engine.moves is None else engine.moves,
                engine.first,
                engine.state,
                engine.peak,
                held.stride(0),
                heads,
                positions,
                engine.images,
                HD=head_dim,
                D=width,
                BD=triton.next_power_of_2(width),
                PENDING=last.pending is not None,
                PENDING1=first.pending is not None,
                FIRST=layer == 0,
                HALVES=engine.halves,
                APART=engine.apart is not None,
            )

    def open(self, engine: StaticDPAR, count: int, halves: int, *, ahead: bool) -> Opened:
        device, pairs = engine.device, len(engine.pair)
        lanes = None if count == engine.images else engine.lanes
        rows = torch.empty(halves * count, dtype=torch.int64, device=device)
        slots, active = torch.empty_like(rows), torch.empty(halves * count, dtype=torch.bool, device=device)
        lengths = torch.empty(count, dtype=torch.int64, device=device)
        table = torch.empty(halves * count, pairs, 2, device=device)
        self.go(
            _open,
            (count,),
            engine.lanes,
            engine.begins,
            engine.first,
            engine.index,
            engine.position,
            engine.turn_source,
            engine.turns,
            rows,
            slots,
            active,
            lengths,
            table,
            count,
            engine.images,
            engine.scratch,
            W=engine.config.row_width,
            PAIRS=pairs,
            PP=triton.next_power_of_2(pairs),
            ROWS=lanes is not None,
            HALVES=halves,
            AHEAD=int(ahead),
            APART=engine.apart is not None,
            num_warps=1,  # no warp loads what another has stored
        )
        plan = LaunchPlan(slots, table, None, rows, None if ahead else active)
        return Opened(lanes, active[:count], lengths, plan, lanes is None and not ahead)

    def pooled(self, engine: StaticDPAR, opened: Opened) -> Tensor:
        if opened.lanes is None:
            return engine.peak
        self.launches += 1
        return engine.peak.index_select(0, opened.lanes[: len(opened.lengths)])

    def read(self, reader: PatchReader, q: Stream | Tensor, engine: StaticDPAR, layer: int, opened: Opened) -> Stream:
        stream = _stream(q)
        held = engine.members.layers[layer]
        _, _, heads, positions, head_dim = held.shape
        dtype = reader.wo.weight.dtype
        small = fuses(stream)
        if small:
            total, query = stream.x, self.fused(reader.wq, stream.x, norm=True)
        else:
            total, h = self.add_norm(stream, dtype)
            query = self.linear(h, reader.wq)
        out = torch.empty(query.shape, dtype=query.dtype if small else dtype, device=query.device)
        lanes = opened.lengths if opened.lanes is None else opened.lanes
        self.go(
            _attend_members,
            (len(query), heads),
            query,
            held,
            lanes,
            opened.lengths,
            out,
            held.stride(0),
            heads,
            positions,
            HD=head_dim,
            HDP=triton.next_power_of_2(head_dim),
            BLOCK=min(triton.next_power_of_2(positions), 32),
            ROWS=opened.lanes is not None,
            num_warps=1,
        )
        if small:
            return Stream(self.fused(reader.wo, out, res=total), None)
        return Stream(total, self.linear(out, reader.wo))

    def spread(self, engine: StaticDPAR, patches: Stream | Tensor, opened: Opened, halves: int) -> Tensor:
        x, pending = _stream(patches)
        count, width = x.shape
        out = torch.empty(halves * count, width, dtype=torch.float32, device=x.device)
        self.go(
            _spread,
            (halves * count,),
            x,
            x if pending is None else pending,
            engine.classes,
            engine.position,
            out,
            count,
            width,
            BD=triton.next_power_of_2(width),
            PENDING=pending is not None,
            CLASSES=opened.may_be_first,
            APART=engine.apart is not None,
        )
        return out

    def keep_copies(self, engine: StaticDPAR, copies: Tensor, opened: Opened, halves: int) -> None:
        rows, width = copies.shape
        assert opened.plan.rows is not None and opened.plan.active is not None
        self.go(
            _keep,
            (rows, -(-width // 1024)),
            copies,
            opened.plan.rows,
            opened.plan.active,
            engine.copied,
            width,
            BLOCK=1024,
        )

    def commit(self, engine: StaticDPAR, copies: Tensor, halves: int) -> None:
        rows, width = copies.shape
        self.go(
            _commit,
            (rows, -(-width // 1024)),
            copies,
            engine.begins,
            engine.copied,
            engine.first,
            engine.index,
            engine.position,
            engine.images,
            width,
            BLOCK=1024,
        )

    def sample(self, engine: StaticDPAR | StaticGPT, logits: Tensor, halves: int) -> None:
        settings, kept = engine.settings, engine.logits
        temperature, guided = settings.temperature, halves == 2
        codes = logits.shape[1]
        filtered = not settings.greedy and (0 < settings.top_k < codes or settings.top_p < 1)
        apart, unused = engine.apart, engine.current
        if filtered:
            if guided:
                scale = engine.scales.index_select(0, engine.position)
                logits = guide(logits[: engine.images].float(), logits[engine.images :].float(), scale)
            if apart and kept is not None:
                torch.logical_not(apart.begins | apart.done, out=apart.moves)
            keep_logits(engine, logits.float())
            logits = filter_logits(logits, temperature=temperature, top_k=settings.top_k, top_p=settings.top_p)
            temperature, guided = 1.0, False
        keep = kept is not None and not filtered
        self.go(
            _sample,
            (engine.images,),
            logits,
            engine.scales,
            engine.uniforms,
            engine.given,
            engine.position,
            engine.current,
            engine.tokens,
            kept if keep else logits,
            engine.image,
            apart.begins if apart else unused,
            apart.at if apart else unused,
            apart.moves if apart else unused,
            apart.done if apart else unused,
            engine.images,
            engine.length,
            codes,
            float(temperature),
            NB=triton.next_power_of_2(-(-codes // 128)),
            GUIDED=guided,
            GREEDY=settings.greedy,
            KEEP=keep,
            APART=apart is not None,
            num_warps=16 if codes > 4096 else 4,
        )

    def decide(self, engine: StaticDPAR, logits: Tensor | None, ahead: int) -> None:
        assert logits is not None  # without entropies the host knows where patches begin
        images, codes, apart = engine.images, logits.shape[1], engine.apart
        self.go(
            _decide,
            (images,),
            logits,
            engine.fixed,
            engine.threshold,
            engine.last_token,
            engine.last_cut,
            engine.begins,
            engine.entropies,
            engine.starts,
            engine.count,
            engine.image,
            apart.moves if apart else engine.begins,
            apart.done if apart else engine.begins,
            engine.entropies.shape[1],
            codes,
            NB=triton.next_power_of_2(-(-codes // 128)),
            AHEAD=ahead,
            LONGEST=engine.rule.max_patch_length or 0,
            ALONE=images == 1 and apart is None,
            APART=apart is not None,
            num_warps=16 if codes > 4096 else 4,
        )
        if engine.reads_count and images > 1:
            block = triton.next_power_of_2(images)
            self.go(_compact, (1,), engine.begins, engine.lanes, engine.count, images, BB=block, num_warps=4)

    def refill(self, engine: StaticDPAR, apart: Apart) -> None:
        images, width = engine.images, engine.config.width
        fresh = torch.empty_like(apart.done)
        self.go(
            _refill,
            (1,),
            engine.image,
            engine.position,
            engine.first,
            engine.index,
            engine.last_cut,
            engine.begins,
            apart.done,
            fresh,
            apart.taken,
            apart.finished,
            apart.total,
            engine.count,
            engine.length,
            images,
            BB=triton.next_power_of_2(images),
            num_warps=4,
        )
        self.go(
            _enter,
            (images,),
            fresh,
            engine.image,
            apart.labels,
            engine.stepper.classes,
            engine.stepper.start,
            engine.classes,
            engine.state,
            images,
            width,
            BD=triton.next_power_of_2(width),
            HALVES=engine.halves,
        )


def fuses(stream: Stream) -> bool:
    """Whether the products of these rows have kernels of their own, with all around them inside."""
    return stream.pending is None and len(stream.x) <= max(SMALL, FUSED)


def _stream(x: Stream | Tensor) -> Stream:
    return x if isinstance(x, Stream) else Stream(x, None)
