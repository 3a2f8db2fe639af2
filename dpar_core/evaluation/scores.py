"""Scores of a set of images, and the protocol without which they mean nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.image_sets import ImageSet, refuse_same
from dpar_core.evaluation.measure import Measured
from dpar_core.evaluation.metrics import (
    FeatureMoments,
    bootstrap,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dpar_core.evaluation.protocol import DISTANCE_NAMES, Interval, Protocol, ScoreError
from dpar_core.evaluation.reference import Reference


@dataclass(frozen=True)
class ScoreSettings:
    """How to score.

    features: name of the network.
    neighbours: k of precision and recall.
    splits: of the inception score.
    bootstrap: resamples for intervals, 0 for none.
    allow_singular: give distances of fewer images than features.
    """

    features: str
    images: int
    neighbours: int
    splits: int
    bootstrap: int
    allow_singular: bool


def protocol_of(network: FeatureNetwork, reference: Reference, settings: ScoreSettings, images: ImageSet) -> Protocol:
    """Return the protocol of scores of `images` against a reference."""
    count, height, width = images.images.shape[:3]
    return Protocol(
        network.name,
        network.digest,
        reference.name,
        reference.digest,
        reference.images,
        count,
        height,
        width,
        images.formats,
        settings.neighbours,
        settings.splits,
    )


def check_images(images: np.ndarray, reference: Reference, where: Path | str) -> None:
    """Refuse images that are all the same, or of another height or width than the reference's. Raises ScoreError."""
    height, width = images.shape[1:3]
    if reference.image_size not in (None, (height, width)):
        other_height, other_width = reference.image_size
        raise ScoreError(
            f"{where} holds images of {width} x {height} pixels, the reference {reference.name} of {other_width} x "
            f"{other_height}: resize one side, or take another reference"
        )
    refuse_same(images, where)


def compare(
    measured: Measured, reference: Reference, settings: ScoreSettings, *, seed: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Return scores by name, and bootstrap intervals of those that a resample of the images can move.

    Where fewer images than features make a covariance singular and `allow_singular` is false, the pooled distance is an
    error, and the spatial one is not among the scores. Raises ScoreError, also when features and reference are of
    different networks.
    """
    features = measured.features
    sides = [(measured.pool, reference.pool, "features"), (measured.spatial, reference.spatial, "spatial features")]
    for ours, theirs, what in sides:
        if ours is not None and theirs is not None and len(ours.mean) != len(theirs.mean):
            raise ScoreError(
                f"the reference {reference.name} has {len(theirs.mean)} {what} per image, these images {len(ours.mean)}: "
                "both must come from one network"
            )
    distance = DISTANCE_NAMES[settings.features]
    suffix = "" if settings.features == "inception" else f"_{settings.features}"
    check_rank(len(features.pool), reference, settings)

    def frechet(chosen: np.ndarray | slice, pool: FeatureMoments | None = None) -> dict[str, float]:
        moments = pool or FeatureMoments.of(features.pool[chosen])
        values = {f"eval/{distance}": _distance(moments, reference.pool)}
        if features.probabilities is not None:
            values[f"eval/is{suffix}"] = inception_score(features.probabilities[chosen], splits=settings.splits)
        return values

    scores = frechet(slice(None), measured.pool)
    if measured.spatial is not None and reference.spatial is not None:
        dimensions = len(reference.spatial.mean)
        counts = (measured.spatial.count, reference.spatial.count)
        if settings.allow_singular or not any(_singular(count, dimensions) for count in counts):
            scores[f"eval/s{distance}"] = _distance(measured.spatial, reference.spatial)
    if reference.features is not None:
        both = precision_recall(reference.features, features.pool, k=settings.neighbours)
        scores |= {"eval/precision": both.precision, "eval/recall": both.recall}
        scores[f"eval/kid{suffix}"] = kernel_distance(reference.features, features.pool, seed=seed)
    if not settings.bootstrap:
        return scores, {}
    least = {f"eval/{distance}": 0.0, f"eval/is{suffix}": 1.0}
    return scores, bootstrap(frechet, len(features.pool), resamples=settings.bootstrap, seed=seed, least=least)


def check_rank(images: int, reference: Reference, settings: ScoreSettings) -> None:
    """Refuse so few images of either side that a covariance has not full rank. Raises ScoreError."""
    dimensions = len(reference.pool.mean)
    for side, count in {"samples": images, "reference": reference.pool.count}.items():
        if _singular(count, dimensions) and not settings.allow_singular:
            raise ScoreError(
                f"the {side} are {count} images, and the covariance of {dimensions} features has full rank only "
                f"with more images than that: take more, or set score.allow_singular (--allow-singular) for a number that "
                "may be compared with others of as few images only"
            )


def _singular(images: int, features: int) -> bool:
    """Whether this many images leave a covariance without full rank; 0 images: statistics that do not say how many."""
    return 0 < images <= features


def _distance(a: FeatureMoments, b: FeatureMoments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
