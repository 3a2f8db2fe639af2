"""What a notebook needs: a run's trained models, images to tokens and back, entropies, patches, pictures, scores.

Everything here is importable from `dpar_core` itself, and nothing of it is loaded before it is used.
Shapes: n images, S the image side in pixels, G tokens per row, T = G x G tokens per image, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dpar_core.choices import GatePrecision
from dpar_core.data.images import center_crop, read_image
from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.metrics import FeatureMoments, frechet_distance, inception_score, precision_recall
from dpar_core.evaluation.protocol import ScoreError
from dpar_core.files import RUN_FILES, RUN_FOLDER
from dpar_core.generation.generate import DPARGenerator, Generated, GPTGenerator
from dpar_core.generation.sampling import SampleSettings
from dpar_core.models.dpar import DPAR
from dpar_core.models.gpt import GPT, entropies_of
from dpar_core.models.load import read_trained
from dpar_core.models.vq import VQ, to_float, to_uint8
from dpar_core.patches.maps import read_rule, rule_precision
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts
from dpar_core.pictures import patch_overview
from dpar_core.precision import dtype_of

ImageArray = npt.NDArray[np.uint8]


class Patches(NamedTuple):
    """Tokens, entropies and patches of images.

    tokens: (n, T) int64.
    entropies: (n, T) float32 nats, entry t = H(x_t | x_<t); entry 0 is nan.
    lengths: for each image the lengths of its patches, which sum to T.
    """

    tokens: Tensor
    entropies: Tensor
    lengths: list[npt.NDArray[np.uint16]]


@dataclass(frozen=True)
class Run:
    """The trained models of a run, which belong together. Make one with `load_run`.

    dpar, llamagen: None where that model has not been trained.
    image_size: S.
    class_names: of labels 0, 1, ...
    entropy_precision: of the entropy model's products, as the run's patches were made with.
    untrained: classes that had no training images, of which nothing can be sampled.
    """

    tokenizer: VQ
    entropy_model: GPT
    rule: PatchRule
    dpar: DPAR | None
    llamagen: GPT | None
    image_size: int
    class_names: list[str]
    device: torch.device
    entropy_precision: GatePrecision = "fp32"
    untrained: frozenset[int] = frozenset()

    @torch.inference_mode()
    def encode(self, images: ImageArray | Sequence[ImageArray]) -> Tensor:
        """Turn images into tokens after the centre crop to S x S.

        images: (n, height, width, 3) uint8, or a sequence of (height, width, 3) of different sizes.
        Returns (n, T) int64 on the run's device. Raises ValueError for another dtype or shape.
        """
        crops = [center_crop(_checked(image), self.image_size) for image in images]
        if not crops:
            raise ValueError("expected at least one image; got none")
        pixels = to_float(torch.from_numpy(np.stack(crops)).to(self.device))
        return self.tokenizer.encode(pixels).flatten(1)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> ImageArray:
        """Turn tokens (n, T) int64 into images (n, S, S, 3) uint8. Raises ValueError for another number of tokens."""
        side = self.rule.row_width
        if tokens.ndim != 2 or tokens.shape[1] != side * side:
            raise ValueError(f"tokens must be (n, {side * side}); got {tuple(tokens.shape)}")
        images = self.tokenizer.decode(tokens.to(self.device).view(-1, side, side))
        return np.asarray(to_uint8(images).cpu().numpy())

    @torch.inference_mode()
    def entropies(self, tokens: Tensor) -> Tensor:
        """Return how uncertain the entropy model is of every token, given those before it.

        tokens: (n, T) int64. Returns (n, T) float32 nats on the CPU; entry 0 is nan, as nothing predicts the first token.
        """
        return entropies_of(self.entropy_model, tokens.to(self.device), self.entropy_precision).cpu()

    def patches(self, images: ImageArray | Sequence[ImageArray], *, rule: PatchRule | None = None) -> Patches:
        """Cut images into patches. rule: another one than the run was trained with. Images as in `encode`."""
        tokens = self.encode(images)
        entropies = self.entropies(tokens)
        return Patches(tokens, entropies, patch_lengths(entropies, rule or self.rule))

    def generate(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        *,
        model: str = "dpar",
        cfg_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        rule: PatchRule | None = None,
    ) -> Generated:
        """Sample an image per label.

        labels: class ids.
        seeds: as many integers; an image depends on its own label and seed, not on its neighbours.
        model: "dpar" or "llamagen".
        cfg_scale: guidance, 1 is off.
        rule: to sample with another patch rule than the model was trained with.
        Returns tokens (n, T), patch lengths, and the entropies (n, T) that decided them.
        Raises ValueError for a class, a number of seeds or a model that does not fit, and a class without training images.
        """
        if unknown := sorted(self.untrained & {int(label) for label in labels}):
            raise ValueError(f"class {unknown[0]} had no training images: sample another one")
        settings = SampleSettings(
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            rule=(rule or self.rule) if model == "dpar" else None,
        )
        classes = torch.as_tensor(labels, dtype=torch.int64)
        if model == "dpar" and self.dpar is not None:
            gate_dtype = dtype_of(self.entropy_precision)
            return DPARGenerator(self.dpar, self.entropy_model, settings, gate_dtype=gate_dtype).generate(classes, seeds)
        if model == "llamagen" and self.llamagen is not None:
            return GPTGenerator(self.llamagen, settings).generate(classes, seeds)
        if model in ("dpar", "llamagen"):
            raise ValueError(f"this run has no trained {model}: run `dpar-cli run train_{model}`")
        raise ValueError(f"model must be dpar or llamagen; got {model!r}")

    def picture(self, image: ImageArray, *, title: str = "", side: int = 320) -> Image.Image:
        """Draw an image (height, width, 3) uint8 beside what its tokens hold, its entropy map and its patches."""
        found = self.patches([image])
        return patch_overview(
            center_crop(image, self.image_size),
            found.entropies[0].numpy(),
            [int(length) for length in found.lengths[0]],
            self.rule.row_width,
            threshold=self.rule.threshold,
            decoded=self.decode(found.tokens)[0],
            title=title,
            side=side,
        )


def load_run(artifacts: Path | str = RUN_FOLDER, *, device: str | None = None) -> Run:
    """Load the trained models of a run.

    artifacts: the folder that `dpar-cli run` fills.
    device: "cpu", "cuda"; None: CUDA where there is a GPU.
    Raises FileNotFoundError for a missing tokenizer, entropy model or patch rule, and ValueError when files do not belong
    together; both name the stage to run.
    """
    folder = Path(artifacts)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = read_trained(folder / RUN_FILES["tokenizer"], "tokenizer")
    made_with = {"tokenizer": tokenizer.digest}
    gate = read_trained(folder / RUN_FILES["entropy_model"], "entropy_model", made_with=made_with)
    rule = read_rule(folder / RUN_FILES["rule"], entropy_model=gate.digest)
    models: dict[str, DPAR | GPT | None] = {"dpar": None, "llamagen": None}
    names: list[str] = []
    untrained: frozenset[int] = frozenset()
    for role in ("dpar", "llamagen"):
        if (folder / RUN_FILES[role]).exists():
            found = read_trained(folder / RUN_FILES[role], role, made_with=made_with)
            cut_by = found.meta.get("rule")
            if role == "dpar" and cut_by is not None and cut_by != asdict(rule):
                raise ValueError(
                    f"{found.path} was trained with the patch rule {cut_by}, but {folder / RUN_FILES['rule']} holds "
                    f"{asdict(rule)}: run `dpar-cli run train_dpar`"
                )
            classes = found.meta.get("classes") or names
            if names and classes != names:
                raise ValueError(f"dpar and llamagen in {folder} were trained on different classes: run `dpar-cli run`")
            models[role], names = found.build(chosen), classes
            untrained |= frozenset(found.meta.get("untrained_classes") or [])
    dpar, llamagen = models["dpar"], models["llamagen"]
    assert dpar is None or isinstance(dpar, DPAR)
    assert llamagen is None or isinstance(llamagen, GPT)
    vq = tokenizer.build(chosen)
    size = rule.row_width * vq.config.downsample
    precision = rule_precision(folder / RUN_FILES["rule"])
    return Run(vq, gate.build(chosen), rule, dpar, llamagen, size, names, chosen, precision, untrained)


def patch_lengths(entropies: Tensor, rule: PatchRule) -> list[npt.NDArray[np.uint16]]:
    """Cut images into patches by stored entropies (DPAR, Sec. 3.2).

    entropies: (n, T) float32 nats, entry 0 ignored. Returns the patch lengths of every image, which sum to T.
    Raises ValueError for another dtype.
    """
    return lengths_from_starts(patch_starts(entropies, rule).numpy())


class ImageScores(NamedTuple):
    """How two sets of images compare by one feature network; a number is valid beside others of the same network only.

    features: name and digest of the network.
    images, reference: how many of each.
    frechet: Frechet distance of the pooled features (FID for Inception).
    inception_score: of the images; None where the network gives no class probabilities.
    precision, recall: shares in [0, 1].
    """

    features: str
    images: int
    reference: int
    frechet: float
    inception_score: float | None
    precision: float
    recall: float


def score_images(
    images: ImageArray, reference: ImageArray, network: FeatureNetwork, *, neighbours: int = 3, allow_singular: bool = False
) -> ImageScores:
    """Compare images with a reference set as the ADM evaluator does.

    images, reference: (n, S, S, 3) uint8 of the same S.
    network: see `feature_network`.
    neighbours: whose distance is the radius of precision and recall.
    Raises ValueError when shapes differ, and ScoreError when a set has no more images than the network has features (its
    covariance is singular and the distance too large), unless `allow_singular`.
    """
    if images.shape[1:] != reference.shape[1:]:
        raise ValueError(f"images are {images.shape[1:]}, the reference is {reference.shape[1:]}: resize one of them first")
    ours, theirs = network(images), network(reference)
    fewest, dimensions = min(len(images), len(reference)), ours.pool.shape[1]
    if fewest <= dimensions and not allow_singular:
        raise ScoreError(
            f"{fewest} images are too few for {dimensions} features, the distance would come out too large: "
            "use more images, or pass allow_singular=True"
        )
    a, b = FeatureMoments.of(ours.pool), FeatureMoments.of(theirs.pool)
    quality = precision_recall(theirs.pool, ours.pool, k=neighbours)
    return ImageScores(
        features=f"{network.name} {network.digest}",
        images=len(images),
        reference=len(reference),
        frechet=frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
        inception_score=None if ours.probabilities is None else inception_score(ours.probabilities),
        precision=quality.precision,
        recall=quality.recall,
    )


def open_image(path: Path | str) -> ImageArray:
    """Read an image file of any format and mode as RGB: (height, width, 3) uint8. Raises BadImage, OSError."""
    return read_image(path)


def _checked(image: ImageArray) -> ImageArray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image must be (height, width, 3) uint8; got {image.dtype} {image.shape}")
    return image
