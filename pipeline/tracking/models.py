"""The models of a stage as MLflow shows them: what they are, their digest, where their file is. No weights are copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpar_core.evaluation.sample_files import SampledWith
from dpar_core.files import read_record, read_weights_header, sha256_file
from stages.artifacts import EQUAL_TIME, FOLDER, MODELS, OUTPUTS, SAMPLE_PROTOCOL, SAMPLES, SCORES, Artifact
from stages.params import dotted

EQUAL_TIME_PREFIX = "equal_time/"  # of metrics that stages write of the baseline at equal training time


@dataclass(frozen=True)
class LoggedModel:
    """A file of weights.

    made: by this stage, else used by it.
    prefix: of the stage's metrics that are this model's.
    """

    name: str
    digest: str
    kind: str
    made: bool
    prefix: str
    params: dict[str, str]
    tags: dict[str, str]

    def metrics_of(self, names: Mapping[str, Any]) -> list[str]:
        """Return those of a stage's metrics that speak of this model."""
        if self.prefix:
            return [name for name in names if name.startswith(self.prefix)]
        return [name for name in names if not name.startswith((EQUAL_TIME_PREFIX, "speed/"))]


def models_of(stage: str, root: Path) -> list[LoggedModel]:
    """Return the models that a stage wrote, sampled from or scored. root: the project's folder.

    A model that samples came from is named only where its file is still the one of that time.
    """
    outputs = list(OUTPUTS[stage].values())
    found = [_read(one, root, made=True) for one in outputs if one.name.endswith(".safetensors")]
    for name, artifact in MODELS.items():
        if SAMPLES[name] in outputs or SCORES[name]["scores"] in outputs:
            protocol = read_record(SAMPLES[name].below(root / FOLDER) / SAMPLE_PROTOCOL, way_out="sample the images again")
            made_by = SampledWith(**protocol["made_by"])
            model = _read(artifact, root, made=False) if artifact.below(root / FOLDER).exists() else None
            found.append(model if model is not None and model.digest == made_by.model else None)
    return [model for model in found if model is not None]


def model_used(name: str, root: Path) -> LoggedModel | None:
    """Return a trained model of MODELS by its name, as one that is sampled from."""
    return _read(MODELS[name], root, made=False)


def _read(artifact: Artifact, root: Path, *, made: bool) -> LoggedModel | None:
    path = artifact.below(root / FOLDER)
    header = read_weights_header(path)
    if header["kind"] == "no_classifier":
        return None
    name = next((name for name, one in MODELS.items() if one == artifact), artifact.stage)
    # Long lists (the names of a thousand classes) are in the file itself.
    facts = {**header["config"], **header["meta"]}
    params = {key: str(value) for key, value in dotted(facts).items() if len(str(value)) <= 250}
    digest = sha256_file(path)[:16]
    tags = {"dpar.file": artifact.path, "dpar.megabytes": f"{path.stat().st_size / 1e6:.1f}"}
    prefix = EQUAL_TIME_PREFIX if artifact == EQUAL_TIME else ""
    return LoggedModel(name, digest, header["kind"], made, prefix, params, tags)
