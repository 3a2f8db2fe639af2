"""Filters that reshape a distribution before a token is drawn: temperature, then top-k, then top-p.

Shapes: V codebook entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Divide by the temperature, then drop all but the k likeliest tokens (ties with the k-th are kept), then all
    beyond the smallest set whose probability exceeds top_p (the token that crosses it is kept).

    logits: (..., V) float32. temperature above 0. top_k 0 and top_p 1 are off. Returns logits (..., V) float32 with
    -inf for dropped tokens. Raises ValueError.
    """
    if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"expected temperature > 0, top_k >= 0 and 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        above = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        above[..., 0] = 0  # probability of all likelier tokens
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, above > top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits
