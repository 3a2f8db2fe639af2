"""Runs one stage of dvc.yaml: params checked, inputs there, one run at a time, results tracked."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpar_core.files import digest_of
from dpar_core.system import cpus
from pipeline.tracking import open_tracker
from stages.files import artifact_digest
from stages.params import Compute, Params, Section, load_params, precision_lines, section_of, select, settled

A = "artifacts"


@dataclass(frozen=True)
class StageSpec:
    """Where a stage's code is, and which file stands for each field of its Inputs and Outputs."""

    module: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    run: str = "run"
    params: str = "Params"
    inputs_class: str = "Inputs"
    outputs_class: str = "Outputs"


MANIFEST, TOKENS, TOKENIZER = f"{A}/data/manifest.parquet", f"{A}/tokens", f"{A}/tokenizer/tokenizer.safetensors"
ENTROPY_MODEL, PATCH_MAPS = f"{A}/entropy_model/model.safetensors", f"{A}/patch_maps"
CLASSIFIER = f"{A}/features/demo_classifier.safetensors"


def _trained(folder: str) -> dict[str, str]:
    names = {"model": "model.safetensors", "metrics": "metrics.json", "curve": "curve.csv", "timings": "timings.json"}
    return {field: f"{A}/{folder}/{name}" for field, name in names.items()}


STAGES: dict[str, StageSpec] = {
    "data": StageSpec("stages.data", {}, {"manifest": MANIFEST, "metrics": f"{A}/data/metrics.json"}),
    "tokenizer": StageSpec(
        "stages.tokenizer",
        {"manifest": MANIFEST},
        {
            "weights": TOKENIZER,
            "metrics": f"{A}/tokenizer/metrics.json",
            "picture": f"{A}/tokenizer/reconstructions.png",
        },
    ),
    "features": StageSpec(
        "stages.features", {"manifest": MANIFEST}, {"weights": CLASSIFIER, "metrics": f"{A}/features/metrics.json"}
    ),
    "tokenize_images": StageSpec(
        "stages.tokenize_images",
        {"manifest": MANIFEST, "tokenizer": TOKENIZER},
        {"tokens": TOKENS, "metrics": f"{A}/tokens_metrics.json"},
    ),
    "entropy_model": StageSpec("stages.entropy_model", {"tokens": TOKENS}, _trained("entropy_model")),
    "entropies": StageSpec(
        "stages.entropies", {"tokens": TOKENS, "entropy_model": ENTROPY_MODEL}, {"entropies": f"{A}/entropies"}
    ),
    "patch_maps": StageSpec(
        "stages.patch_maps",
        {"tokens": TOKENS, "entropies": f"{A}/entropies"},
        {"patch_maps": PATCH_MAPS, "metrics": f"{A}/patch_maps_metrics.json", "histogram": f"{A}/patch_lengths.csv"},
    ),
    "train_dpar": StageSpec(
        "stages.train",
        {"tokens": TOKENS, "patch_maps": PATCH_MAPS},
        _trained("models/dpar"),
        run="run_dpar",
        inputs_class="DPARInputs",
        outputs_class="DPAROutputs",
    ),
    "train_llamagen": StageSpec(
        "stages.train",
        {"tokens": TOKENS},
        {**_trained("models/llamagen"), "snapshots": f"{A}/models/llamagen/snapshots"},
        run="run_llamagen",
        inputs_class="LlamaGenInputs",
        outputs_class="LlamaGenOutputs",
    ),
    "time_training": StageSpec(
        "stages.time_training",
        {
            "tokens": TOKENS,
            "patch_maps": PATCH_MAPS,
            "dpar": f"{A}/models/dpar/model.safetensors",
            "llamagen": f"{A}/models/llamagen/model.safetensors",
            "snapshots": f"{A}/models/llamagen/snapshots",
        },
        {"speed": f"{A}/speed/training.json", "equal_time": f"{A}/models/llamagen/equal_time.safetensors"},
    ),
    "time_sampling": StageSpec(
        "stages.time_sampling",
        {
            "dpar": f"{A}/models/dpar/model.safetensors",
            "llamagen": f"{A}/models/llamagen/model.safetensors",
            "entropy_model": ENTROPY_MODEL,
            "tokenizer": TOKENIZER,
            "patch_rule": f"{PATCH_MAPS}/rule.json",
        },
        {"speed": f"{A}/speed/sampling.json"},
    ),
    "sample_dpar": StageSpec(
        "stages.sample",
        {
            "model": f"{A}/models/dpar/model.safetensors",
            "entropy_model": ENTROPY_MODEL,
            "tokenizer": TOKENIZER,
            "patch_rule": f"{PATCH_MAPS}/rule.json",
        },
        {"samples": f"{A}/samples/dpar"},
        run="run_dpar",
        inputs_class="DPARInputs",
        outputs_class="DPAROutputs",
    ),
    "sample_llamagen": StageSpec(
        "stages.sample",
        {
            "model": f"{A}/models/llamagen/model.safetensors",
            "equal_time": f"{A}/models/llamagen/equal_time.safetensors",
            "tokenizer": TOKENIZER,
        },
        {"samples": f"{A}/samples/llamagen", "equal_time": f"{A}/samples/llamagen_equal_time"},
        run="run_llamagen",
        inputs_class="LlamaGenInputs",
        outputs_class="LlamaGenOutputs",
    ),
    "score_dpar": StageSpec(
        "stages.score",
        {"manifest": MANIFEST, "features": CLASSIFIER, "samples": f"{A}/samples/dpar"},
        {"scores": f"{A}/scores/dpar.json", "metrics": f"{A}/scores/dpar_metrics.json"},
        run="run_dpar",
    ),
    "score_llamagen": StageSpec(
        "stages.score",
        {
            "manifest": MANIFEST,
            "features": CLASSIFIER,
            "samples": f"{A}/samples/llamagen",
            "equal_time": f"{A}/samples/llamagen_equal_time",
        },
        {
            "scores": f"{A}/scores/llamagen.json",
            "metrics": f"{A}/scores/llamagen_metrics.json",
            "equal_time": f"{A}/scores/llamagen_equal_time.json",
            "equal_time_metrics": f"{A}/scores/llamagen_equal_time_metrics.json",
        },
        run="run_llamagen",
        inputs_class="TwinInputs",
        outputs_class="TwinOutputs",
    ),
    "report": StageSpec(
        "pipeline.report.page",
        {
            "manifest": MANIFEST,
            "tokenizer": f"{A}/tokenizer",
            "tokens": TOKENS,
            "entropy_model": f"{A}/entropy_model",
            "entropies": f"{A}/entropies",
            "patch_maps": PATCH_MAPS,
            "histogram": f"{A}/patch_lengths.csv",
            "models": f"{A}/models",
            "speed": f"{A}/speed",
            "samples": f"{A}/samples",
            "scores": f"{A}/scores",
        },
        {"report": f"{A}/report"},
    ),
}


class StageError(ValueError):
    """A stage cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedStage:
    """A stage with its code imported."""

    spec: StageSpec
    run: Any
    params: type
    inputs: type
    outputs: type
    identity: Callable[[Any], dict[str, Any]]  # what of its params decides its outputs, as plain data

    def bind(self, root: Path) -> tuple[Any, Any]:
        """Return its Inputs and Outputs with paths below `root`."""
        inputs = self.inputs(**{name: root / path for name, path in self.spec.inputs.items()})
        return inputs, self.outputs(**{name: root / path for name, path in self.spec.outputs.items()})


def load_stage(name: str) -> LoadedStage:
    """Import a stage. Raises StageError for an unknown name."""
    if name not in STAGES:
        raise StageError(f"there is no stage {name!r}: expected one of {', '.join(STAGES)}")
    spec = STAGES[name]
    module = importlib.import_module(spec.module)
    names = (spec.run, spec.params, spec.inputs_class, spec.outputs_class)
    return LoadedStage(spec, *(getattr(module, name) for name in names), getattr(module, "identity", plain))


def run_stage(name: str, *, root: Path, params_file: Path) -> None:
    """Run a stage as dvc does. Raises ParamsError, StageError, or what the stage says is wrong."""
    asked = load_params(params_file)
    stage = load_stage(name)
    device = device_of(asked.compute)
    params = settled(asked, device)
    chosen = select(params, stage.params)
    inputs, outputs = stage.bind(root)
    made_by = _made_by(name, stage.identity(chosen), inputs)
    # One work folder for one set of params and inputs: a rerun after a crash continues, changed params start afresh.
    work = root / "work" / name / digest_of(made_by)
    set_threads(params.compute)
    if name != "report":
        _print_precisions(select(asked, stage.params), device)
    with _alone(work.parent, name):
        work.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(outputs):
            getattr(outputs, field.name).parent.mkdir(parents=True, exist_ok=True)
        with open_tracker(name, params, chosen, root=root) as tracker:
            stage.run(chosen, inputs, outputs, tracker, device=device, work=work)
        for old in work.parent.iterdir():
            if old.is_dir() and old != work:
                shutil.rmtree(old)


def _print_precisions(params: Any, device: str) -> None:
    """Print what `auto` means on this device, and a warning for bfloat16 that it emulates."""
    for field in dataclasses.fields(params):
        section = getattr(params, field.name)
        if isinstance(section, Section):
            for line in precision_lines(section_of(field), section, device):
                print(line, flush=True)


def plain(params: Any) -> dict[str, Any]:
    """Return a stage's Params as plain data."""
    values = {section_of(field): getattr(params, field.name) for field in dataclasses.fields(params)}
    return {name: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for name, v in values.items()}


def _made_by(name: str, params: dict[str, Any], inputs: Any) -> dict[str, Any]:
    digests = {}
    for field in dataclasses.fields(inputs):
        path = getattr(inputs, field.name)
        if not path.exists():
            maker = next((n for n, s in STAGES.items() if any(str(path).endswith(out) for out in s.outputs.values())), None)
            run = f"`dvc repro {maker}`" if maker else "`dvc repro`"
            raise StageError(f"stage {name} reads {path}, which is missing: run {run} first")
        digests[field.name] = artifact_digest(path)
    return {"stage": name, "params": params, "inputs": digests}


def device_of(compute: Compute) -> str:
    """Return "cpu" or "cuda" for compute.device. Raises StageError when there is none such here."""
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise StageError("compute.device is cuda, but no CUDA device is visible here: set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if compute.device == "auto" else compute.device


def set_threads(compute: Compute) -> None:
    """Give this process the CPU threads of compute.threads."""
    import torch

    torch.set_num_threads(compute.threads or cpus())


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Keep others out while a stage runs: a killed `dvc repro` leaves its stage running, and the next must wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            print(f"stage {name} is running already in process {holder}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def params_of(stage: LoadedStage) -> list[str]:
    """Return the sections of params.yaml that a stage depends on, as dvc.yaml lists them."""
    return [section_of(field) for field in dataclasses.fields(stage.params)]


def whole_params(params: Params) -> dict[str, Any]:
    """Return all params flattened to dotted names, for tracking."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", params.model_dump(mode="json"))
    return flat
