"""LlamaGen's VQ tokenizer: images to grids of codes and back (2406.06525, Sec. 3.1; the network is VQGAN's).

Shapes: B images of side S pixels in [-1, 1], C channels, V codes of dimension c, a G x G grid with G = S / downsample.
Parameter names are those of the published checkpoints, so that they load unchanged.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.choices import EncodePrecision
from dpar_core.float32 import tensor_float32, whole_float32
from dpar_core.models.configs import VQConfig as VQConfig

LARGEST_TENSOR = 2**31 - 1  # elements that kernels address with 32-bit indices

GROUP_EPS = 1e-6
LOOKUP_ROWS = 8192  # latents compared with the codebook at a time, so that memory does not grow with the batch


class Quantized(NamedTuple):
    """codes: (B, G, G) int64.
    latents: (B, c, G, G), straight-through.
    loss: () codebook plus weighted commitment term.
    """

    codes: Tensor
    latents: Tensor
    loss: Tensor


class Reconstruction(NamedTuple):
    """images: (B, 3, S, S), not clamped.
    codes: (B, G, G) int64.
    loss: () of the quantizer.
    """

    images: Tensor
    codes: Tensor
    loss: Tensor


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=GROUP_EPS)


def _start_at_zero(layer: nn.Conv2d) -> None:
    """Let a residual branch begin as nothing: small networks learn several times faster (docs/log.md)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ResidualBlock(nn.Module):
    """norm, swish, conv, norm, swish, conv, plus the input (through a 1x1 conv where widths differ)."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        self.same_width = channels == out_channels
        _start_at_zero(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.same_width else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """One head over all positions, plus the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        _start_at_zero(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, 1, positions, C)
        added: Tensor = self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))
        return x + added


class Downsample(nn.Module):
    """Stride-2 conv after one column of zeros on the right and one row below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest neighbour 2x, then a conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _level(channels: int, out_channels: int, groups: int, *, blocks: int, attention: bool) -> nn.Module:
    level = nn.Module()
    widths = [channels] + [out_channels] * blocks
    level.res = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
    level.attn = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in range(blocks if attention else 0))
    return level


def _run_level(level: Any, x: Tensor) -> Tensor:
    for index, block in enumerate(level.res):
        x = block(x)
        if len(level.attn):
            x = level.attn[index](x)
    return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    first, last = ResidualBlock(channels, channels, groups), ResidualBlock(channels, channels, groups)
    return nn.ModuleList([first, AttentionBlock(channels, groups), last])


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> (B, z, G, G)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_width * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.base_width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for index, (channels, out_channels) in enumerate(zip([config.base_width, *widths], widths)):
            lowest = index == len(widths) - 1
            level = _level(channels, out_channels, config.norm_groups, blocks=config.residual_blocks, attention=lowest)
            if not lowest:
                level.downsample = Downsample(out_channels)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], config.norm_groups)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        level: Any
        for level in self.conv_blocks:
            x = _run_level(level, x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        for block in self.mid:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """(B, z, G, G) -> images (B, 3, S, S), not clamped. conv_blocks run from the lowest level up."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_width * multiplier for multiplier in reversed(config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config.norm_groups)
        self.conv_blocks = nn.ModuleList()
        for index, (channels, out_channels) in enumerate(zip([widths[0], *widths], widths)):
            blocks = config.residual_blocks + 1
            level = _level(channels, out_channels, config.norm_groups, blocks=blocks, attention=index == 0)
            if index < len(widths) - 1:
                level.upsample = Upsample(out_channels)
            self.conv_blocks.append(level)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        level: Any
        for level in self.conv_blocks:
            x = _run_level(level, x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Quantizer(nn.Module):
    """Nearest code on the unit sphere: latents and codebook are normalised at use, the stored table is not."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.commitment = config.commitment
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight)

    def codebook(self) -> Tensor:
        """Return the normalised codes: (V, c)."""
        return F.normalize(self.embedding.weight, dim=-1)

    def lookup(self, latents: Tensor) -> Tensor:
        """Return the nearest code of each latent (B, c, G, G): (B, G, G) int64. On the sphere that is the largest cosine."""
        flat = F.normalize(latents.float(), dim=1).permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        codebook = self.codebook()
        codes = [(rows @ codebook.T).argmax(dim=1) for rows in flat.split(LOOKUP_ROWS)]
        return torch.cat(codes).view(latents.shape[0], *latents.shape[2:])

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the normalised code vectors of codes (B, G, G): (B, c, G, G)."""
        return F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize with a straight-through gradient; loss |sg(z) - e|^2 + commitment |z - sg(e)|^2, means."""
        latents = F.normalize(latents.float(), dim=1)
        with torch.no_grad():
            codes = self.lookup(latents)
        vectors = self.vectors(codes)
        loss = F.mse_loss(vectors, latents.detach()) + self.commitment * F.mse_loss(latents, vectors.detach())
        return Quantized(codes, latents + (vectors - latents).detach(), loss)


class VQ(nn.Module):
    """The tokenizer."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Return what is quantized, before normalisation: images (B, 3, S, S) -> (B, c, G, G)."""
        side = self.config.downsample
        if images.shape[-1] % side or images.shape[-2] % side:
            raise ValueError(f"image sides must be multiples of {side} pixels; got {tuple(images.shape[-2:])}")
        latents: Tensor = self.quant_conv(self.encoder(images))
        return latents

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) float in [-1, 1] -> codes (B, G, G) int64. Raises ValueError for a side that does not fit."""
        return self.quantize.lookup(self.latents(images))

    def decode(self, codes: Tensor) -> Tensor:
        """codes: (B, G, G) int64 -> images (B, 3, S, S) float, about [-1, 1], not clamped (see `to_uint8`)."""
        images: Tensor = self.decoder(self.post_quant_conv(self.quantize.vectors(codes)))
        return images

    def forward(self, images: Tensor) -> Reconstruction:
        """images: (B, 3, S, S) float in [-1, 1] -> reconstruction, codes and the quantizer's loss."""
        quantized = self.quantize(self.latents(images))
        return Reconstruction(self.decoder(self.post_quant_conv(quantized.latents)), quantized.codes, quantized.loss)


@torch.inference_mode()
def encode_at(model: VQ, images: Tensor, precision: EncodePrecision) -> Tensor:
    """Return the codes of images (B, 3, S, S) float32 in [-1, 1] with the network in a precision: (B, G, G) int64.

    fp32: whole float32 products. tf32: products in TF32 where a GPU has it, as LlamaGen extracts codes. bf16: autocast.
    The lookup in the codebook is whole float32 in each of them.
    """
    with tensor_float32 if precision == "tf32" else whole_float32:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = model.latents(images)
    with whole_float32:
        return model.quantize.lookup(latents.float())


def most_images(config: VQConfig, image_size: int) -> int:
    """Return how many images of this side in pixels one call may encode: past it a tensor has 2^31 elements or more."""
    widths = [config.base_width * multiplier for multiplier in config.channel_multipliers]
    widths[0] = max(widths[0], config.base_width)
    sides = [(image_size >> level) + 1 for level in range(len(widths))]  # one more: what a stride-2 conv reads is padded
    sides[-1] -= 1
    return LARGEST_TENSOR // max(width * side * side for width, side in zip(widths, sides))


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) float -> (B, S, S, 3) uint8: clamp(127.5 x + 128, 0, 255), truncated, as LlamaGen writes them."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


UNUSED_BUFFER = "quantize.codebook_used"


def _numbers(state: dict[str, Tensor], pattern: str) -> list[int]:
    """Return the numbers that stand in names of a pattern. Raises KeyError when there are none."""
    matches = [re.match(pattern, name) for name in state]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "N"))
    return numbers


def config_of(state: dict[str, Tensor]) -> VQConfig:
    """Infer the shape of a tokenizer from published weights. Raises ValueError when they are of another network."""
    table = state.get("quantize.embedding.weight")
    if table is not None and table.dim() != 2:
        shape = tuple(table.shape)
        raise ValueError(
            f"these are not weights of a LlamaGen VQ tokenizer: quantize.embedding.weight is {shape}, not (V, c)"
        )
    try:
        codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
        base_width = state["encoder.conv_in.weight"].shape[0]
        z_channels = state["encoder.conv_out.weight"].shape[0]
        levels = 1 + max(_numbers(state, r"encoder\.conv_blocks\.(\d+)\."))
        blocks = 1 + max(_numbers(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."))
        widths = [state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
    except KeyError as error:
        held = ", ".join(sorted(state)[:3])
        raise ValueError(f"these are not weights of a LlamaGen VQ tokenizer: {error} is missing among {held}, ...") from None
    except IndexError:
        raise ValueError("these are not weights of a LlamaGen VQ tokenizer: a convolution has no dimensions") from None
    multipliers = tuple(width // base_width for width in widths)
    return VQConfig(codebook_size, codebook_dim, base_width, multipliers, z_channels, blocks)
