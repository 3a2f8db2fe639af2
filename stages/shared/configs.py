"""The shapes of the networks that params ask for. No torch: `dpar-cli cost` reads them before anything is built."""

from __future__ import annotations

from dpar_core.models.configs import DPARConfig, GPTConfig, VQConfig
from stages import params as P


def vq_config(section: P.Tokenizer) -> VQConfig:
    """Return the shape of a tokenizer of the params section."""
    return VQConfig(
        section.codebook_size,
        section.codebook_dim,
        section.base_width,
        tuple(section.channel_multipliers),
        section.z_channels,
        section.residual_blocks,
        section.commitment,
        section.norm_groups,
    )


def entropy_config(section: P.EntropyModel, *, codebook_size: int, row_width: int) -> GPTConfig:
    """Return the shape of the entropy model that the params ask for."""
    values = {name: getattr(section, name) for name in ("width", "heads", "layers", "ffn_multiple", "dropout")}
    return GPTConfig(codebook_size=codebook_size, row_width=row_width, num_classes=None, **values)


def dpar_config(model: P.Model, *, codebook_size: int, row_width: int, num_classes: int) -> DPARConfig:
    """Return the shape of DPAR that the params ask for."""
    shape = model.model_dump()
    return DPARConfig(codebook_size=codebook_size, row_width=row_width, num_classes=num_classes, **shape)


def llamagen_config(model: P.Model, *, codebook_size: int, row_width: int, num_classes: int) -> GPTConfig:
    """Return the shape of DPAR's baseline: the same width and heads, and all its layers in one stack."""
    same = ("width", "heads", "layers", "ffn_multiple", "dropout", "class_dropout")
    values = {name: getattr(model, name) for name in same}
    return GPTConfig(codebook_size=codebook_size, row_width=row_width, num_classes=num_classes, **values)
