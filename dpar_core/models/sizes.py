"""The sizes that models of this project come in, once: B to XXL of DPAR and its baseline, and the entropy models.

Plain data: no torch, so that the cost of a model is known without building it. Shapes: D width, H heads, E encoder,
G patch transformer and Dec decoder layers.
"""

from __future__ import annotations

from typing import NamedTuple


class ModelSize(NamedTuple):
    """A DPAR. Its LlamaGen baseline has the same width and heads, and as many layers as the three parts together."""

    width: int
    heads: int
    encoder_layers: int
    patch_layers: int
    decoder_layers: int

    @property
    def layers(self) -> int:
        """Layers of the LlamaGen baseline."""
        return self.encoder_layers + self.patch_layers + self.decoder_layers


class GateSize(NamedTuple):
    """An entropy model."""

    width: int
    heads: int
    layers: int


FFN_MULTIPLE = 256  # FFN width is int(8 D / 3) rounded up to a multiple of this, at every size
MODEL_SIZES = {  # DPAR, Tab. 1; LlamaGen, Tab. 1
    "B": ModelSize(768, 12, 1, 8, 3),
    "L": ModelSize(1024, 16, 1, 19, 4),
    "XL": ModelSize(1280, 20, 1, 30, 5),
    "XXL": ModelSize(1536, 24, 1, 41, 6),
}
GATE_SIZES = {"B": GateSize(768, 12, 12), "S": GateSize(384, 6, 6), "XS": GateSize(256, 4, 3)}  # B: DPAR, Sec. 4.1
