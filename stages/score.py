"""Score samples against a reference: Frechet distances, IS, precision and recall, each with what it was made by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpar_core.evaluation.features import feature_network
from dpar_core.evaluation.image_sets import read_image_set
from dpar_core.evaluation.metrics import ScoreError
from dpar_core.evaluation.scores import Scores, check_images, compare, protocol_of
from dpar_core.files import read_json, write_json, write_record
from stages import params as P
from stages.artifacts import SAMPLE_IMAGES, SAMPLE_PROTOCOL, artifact_digest
from stages.shared.scoring import make_reference, measure_with_progress, settings_of
from stages.sources import check_file
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
    params: Params, inputs: Any, work_list: list[tuple[Path, Path, Path]], tracker: Tracker, *, device: str, work: Path
) -> None:
    """work_list: samples, their score file with all that made it, and the same scores bare, as a table of DVC shows them."""
    section = params.score
    file = inputs.features if section.features_file is None else Path(section.features_file)
    if section.features_file is not None:
        check_file(inputs.seen, "score.features_file", file)
    if Path(section.reference).is_file():
        check_file(inputs.seen, "score.reference", Path(section.reference))
    network = feature_network(section.features, file, device)
    settings = settings_of(section)
    reference = make_reference(section, params.data, inputs.manifest, network, tracker, cache=work)
    tracker.log_input("features", file, network.digest[:16])
    tracker.log_input("reference", inputs.manifest, reference.digest)
    for samples, target, metrics in work_list:
        found = read_image_set(samples / SAMPLE_IMAGES)
        tracker.log_input(f"samples {samples.name}", samples, artifact_digest(samples / SAMPLE_IMAGES))
        if len(found.images) < section.images:
            raise ScoreError(
                f"{samples} holds {len(found.images)} images, the protocol asks for {section.images}: raise "
                "sample.images or lower score.images"
            )
        chosen = replace(found, images=found.images[: section.images])
        check_images(chosen.images, reference, samples)
        measured = measure_with_progress(network, tracker, f"score {samples.name}", workers=section.workers)(chosen.images)
        values, intervals = compare(measured, reference, settings, seed=params.seed)
        protocol = protocol_of(network, reference, settings, chosen)
        made_by = read_json(samples / SAMPLE_PROTOCOL, way_out="run `dvc repro -f sample_dpar sample_llamagen`")
        scores = Scores(values, intervals, protocol, made_by, measured.features.pool.shape[1])
        write_record(target, scores.to_json())
        write_json(metrics, values)
        prefix = "" if samples == work_list[0][0] else "equal_time/"
        tracker.log_metrics({prefix + name: value for name, value in values.items()})
