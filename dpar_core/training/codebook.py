"""Keeping a VQ codebook in use: codes placed where latents are, and dead ones restarted from data.

Shapes: n latents of width c on the unit sphere, V codes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar_core.models.vq import VQ

LATENTS_PER_CODE, MOST_BATCHES, KMEANS_STEPS = 16, 64, 10
AT_ONCE = 2**28  # products of latents and centres, 1 GB; of 16,384 codes and 16 latents per code there are 16 times as many


@torch.no_grad()
def latents_on_sphere(model: VQ, images: Tensor) -> Tensor:
    """Return all latents of images (B, 3, S, S) in [-1, 1], normalised: (n, c) float32."""
    return F.normalize(model.latents(images).float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def place_codes(model: VQ, batches: Iterable[Tensor]) -> None:
    """Put the codebook where latents are: spherical k-means over enough batches for 16 latents per code.

    batches: images (B, 3, S, S) in [-1, 1], of which at most 64 batches are taken.
    """
    table, pool, count = model.quantize.embedding.weight, [], 0
    for number, batch in enumerate(batches, start=1):
        pool.append(latents_on_sphere(model, batch))
        count += len(pool[-1])
        if count >= LATENTS_PER_CODE * len(table) or number == MOST_BATCHES:
            break
    table.copy_(spherical_kmeans(torch.cat(pool), len(table)))


def spherical_kmeans(latents: Tensor, codes: int) -> Tensor:
    """Return centres (V, c) of latents (n, c), both on the unit sphere, after ten steps from evenly spaced latents.

    A centre that no latent is nearest to stays where it was.
    """
    centres = latents[torch.linspace(0, len(latents) - 1, codes).long().to(latents.device)].clone()
    for _ in range(KMEANS_STEPS):
        nearest = torch.cat([(part @ centres.T).argmax(dim=1) for part in latents.split(max(AT_ONCE // codes, 1))])
        sums = torch.zeros_like(centres).index_add(0, nearest, latents)
        taken = torch.bincount(nearest, minlength=len(centres)) > 0
        centres = torch.where(taken[:, None], F.normalize(sums, dim=1), centres)
    return centres


@torch.no_grad()
def restart_dead_codes(
    model: VQ, optimizer: torch.optim.Optimizer, batch: Tensor, used: Tensor, *, seed: int, step: int
) -> None:
    """Put codes that no latent chose since the last time onto random latents of this batch; `used` starts anew.

    used: (V,) int64, how often each code was chosen. The moments that the optimizer keeps of restarted codes become zero.
    """
    latents, dead = latents_on_sphere(model, batch), torch.nonzero(used == 0).flatten()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    table = model.quantize.embedding.weight
    table[dead] = latents[torch.randint(len(latents), (len(dead),), generator=generator).to(latents.device)]
    for moment in optimizer.state.get(table, {}).values():
        if moment.shape == table.shape:
            moment[dead] = 0
    used.zero_()
