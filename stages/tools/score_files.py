"""Scores of anyone's images, outside the workflow: npz files and folders of PNGs against any reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.metrics import ScoreError
from dpar_core.files import read_json
from stages import params as P
from stages import score
from stages.artifacts import SAMPLE_IMAGES, SAMPLE_PROTOCOL
from stages.shared.scoring import measure
from stages.tracker import Tracker

SPLIT = 5000  # images a part of the inception score, as the ADM evaluator has it


@dataclass(frozen=True)
class Spread:
    """A score over several sample sets that differ in their seeds."""

    mean: float
    deviation: float


def settings_for(
    features: str, reference: str, *, images: int, neighbours: int, bootstrap: int, allow_singular: bool = False,
    workers: int = 0,
) -> P.Score:
    """Return the score section that stands for these options."""
    return P.Score(
        features=features, features_file=None, reference=reference, images=images, neighbours=neighbours,
        splits=-(-images // SPLIT), bootstrap=bootstrap, allow_singular=allow_singular, workers=workers,
        demo_classifier=P.DemoClassifier(steps=1, batch_size=1, lr=1.0),  # of training it, which nothing here does
    )  # fmt: skip


def score_images(
    samples: Path, reference: score.Reference, network: FeatureNetwork, settings: P.Score, tracker: Tracker, *, seed: int
) -> dict[str, Any]:
    """Score one set of images; returns what a score file of the workflow holds.

    samples: an npz, a folder of PNGs, or a folder with samples.npz. Raises ScoreError when it has fewer images than asked
    for, or all of them are the same.
    """
    made_by: dict[str, Any] = {"source": samples.name}
    if (samples / SAMPLE_IMAGES).exists():
        made_by = read_json(samples / SAMPLE_PROTOCOL, way_out="sample the images again")
        samples = samples / SAMPLE_IMAGES
    images = score.read_images(samples)
    if len(images) < settings.images:
        raise ScoreError(
            f"{samples} holds {len(images)} images, the protocol asks for {settings.images}: draw more, or ask for "
            "fewer with --images (another protocol)"
        )
    images = images[: settings.images]
    score.check_images(images, reference, samples)
    with tracker.progress(len(images), f"score {samples.name}", unit="images") as progress:
        measured = measure(network, images, workers=settings.workers, done=progress.advance)
    protocol = score.protocol_of(network, reference, settings, images=len(images), image_size=images.shape[1])
    scores, intervals = score.compare(measured, reference, settings, seed=seed)
    return score.score_file(scores, intervals, protocol, made_by)


def spread(found: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Return mean and standard deviation (divisor n - 1) of each score over two or more sets of one protocol."""
    refuse_mixed(found, [f"set {place + 1}" for place in range(len(found))])
    names = [name for name in found[0] if name.startswith("eval/") and all(name in one for one in found)]
    values = {name: np.array([one[name] for one in found], dtype=np.float64) for name in names}
    return {name: Spread(float(column.mean()), float(column.std(ddof=1))) for name, column in values.items()}


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, in words, where the protocols of score files differ."""
    protocols = [one["protocol"] for one in found]
    names = dict.fromkeys(name for one in protocols for name in one)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in protocols}) > 1]
    return [f"{name} {' / '.join(str(one.get(name)) for one in protocols)}" for name in differing]


def refuse_mixed(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse to set scores of different protocols beside each other. Raises ScoreError in one sentence."""
    if len({one["protocol_id"] for one in found}) > 1:
        ids = ", ".join(f"{name} {one['protocol_id']}" for name, one in zip(names, found))
        raise ScoreError(
            f"these scores are of different protocols ({ids}) and are not compared: they differ in "
            f"{'; '.join(differences(found))}; score both alike, or say --force"
        )


def read_scores(path: Path) -> dict[str, Any]:
    """Read a score file. Raises FileNotFoundError, ScoreError."""
    if not path.exists():
        raise FileNotFoundError(f"no scores at {path}: make them with `dpar-cli score --out {path}`")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not {"protocol", "protocol_id", "intervals"} <= found.keys():
        raise ScoreError(f"{path} is no score file: expected one that `dpar-cli score` or `dvc repro` has written")
    return found
