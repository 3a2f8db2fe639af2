"""What a forward pass costs: matrix multiply-adds counted as two operations, attention over the full square.

Plain numbers in, plain numbers out: no torch, so that the cost of a model is known without building it.
N tokens per image, M patches, D width, F feed-forward width, V codebook entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from dpar_core.choices import GuidanceSchedule
from dpar_core.models.configs import DPARConfig, GPTConfig, VQConfig

BACKWARD = 2  # a backward pass costs two forward passes


def block_flops(width: int, hidden: int) -> int:
    """Return K = 2 (4 D^2 + 3 D F), the linear layers of one transformer block on one position."""
    return 2 * (4 * width**2 + 3 * width * hidden)


def gpt_forward_flops(shape: GPTConfig) -> int:
    """Return FLOPs of one image through the LlamaGen baseline (or the entropy model): N L K + 4 N^2 D L + 2 N V D."""
    tokens, width = shape.row_width**2, shape.width
    per_layer = tokens * block_flops(width, shape.hidden) + 4 * tokens**2 * width
    return shape.layers * per_layer + 2 * tokens * shape.codebook_size * width


def dpar_forward_flops(shape: DPARConfig, patches: float) -> float:
    """Return FLOPs of one image of `patches` patches through DPAR.

    E [(N-1) K + 4 (N-1)^2 D + 4 D^2 (M+N-1) + 4 M (N-1) D] + G [(M+1) K + 4 (M+1)^2 D]
    + Dec [N K + 4 N^2 D + 2 (M+1) D^2] + 2 N V D.
    """
    return sum(dpar_parts(shape, patches).values())


def dpar_parts(shape: DPARConfig, patches: float, *, passes: float = 1.0, again: float = 0.0) -> dict[str, float]:
    """Return the FLOPs of one image of `patches` patches by part of DPAR, the terms of `dpar_forward_flops`.

    passes: how often what sees the class runs (`guidance_passes`); the patch encoder does not see it and runs once.
    again: tokens for which the decoder runs a second time, with the class alone: where its own entropy began a patch, what
        it had computed with the patch before is void (`starts_by_entropy`).
    """
    tokens, width = shape.row_width**2, shape.width
    block = block_flops(width, shape.hidden)
    seen = tokens - 1
    encoder = seen * block + 4 * seen**2 * width + 4 * width**2 * (patches + seen) + 4 * patches * seen * width
    patch = (patches + 1) * block + 4 * (patches + 1) ** 2 * width
    decoder = tokens * block + 4 * tokens**2 * width + 2 * (patches + 1) * width**2
    asked = shape.decoder_layers * (block + 4 * tokens * width) + 2 * shape.codebook_size * width
    return {
        "decoder as the gate": again * asked,
        "patch encoder": shape.encoder_layers * encoder,
        "patch transformer": passes * shape.patch_layers * patch,
        "patch decoder": passes * shape.decoder_layers * decoder,
        "output layer": passes * 2 * tokens * shape.codebook_size * width,
    }


def vq_flops(config: VQConfig, side: int) -> tuple[int, int]:
    """Return the FLOPs of encoding an image of `side` pixels, with the search of its codes, and of decoding one."""
    widths = [config.base_width * multiplier for multiplier in config.channel_multipliers]
    blocks, levels, lowest, grid = config.residual_blocks, len(widths), widths[-1], side // config.downsample

    def conv(size: int, channels: int, out: int, kernel: int = 3) -> int:
        return 2 * size**2 * channels * out * kernel**2

    def residual(size: int, channels: int, out: int) -> int:
        shortcut = 0 if channels == out else conv(size, channels, out, 1)
        return conv(size, channels, out) + conv(size, out, out) + shortcut

    def attention(size: int, width: int) -> int:
        return 4 * conv(size, width, width, 1) + 4 * size**4 * width

    def level(size: int, channels: int, out: int, blocks: int) -> int:
        attending = blocks * attention(size, out) if size == grid else 0
        return residual(size, channels, out) + (blocks - 1) * residual(size, out, out) + attending

    middle = 2 * residual(grid, lowest, lowest) + attention(grid, lowest)
    encode = conv(side, 3, config.base_width) + middle + conv(grid, lowest, config.z_channels)
    encode += conv(grid, config.z_channels, config.codebook_dim, 1)
    encode += 2 * grid**2 * config.codebook_size * config.codebook_dim
    for depth, (channels, out) in enumerate(pairwise([config.base_width, *widths])):
        encode += level(side >> depth, channels, out, blocks)
        encode += conv(side >> depth + 1, out, out) if depth < levels - 1 else 0
    decode = conv(grid, config.codebook_dim, config.z_channels, 1) + conv(grid, config.z_channels, lowest) + middle
    for depth, (channels, out) in enumerate(pairwise([lowest, *reversed(widths)])):
        decode += level(grid << depth, channels, out, blocks + 1)
        decode += conv(grid << depth + 1, out, out) if depth < levels - 1 else 0
    return encode, decode + conv(side, widths[0], 3)


def training_flops(forward: float) -> float:
    """Return FLOPs of a forward and a backward pass."""
    return (1 + BACKWARD) * forward


def guidance_passes(cfg_scale: float, schedule: GuidanceSchedule, interval: Sequence[float], *, tokens: int) -> float:
    """Return how many forward passes a sampled image takes: 1, or up to 2 with guidance.

    The unconditional half runs up to the last guided token. That is exact for products; attention, whose cost grows with
    the position, takes a little less.
    """
    if cfg_scale <= 1:
        return 1.0
    return 1 + (sum(token / tokens < interval[1] for token in range(tokens)) / tokens if schedule == "interval" else 1.0)


# Dense bf16 FLOP/s as the makers publish them, by words of the device name; of two that fit, the first counts.
PUBLISHED_PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


# Bytes of memory as the makers publish them, by the same words; a name may state another, as A100-SXM4-40GB.
PUBLISHED_MEMORY = {
    "B200": 180e9,
    "H200 NVL": 141e9,
    "H200": 141e9,
    "H100 NVL": 94e9,
    "H100 PCIe": 80e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40S": 48e9,
    "L4": 24e9,
    "A10": 24e9,
    "RTX 4090": 24e9,
}


_OTHERS = re.compile(r"\bLaptop\b|\bRTX 4090 D\b|\bMIG\b", re.IGNORECASE)  # slower chips, or parts of one, of these names


def _of_device(table: dict[str, float], device_name: str) -> float | None:
    if _OTHERS.search(device_name):
        return None
    fits = (value for name, value in table.items() if re.search(rf"\b{name}\b", device_name, re.IGNORECASE))
    return next(fits, None)


def published_peak(device_name: str) -> float | None:
    """Return a GPU's published dense bf16 FLOP/s, None when it is not listed."""
    return _of_device(PUBLISHED_PEAKS, device_name)


def published_memory(device_name: str) -> float | None:
    """Return a GPU's memory in bytes, as its name states it or as published, None when it is not listed."""
    known, stated = _of_device(PUBLISHED_MEMORY, device_name), re.search(r"\b(\d+) ?GB\b", device_name, re.IGNORECASE)
    return known if known is None or stated is None else 1e9 * int(stated[1])
