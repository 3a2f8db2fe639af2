"""Cross-entropy of the output layer without all logits at once.

Shapes: N positions, D width, V codebook entries. At size B a micro-batch of 32 images has 8,192 positions of 16,384 logits:
0.5 GB in float32, of which plain PyTorch keeps several copies. Here rows are taken a block at a time, and the gradients of
a block are computed while its logits are at hand, so none are kept or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 2**25  # 2,048 positions of 16,384 codes, 128 MB in float32; batches below it are one block


def output_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per token, of logits x W^T: () float32.

    x: (..., D) states after the last norm.
    weight: (V, D) of the output layer.
    targets: (...) int64 in [0, V).

    Under autocast the product is computed in its precision, the softmax always in float32. A batch of at most LOGITS_AT_ONCE
    logits takes F.cross_entropy, a larger one gives the same up to rounding.
    """
    rows = max(LOGITS_AT_ONCE // len(weight), 1)
    if targets.numel() <= rows:
        return F.cross_entropy(F.linear(x, weight).float().flatten(0, -2), targets.flatten())
    blockwise: Callable[..., Tensor] = _BlockwiseLoss.apply
    return blockwise(x.flatten(0, -2), weight, targets.flatten(), rows)


class _BlockwiseLoss(torch.autograd.Function):
    """The loss, with the gradients of x and weight computed on the way (they are scaled in the backward pass)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), device=x.device)
        with torch.autocast(kind, enabled=False):
            table = weight.to(dtype)
            for first in range(0, len(x), rows):
                states, wanted = x[first : first + rows].to(dtype), targets[first : first + rows, None]
                logits = states @ table.T
                log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                log_p_wanted = log_p.gather(1, wanted)
                total -= log_p_wanted.sum()
                if not (wants_x or wants_weight):
                    continue
                # Of the summed loss, by the block's logits, in whose place it is written: p, less 1 at the targets.
                grad = torch.exp(log_p, out=logits).scatter_(1, wanted, log_p_wanted.expm1().to(dtype))
                if grad_x is not None:
                    grad_x[first : first + rows] = grad @ table
                if grad_weight is not None:
                    grad_weight += grad.T @ states
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype, ctx.positions = weight.dtype, len(x)
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.positions  # of the mean
        scaled_x = None if grad_x is None else (grad_x.float() * scale).type_as(grad_x)
        scaled_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None
