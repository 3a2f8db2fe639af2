"""The shapes of the networks: GPT, DPAR and the tokenizer.

Plain data: no torch, so that the cost of a model is known without building it, and before torch is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpar_core.choices import PositionEncoding


def ffn_width(width: int, multiple: int) -> int:
    """Return int(8 D / 3) rounded up to a multiple."""
    hidden = int(8 * width / 3)
    return multiple * -(-hidden // multiple)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT. num_classes None: no class token (the entropy model)."""

    codebook_size: int
    row_width: int
    width: int
    heads: int
    layers: int
    ffn_multiple: int = 256
    num_classes: int | None = None
    dropout: float = 0.0
    class_dropout: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of an image, T."""
        return self.row_width**2

    @property
    def hidden(self) -> int:
        """Width of the FFN."""
        return ffn_width(self.width, self.ffn_multiple)

    @property
    def num_parameters(self) -> int:
        """Parameters, counted without building the network."""
        block = 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width
        classes = 0 if self.num_classes is None else (self.num_classes + 1) * self.width
        return self.layers * block + 2 * self.codebook_size * self.width + self.width + classes


@dataclass(frozen=True)
class DPARConfig:
    """Shape of a DPAR."""

    codebook_size: int
    row_width: int
    width: int
    heads: int
    encoder_layers: int
    patch_layers: int
    decoder_layers: int
    num_classes: int
    ffn_multiple: int = 256
    position_encoding: PositionEncoding = "4d"
    dropout: float = 0.0
    class_dropout: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of an image, T."""
        return self.row_width**2

    @property
    def hidden(self) -> int:
        """Width of the FFN."""
        return ffn_width(self.width, self.ffn_multiple)

    @property
    def layers(self) -> int:
        """Layers of the LlamaGen baseline."""
        return self.encoder_layers + self.patch_layers + self.decoder_layers

    @property
    def num_parameters(self) -> int:
        """Parameters, counted without building the network."""
        d = self.width
        block = 4 * d**2 + 3 * d * self.hidden + 2 * d
        around = self.encoder_layers * (4 * d**2 + 2 * d) + self.decoder_layers * (d**2 + d)
        tables = 2 * self.codebook_size * d + (self.num_classes + 1) * d + d
        return self.layers * block + around + tables + d


@dataclass(frozen=True)
class VQConfig:
    """Shape of a tokenizer. VQ-16 of LlamaGen: 16384 codes of 8, width 128, multipliers 1, 1, 2, 2, 4, z 256, 2 blocks.

    norm_groups: groups of every GroupNorm, 32 in LlamaGen. A narrow network needs fewer: with one channel a group the
    norm takes away each channel's mean over the image, and with it the colour.
    """

    codebook_size: int
    codebook_dim: int
    base_width: int
    channel_multipliers: tuple[int, ...]
    z_channels: int
    residual_blocks: int = 2
    commitment: float = 0.25
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))

    @property
    def downsample(self) -> int:
        """Pixels of a side that one code stands for."""
        return 1 << (len(self.channel_multipliers) - 1)
