"""Frozen features of a generative model: what every block has made of an image, averaged over its positions.

Shapes: B images, n positions, P packed patch rows, D width, L blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpar_core.models.dpar import DPAR
from dpar_core.models.gpt import GPT
from dpar_core.training.parallel import transformer_blocks
from dpar_core.training.prefetch import Batch


def block_names(model: GPT | DPAR) -> list[str]:
    """Return what to call each block, in the order that an image passes them."""
    if isinstance(model, GPT):
        return [f"layer {number}" for number in range(len(model.layers))]
    parts = (("encoder", model.local_encoder.layers), ("patch", model.layers), ("decoder", model.local_decoder.layers))
    return [f"{name} {number}" for name, blocks in parts for number in range(len(blocks))]


@torch.no_grad()
def block_features(model: GPT | DPAR, batch: Batch) -> Tensor:
    """Return the mean output of every block over the positions of each image: (L, B, D) float32.

    batch: tokens (B, T), and for DPAR their layout; its labels are not used: the null class stands in for them, so that
    features know nothing of the class but what the tokens show.
    """
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(_image_means(output.float(), batch))

    images = len(batch.tokens)
    null = torch.full((images,), model.cls_embedding.null_label, device=batch.tokens.device)
    handles = [block.register_forward_hook(keep) for block in transformer_blocks(model)]
    model.eval()
    try:
        if isinstance(model, DPAR):
            model(batch.tokens, null, batch.layout)
        else:
            model(batch.tokens[:, :-1], null)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(outputs)


def _image_means(states: Tensor, batch: Batch) -> Tensor:
    """Average (B, n, D), or packed (P, D) by the layout of the batch (spare rows after them), over positions: (B, D)."""
    if states.dim() == 3:
        return states.mean(1)
    assert batch.layout is not None
    states = states[: batch.layout.patches]
    counts = batch.layout.offsets.diff()
    image = torch.repeat_interleave(torch.arange(len(counts), device=states.device), counts, output_size=len(states))
    return states.new_zeros(len(counts), states.shape[1]).index_add(0, image, states) / counts[:, None]
