"""The choices that params and the core share, once: what a value may be, spelled as in params.yaml.

Plain types: no torch, so that checking a params file does not wait for it. Precisions are in dpar_core.precision.
"""

from __future__ import annotations

from typing import Literal

PatchMode = Literal["entropy_rows", "entropy", "static", "token"]  # where patches begin, see patches.rule
PositionEncoding = Literal["4d", "3d", "1d"]  # rotary encoding of patches, see models.rope
ViewSet = Literal["adm_center_flip", "ten_crop_1.1", "ten_crop_1.05", "ten_crop_both"]  # crops of an image, see data.images
FeatureName = Literal["demo", "inception", "dinov2"]  # networks images are compared by, see evaluation.features
EncodePrecision = Literal["fp32", "tf32", "bf16"]  # of the tokenizer's network, see models.vq
GatePrecision = Literal["fp32", "fp16", "bf16"]  # of the entropy model, in stage entropies and while sampling
EncodePrecisionChoice = Literal["auto", "fp32", "tf32", "bf16"]
LearningRateSchedule = Literal["constant", "cosine"]  # see training.optim
Strategy = Literal["ddp", "fsdp"]  # how a model is spread over ranks, see training.parallel
GuidanceSchedule = Literal["constant", "linear", "interval"]  # see generation.sampling
Gate = Literal["entropy_model", "decoder"]  # whose entropies cut patches while sampling, see generation.sampling
READ_ENTROPIES: tuple[PatchMode, ...] = ("entropy_rows", "entropy")  # the patch modes with a threshold
LARGEST_CFG_SCALE = 1e4  # beyond it, and below the least temperature, float32 logits overflow and no token can be chosen
LEAST_TEMPERATURE = 1e-4

Coordinate = Literal["row", "first_column", "last_column", "number"]  # of a patch in its image
# What turns the pairs of a head (DPAR, Sec. 3.3): half of them the first coordinate, the rest the others in equal shares.
ENCODED: dict[PositionEncoding, tuple[Coordinate, ...]] = {
    "4d": ("row", "first_column", "last_column", "last_column", "first_column"),
    "3d": ("row", "first_column", "last_column"),
    "1d": ("number",),
}


def head_multiple(encoding: PositionEncoding) -> int:
    """Return what has to divide the head dimension; the 2D encoding of tokens needs 4."""
    return 4 * max(len(ENCODED[encoding]) - 1, 1)
