"""Scores of anyone's images, outside the workflow: npz files and folders of pictures against any reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpar_core.evaluation.image_sets import Shape, digest_of_images, shape_of
from dpar_core.evaluation.protocol import SPLIT_SIZE, ScoreError, Scores, refuse_mixed
from dpar_core.evaluation.scores import ScoreSettings
from stages.shared.scoring import images_in


@dataclass(frozen=True)
class Spread:
    """A score over several sample sets that differ in their seeds."""

    mean: float
    deviation: float


def settings_for(
    features: str, *, images: int, neighbours: int, bootstrap: int, allow_singular: bool = False
) -> ScoreSettings:
    """Return the settings that stand for these options."""
    return ScoreSettings(features, images, neighbours, -(-images // SPLIT_SIZE), bootstrap, allow_singular)


def shape_in(samples: Path) -> Shape:
    """Return the shape of a set without reading all of it. Raises FileNotFoundError, ScoreError."""
    return shape_of(images_in(samples))


def refuse_twice(samples: Sequence[Path]) -> None:
    """Raise ScoreError where a set of images is among several twice: their spread would be too small."""
    seen: dict[str, Path] = {}
    for path in samples if len(samples) > 1 else ():
        first = seen.setdefault(digest_of_images(images_in(path)), path)
        if first is not path:
            raise ScoreError(f"{first} and {path} hold the same images: give each set of samples once")


def spread(found: Sequence[Scores]) -> dict[str, Spread]:
    """Return mean and standard deviation (divisor n - 1) of each score over two or more sets of one protocol."""
    refuse_mixed(found, [f"set {number + 1}" for number in range(len(found))])
    names = [name for name in found[0].values if all(name in one.values for one in found)]
    values = {name: np.array([one.values[name] for one in found], dtype=np.float64) for name in names}
    return {name: Spread(float(column.mean()), float(column.std(ddof=1))) for name, column in values.items()}
