"""How well a tokenizer gives images back, and how much of its codebook it uses.

Shapes: n images (n, S, S, 3) uint8; codes are entries of a codebook of V.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpar_core.models.vq import VQ, to_float, to_uint8

ROUNDING_ERROR = 1 / 12  # mean squared error of rounding to whole grey levels


class Reconstructed(NamedTuple):
    """images: (n, S, S, 3) uint8.
    codes: (n * T,) int64, on the CPU.
    """

    images: np.ndarray
    codes: Tensor


@torch.inference_mode()
def reconstruct(model: VQ, images: np.ndarray, *, device: str, batch_size: int = 32) -> Reconstructed:
    """Encode and decode images (n, S, S, 3) uint8."""
    copies, codes = [], []
    for first in range(0, len(images), batch_size):
        part = torch.from_numpy(images[first : first + batch_size])
        grid = model.encode(to_float(part.to(device)))
        codes.append(grid.flatten().cpu())
        copies.append(to_uint8(model.decode(grid)).cpu().numpy())
    return Reconstructed(np.concatenate(copies), torch.cat(codes))


def psnr_db(originals: np.ndarray, copies: np.ndarray) -> float:
    """Return the mean PSNR over images in dB.

    A copy without any error counts as one that is right to the rounding (59 dB), so that black images do not lift the mean
    without limit.
    """
    error = ((originals.astype(np.float64) - copies) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255.0**2 / np.maximum(error, ROUNDING_ERROR))).mean())


class CodebookUse(NamedTuple):
    """codes: how many entries are used.
    share: of the codebook.
    perplexity: exp of the entropy of their frequencies.
    """

    codes: int
    share: float
    perplexity: float


def codebook_use(codes: Tensor, codebook_size: int) -> CodebookUse:
    """Return how codes (n,) int64 use a codebook of `codebook_size` entries."""
    counts = torch.bincount(codes, minlength=codebook_size).double()
    share = counts[counts > 0] / counts.sum()
    perplexity = float((-(share * share.log()).sum()).exp())
    return CodebookUse(int((counts > 0).sum()), float((counts > 0).double().mean()), perplexity)
