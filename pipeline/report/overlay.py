"""`dpar-cli patches`: any image file with its entropy map and patches, by the trained models under artifacts/.

Shapes: T = G x G tokens of an image in raster order, S the image side in pixels that the tokenizer sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpar_core.data.images import BadImage, center_crop, decode_image
from dpar_core.files import atomic_path
from dpar_core.models.gpt import entropies_of
from dpar_core.models.load import read_trained
from dpar_core.models.vq import to_float, to_uint8
from dpar_core.patches.maps import read_rule, rule_precision
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts
from dpar_core.pictures import patch_overview, save_png
from stages.artifacts import ENTROPY_MODEL, PATCH_RULE, TOKENIZER


@dataclass(frozen=True)
class PatchPlan:
    """An image as DPAR sees it.

    decoded: (S, S, 3) uint8, what its tokens show.
    entropies: (T,) float32 nats, entry 0 nan.
    lengths: (M,) uint16, patch lengths that sum to T.
    rule: what cut them, row_width G.
    """

    decoded: np.ndarray
    entropies: np.ndarray
    lengths: np.ndarray
    rule: PatchRule


class Patcher:
    """Tokenizer, entropy model and patch rule that belong together, read from artifacts/.

    Raises FileNotFoundError or ValueError in a sentence when a file is missing or was made with another.
    """

    def __init__(self, artifacts: Path) -> None:
        vq_file, gate_file, rule_file = (one.require(artifacts) for one in (TOKENIZER, ENTROPY_MODEL, PATCH_RULE))
        tokenizer = read_trained(vq_file, "tokenizer")
        gate = read_trained(gate_file, "entropy_model", made_with={"tokenizer": tokenizer.digest})
        self.rule, self.precision = read_rule(rule_file, entropy_model=gate.digest), rule_precision(rule_file)
        self.size: int = tokenizer.meta["image_size"]
        self.vq, self.gate = tokenizer.build(), gate.build()

    @torch.inference_mode()
    def plan(self, image: np.ndarray) -> PatchPlan:
        """Cut an image (height, width, 3) uint8 of any shape into patches, after the centre crop to S x S."""
        crop = torch.from_numpy(center_crop(image, self.size).copy())[None]
        codes = self.vq.encode(to_float(crop))
        entropies = entropies_of(self.gate, codes.flatten(1), self.precision)
        lengths = lengths_from_starts(patch_starts(entropies, self.rule).numpy())[0]
        return PatchPlan(to_uint8(self.vq.decode(codes))[0].numpy(), entropies[0].numpy(), lengths, self.rule)


def draw_patches(image: Path, out: Path, *, artifacts: Path) -> str:
    """Draw the patches of an image file into a PNG and return a line with their number.

    artifacts: folder with the trained models. Raises FileNotFoundError or ValueError in a sentence.
    """
    if not image.is_file():
        raise FileNotFoundError(f"no image file at {image}")
    try:
        pixels = decode_image(image.read_bytes())
        patcher = Patcher(artifacts)
        plan = patcher.plan(pixels)
    except BadImage as error:
        raise ValueError(f"{image} cannot be read as an image: {error}") from None
    picture = patch_overview(
        middle_square(pixels),
        plan.entropies,
        plan.lengths,
        plan.rule.row_width,
        threshold=plan.rule.threshold,
        decoded=plan.decoded,
        title=image.name,
    )
    with atomic_path(out) as temporary:
        save_png(picture, temporary)
    tokens, patches = len(plan.entropies), len(plan.lengths)
    cut = f"threshold {plan.rule.threshold:.2f} nats" if plan.rule.reads_entropies else f"mode {plan.rule.mode}"
    return f"{out}: {patches} patches for {tokens} tokens, {tokens / patches:.2f} tokens per patch ({cut})"


def middle_square(image: np.ndarray) -> Image.Image:
    """Cut the largest square from the middle, at the image's own resolution: what the centre crop shows, sharper."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return Image.fromarray(image[top : top + side, left : left + side])
