"""Score samples against a reference: Frechet distances, IS, precision and recall, each with what it was made by."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dpar_core.evaluation.features import feature_network
from dpar_core.files import write_json, write_record
from stages import params as P
from stages.artifacts import SAMPLE_IMAGES, artifact_digest
from stages.shared.scoring import make_reference, score_images, settings_of
from stages.sources import SPLIT_NAMES, checked_file
from stages.tracker import Tracker


@dataclass(frozen=True)
class Params:
    seed: int
    data: P.Data
    score: P.Score


@dataclass(frozen=True)
class Inputs:
    manifest: Path
    features: Path
    samples: Path
    seen: Path  # what stage sources saw of score.reference and score.features_file


@dataclass(frozen=True)
class Outputs:
    scores: Path
    metrics: Path


@dataclass(frozen=True)
class BaselineInputs:
    manifest: Path
    features: Path
    samples: Path
    equal_time: Path
    seen: Path


@dataclass(frozen=True)
class BaselineOutputs:
    scores: Path
    metrics: Path
    equal_time: Path
    equal_time_metrics: Path


def run_dpar(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Score the samples of DPAR."""
    _score_all(params, inputs, [(inputs.samples, outputs.scores, outputs.metrics)], tracker, device=device, work=work)


def run_llamagen(
    params: Params, inputs: BaselineInputs, outputs: BaselineOutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Score the samples of the baseline, at equal steps and at equal training time."""
    work_list = [
        (inputs.samples, outputs.scores, outputs.metrics),
        (inputs.equal_time, outputs.equal_time, outputs.equal_time_metrics),
    ]
    _score_all(params, inputs, work_list, tracker, device=device, work=work)


def _score_all(
    params: Params,
    inputs: Inputs | BaselineInputs,
    work_list: list[tuple[Path, Path, Path]],
    tracker: Tracker,
    *,
    device: str,
    work: Path,
) -> None:
    """work_list: samples, their score file with all that made it, and the same scores bare, as a table of DVC shows them."""
    section = params.score
    file = inputs.features if section.features_file is None else Path(section.features_file)
    against = inputs.manifest if section.reference in SPLIT_NAMES else Path(section.reference)
    with ExitStack() as unchanged:
        if section.features_file is not None:
            unchanged.enter_context(checked_file(inputs.seen, "score.features_file", file))
        if against != inputs.manifest and against.is_file():
            unchanged.enter_context(checked_file(inputs.seen, "score.reference", against))
        network = feature_network(section.features, file, device)
        settings = settings_of(section)
        reference = make_reference(section, params.data, inputs.manifest, network, tracker, cache=work)
    tracker.log_input("features", file, network.digest[:16])
    tracker.log_input("reference", against, reference.digest)
    for samples, target, metrics in work_list:
        tracker.log_input(f"samples {samples.name}", samples, artifact_digest(samples / SAMPLE_IMAGES))
        found = score_images(samples, reference, network, settings, tracker, seed=params.seed, workers=section.workers)
        write_record(target, found.to_json())
        write_json(metrics, found.values)
        prefix = "" if samples == work_list[0][0] else "equal_time/"
        tracker.log_metrics({prefix + name: value for name, value in found.values.items()})
