"""Scores of a set of images, and the protocol without which they mean nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.image_sets import ImageSet, refuse_same
from dpar_core.evaluation.measure import Measured
from dpar_core.evaluation.metrics import (
    SPLIT_SIZE,
    FeatureMoments,
    Interval,
    ScoreError,
    bootstrap,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dpar_core.evaluation.reference import Reference
from dpar_core.files import digest_of, read_record

# What scores are called: names of the field only where the field's own network was used.
DISTANCE_NAMES = {"demo": "fd_demo", "inception": "fid", "dinov2": "fd_dinov2"}
SPATIAL_ORDER = "row, column, channel"


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


@dataclass(frozen=True)
class Protocol:
    """What scores must have in common to be compared.

    reference names the reference for people; its digest counts.
    image_height, image_width: pixels of the samples.
    formats: how the samples were stored, see `ImageSet`.
    spatial_order: how spatial features were flattened.
    """

    features: str
    features_digest: str
    reference: str
    reference_digest: str
    reference_images: int
    images: int
    image_height: int
    image_width: int
    formats: tuple[str, ...]
    neighbours: int
    splits: int
    spatial_order: str = SPATIAL_ORDER

    @property
    def id(self) -> str:
        """Return the short id: eight hex digits. The reference counts by its content, not by its name."""
        counted = {name: value for name, value in self.to_json().items() if name != "reference"}
        if self.images % SPLIT_SIZE and self.splits == -(-self.images // SPLIT_SIZE) > 1:
            counted["split_size"] = SPLIT_SIZE  # such scores were of equal parts before, and had the id without it
        return digest_of(counted)[:8]

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as JSON data."""
        return {**asdict(self), "formats": list(self.formats)}


@dataclass(frozen=True)
class Scores:
    """Scores by name (as "eval/fid"), 95 % intervals of those that have one, their protocol, and how samples were made.

    feature_count: pooled features per image; 0 where a file does not say.
    """

    values: dict[str, float]
    intervals: dict[str, Interval]
    protocol: Protocol
    samples: dict[str, Any]
    feature_count: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the content of a score file."""
        return {
            **self.values,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "protocol": self.protocol.to_json(),
            "protocol_id": self.protocol.id,
            "samples": self.samples,
            "feature_count": self.feature_count,
        }


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


def read_scores(path: Path) -> Scores:
    """Read a score file: it must be what its digest says, and its protocol have the id that it names.

    Raises FileNotFoundError, ScoreError, Damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no scores at {path}: make them with `dpar-cli score --out {path}`")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        found = None
    if not isinstance(found, dict) or not {"protocol", "protocol_id", "intervals"} <= found.keys():
        raise ScoreError(f"{path} is not a score file: expected one that `dpar-cli score` or `dvc repro` has written")
    return scores_in(read_record(path, way_out="score the images again"), path)


def scores_in(found: Mapping[str, Any], path: Path) -> Scores:
    """Return the scores in the content of a score file. path: for sentences. Raises ScoreError."""
    protocol = _read_protocol(found["protocol"], path)
    if found["protocol_id"] != protocol.id:
        raise ScoreError(
            f"{path} names protocol {found['protocol_id']}, but its protocol has the id {protocol.id}: it was "
            "changed by hand or damaged, score again"
        )
    values = {name: value for name, value in found.items() if name.startswith("eval/")}
    intervals = found["intervals"]
    pairs = intervals.values() if isinstance(intervals, dict) else [None]
    whole = all(_is_number(value) for value in values.values()) and all(
        isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)) for ends in pairs
    )
    if not whole or not isinstance(found.get("samples", {}), dict):
        raise ScoreError(f"{path} holds scores that are not finite numbers: score again")
    pairs_by_name = {name: Interval(*ends) for name, ends in intervals.items()}
    count = found.get("feature_count", 0)
    return Scores(values, pairs_by_name, protocol, found.get("samples", {}), count if type(count) is int else 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_protocol(found: object, path: Path) -> Protocol:
    """Return a protocol from JSON data. Raises ScoreError for another layout, as older versions wrote it."""
    names = {one.name: one.type for one in fields(Protocol)}
    if not isinstance(found, dict) or found.keys() != names.keys():
        differing = ", ".join(sorted(names.keys() ^ found.keys())) if isinstance(found, dict) else "no protocol"
        raise ScoreError(
            f"{path} has a protocol of another version of this project (differing: {differing}): score its images again"
        )
    kinds = {"str": str, "int": int}
    right = all(type(found[name]) is kinds[kind] for name, kind in names.items() if kind in kinds)
    formats = found["formats"]
    if not right or not (isinstance(formats, list) and all(isinstance(one, str) for one in formats)):
        raise ScoreError(f"{path} has a damaged protocol: score its images again")
    return Protocol(**{**found, "formats": tuple(formats)})


def differences(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, in words, where protocols (as JSON data) differ."""
    names = dict.fromkeys(name for one in protocols for name in one)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in protocols}) > 1]
    return [f"{name} {' / '.join(_words(one.get(name)) for one in protocols)}" for name in differing]


def _words(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_mixed(found: Sequence[Scores], names: Sequence[str]) -> None:
    """Refuse to set scores of different protocols beside each other. Raises ScoreError in one sentence."""
    if len({one.protocol.id for one in found}) > 1:
        ids = ", ".join(f"{name} {one.protocol.id}" for name, one in zip(names, found))
        raise ScoreError(
            f"these scores are of different protocols ({ids}) and are not compared: they differ in "
            f"{'; '.join(differences([one.protocol.to_json() for one in found]))}; score both alike, or give --force"
        )
