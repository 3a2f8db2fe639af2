"""What a notebook needs: a run's trained models, images to tokens and back, entropies, patches, pictures, scores.

Everything here is importable from `dpar_core` itself, and nothing of it is loaded before it is used.
Shapes: n images, S the image side in pixels, G tokens per row, T = G x G tokens per image, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dpar_core.choices import GatePrecision
from dpar_core.data.images import BadImage, center_crop, read_image
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
Tokens = Tensor | npt.NDArray[np.integer]


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

    @torch.no_grad()
    def encode(self, images: ImageArray | Sequence[ImageArray]) -> Tensor:
        """Turn images into tokens after the centre crop to S x S.

        images: (n, height, width, 3) uint8, or a sequence of (height, width, 3) of different sizes.
        Returns (n, T) int64 on the run's device. Raises ValueError for another dtype or shape.
        """
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise ValueError(
                f"images must be (n, height, width, 3) or a list; got {images.shape}: write [image] for a single one"
            )
        crops = [center_crop(_checked(image), self.image_size) for image in images]
        if not crops:
            raise ValueError("expected at least one image; got none")
        pixels = to_float(torch.from_numpy(np.stack(crops)).to(self.device))
        return self.tokenizer.encode(pixels).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> ImageArray:
        """Turn tokens (n, T) of an integer type into images (n, S, S, 3) uint8.

        Raises ValueError for another number of tokens, and for tokens that are no codes of the tokenizer.
        """
        side = self.rule.row_width
        images = self.tokenizer.decode(self._codes(tokens).view(-1, side, side))
        return np.asarray(to_uint8(images).cpu().numpy())

    @torch.no_grad()
    def entropies(self, tokens: Tokens) -> Tensor:
        """Return how uncertain the entropy model is of every token, given those before it.

        tokens: (n, T) of an integer type. Returns (n, T) float32 nats on the CPU; entry 0 is nan, as nothing predicts the
        first token. Raises ValueError as `decode` does.
        """
        return entropies_of(self.entropy_model, self._codes(tokens), self.entropy_precision).cpu().clone()

    def patches(self, images: ImageArray | Sequence[ImageArray], *, rule: PatchRule | None = None) -> Patches:
        """Cut images into patches. rule: another one than the run was trained with. Images as in `encode`."""
        tokens = self.encode(images)
        entropies = self.entropies(tokens)
        return Patches(tokens, entropies, patch_lengths(entropies, rule or self.rule))

    def generate(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        *,
        model: str = "dpar",
        cfg_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        rule: PatchRule | None = None,
        given: Tokens | None = None,
    ) -> Generated:
        """Sample an image per label.

        labels: class ids, or names as in `class_names`.
        seeds: as many integers; an image depends on its own label and seed, not on its neighbours.
        model: "dpar" or "llamagen".
        cfg_scale: guidance, 1 is off.
        rule: to sample with another patch rule than the model was trained with.
        given: first tokens of the images, which are kept: (n, t) of an integer type, or (1, t) for all of them.
        Returns tokens (n, T), patch lengths, and the entropies (n, T) that decided them.
        Raises ValueError for a class, a number of seeds or a model that does not fit, and a class without training images.
        """
        trained = {"dpar": self.dpar, "llamagen": self.llamagen}
        if model not in trained:
            raise ValueError(f"model must be dpar or llamagen; got {model!r}")
        network = trained[model]
        if network is None:
            raise ValueError(f"this run has no trained {model}: run `dpar-cli run train_{model}`")
        classes = torch.tensor([self._class_id(label, network.config.num_classes) for label in labels], dtype=torch.int64)
        seeds = [int(seed) for seed in seeds]
        if given is not None:
            given = self._codes(given, part=True)
            given = given.expand(len(classes), -1) if len(given) == 1 else given
        settings = SampleSettings(
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            rule=(rule or self.rule) if model == "dpar" else None,
        )
        if isinstance(network, GPT):
            sampled = GPTGenerator(network, settings).generate(classes, seeds, given=given)
        else:
            generator = DPARGenerator(network, self.entropy_model, settings, gate_dtype=dtype_of(self.entropy_precision))
            sampled = generator.generate(classes, seeds, given=given)
        # A copy, as autograd refuses what was made in inference mode.
        return replace(sampled, tokens=sampled.tokens.clone(), entropies=sampled.entropies.clone())

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

    def _codes(self, tokens: Tokens, *, part: bool = False) -> Tensor:
        """Return tokens as int64 on the run's device. part: the first tokens of images will do."""
        found = tokens if isinstance(tokens, Tensor) else torch.from_numpy(np.array(tokens))
        most, codes = self.rule.row_width**2, self.tokenizer.config.codebook_size
        if found.is_floating_point() or found.ndim != 2 or not (found.shape[1] == most or (part and found.shape[1] < most)):
            expected = f"(n, {'at most ' if part else ''}{most})"
            raise ValueError(f"tokens must be {expected} of an integer type; got {tuple(found.shape)} {found.dtype}")
        found = found.to(self.device, torch.int64)
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < codes:
            raise ValueError(f"tokens must lie in 0..{codes - 1}: were they made by another tokenizer?")
        return found

    def _class_id(self, label: int | str, num_classes: int | None) -> int:
        """Return the class that an id or a name means. Raises ValueError where there is none, or it was not trained."""
        if isinstance(label, str) and label not in self.class_names:
            raise ValueError(f"class {label!r} does not exist: class_names lists those of this run")
        found = self.class_names.index(label) if isinstance(label, str) else int(label)
        if num_classes is None or not 0 <= found < num_classes:
            raise ValueError(f"class {found} does not exist: the model knows classes 0 to {(num_classes or 0) - 1}")
        if found in self.untrained:
            raise ValueError(f"class {found} had no training images: sample another one")
        return found


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


def patch_lengths(entropies: Tensor | npt.NDArray[np.float32], rule: PatchRule) -> list[npt.NDArray[np.uint16]]:
    """Cut images into patches by stored entropies (DPAR, Sec. 3.2).

    entropies: (n, T) float32 nats, entry 0 ignored. Returns the patch lengths of every image, which sum to T.
    Raises ValueError for another dtype or shape.
    """
    found = entropies.cpu() if isinstance(entropies, Tensor) else torch.from_numpy(np.array(entropies))
    if found.ndim != 2:
        raise ValueError(f"entropies must be (n, T); got {tuple(found.shape)}")
    return lengths_from_starts(patch_starts(found, rule).numpy())


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
    """Read an image file of any format and mode as RGB: (height, width, 3) uint8. Raises BadImage, a ValueError."""
    try:
        return read_image(path)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def _checked(image: ImageArray) -> ImageArray:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image must be an array, as open_image(path) returns; got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image must be (height, width, 3) uint8; got {image.dtype} {image.shape}")
    return image
