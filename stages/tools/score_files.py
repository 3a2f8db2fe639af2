"""Scores of anyone's images, outside the workflow: npz files and folders of pictures against any reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.image_sets import Shape, read_image_set, shape_of
from dpar_core.evaluation.metrics import ScoreError
from dpar_core.evaluation.reference import Reference
from dpar_core.evaluation.scores import Scores, ScoreSettings, check_images, compare, protocol_of, refuse_mixed
from dpar_core.files import read_json
from stages.artifacts import SAMPLE_IMAGES, SAMPLE_PROTOCOL
from stages.shared.scoring import measure_with_progress
from stages.tracker import Tracker

SPLIT = 5000  # images per part of the inception score, as the ADM evaluator has it


@dataclass(frozen=True)
class Spread:
    """A score over several sample sets that differ in their seeds."""

    mean: float
    deviation: float


def settings_for(
    features: str, *, images: int, neighbours: int, bootstrap: int, allow_singular: bool = False
) -> ScoreSettings:
    """Return the settings that stand for these options."""
    return ScoreSettings(features, images, neighbours, -(-images // SPLIT), bootstrap, allow_singular)


def images_in(samples: Path) -> Path:
    """Return where the images of `samples` are: samples.npz in a folder that the sample stage wrote, else itself."""
    inside = samples / SAMPLE_IMAGES
    return inside if samples.is_dir() and inside.exists() else samples


def shape_in(samples: Path) -> Shape:
    """Return the shape of a set without reading all of it. Raises FileNotFoundError, ScoreError."""
    return shape_of(images_in(samples))


def score_images(
    samples: Path,
    reference: Reference,
    network: FeatureNetwork,
    settings: ScoreSettings,
    tracker: Tracker,
    *,
    seed: int,
    workers: int = 0,
    say: Callable[[str], None] = lambda note: None,
) -> Scores:
    """Score one set of images.

    samples: an npz, a folder of pictures, or a folder with samples.npz.
    say: called with what a reader of the scores has to know of the files, as formats that lose pixels, and files that were
        left out.
    Raises ScoreError when there are fewer images than asked for, when they differ in size from the reference's, or all of
    them are the same.
    """
    file = images_in(samples)
    made_by: dict[str, Any] = {"source": samples.name}
    if file != samples:
        made_by = read_json(samples / SAMPLE_PROTOCOL, way_out="sample the images again")
    found = read_image_set(file)
    for note in found.notes:
        say(f"{samples}: {note}")
    if len(found.images) < settings.images:
        raise ScoreError(
            f"{file} holds {len(found.images)} images, the protocol asks for {settings.images}: sample more, or ask for "
            "fewer with --images (another protocol)"
        )
    if len(found.images) > settings.images:
        say(f"{samples}: of {len(found.images):,} images the first {settings.images:,} are scored")
    chosen = replace(found, images=found.images[: settings.images])
    check_images(chosen.images, reference, file)
    measured = measure_with_progress(network, tracker, f"score {file.name}", workers=workers)(chosen.images)
    values, intervals = compare(measured, reference, settings, seed=seed)
    protocol = protocol_of(network, reference, settings, chosen)
    return Scores(values, intervals, protocol, made_by, measured.features.pool.shape[1])


def spread(found: Sequence[Scores]) -> dict[str, Spread]:
    """Return mean and standard deviation (divisor n - 1) of each score over two or more sets of one protocol."""
    refuse_mixed(found, [f"set {number + 1}" for number in range(len(found))])
    names = [name for name in found[0].values if all(name in one.values for one in found)]
    values = {name: np.array([one.values[name] for one in found], dtype=np.float64) for name in names}
    return {name: Spread(float(column.mean()), float(column.std(ddof=1))) for name, column in values.items()}
