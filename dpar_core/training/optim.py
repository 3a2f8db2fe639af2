"""AdamW and learning rates as the paper trains (DPAR, recipe; method of LlamaGen)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpar_core.choices import LearningRateSchedule


@dataclass(frozen=True)
class OptimSettings:
    """AdamW, its schedule and the clipping norm (0: gradients are not clipped, their norm is measured all the same)."""

    lr: float
    lr_schedule: LearningRateSchedule = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0


def learning_rate(settings: OptimSettings, step: int, *, steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first) of a run of `steps`.

    Linear warm-up over the first `warmup_steps` steps, the last of them at `lr`; after it constant, or a cosine that would
    be zero at `steps`.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return settings.lr
    share = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def adamw(named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings) -> torch.optim.AdamW:
    """Return fused AdamW that decays tensors of two or more dimensions only (embeddings included, norms not).

    Parameters keep the order they come in within each of the two groups, so the same model gives the same optimizer.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p[1].dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p[1].dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of an optimizer the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale gradients so that their joint 2-norm is at most `clip_norm` (0: leave them) and return the norm before.

    Returns a () float32 tensor on the parameters' device; nothing is read back to the host. For sharded parameters
    (DTensor) it is the norm over all shards.
    """
    if clip_norm > 0:
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
