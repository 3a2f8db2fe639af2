"""Stages train_dpar and train_llamagen: DPAR, and the LlamaGen baseline of the same width, heads and total layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpar_core.data.shards import TokenShards
from dpar_core.files import atomic_folder
from dpar_core.patches.maps import PatchMaps, stated
from stages import params as P
from stages.shared.configs import dpar_config, llamagen_config
from stages.shared.jobs import TrainJob, publish, publish_model, recipe, run_job
from stages.tracker import Tracker


@dataclass(frozen=True)
class Params:
    seed: int
    model: P.Model
    train: P.Train


@dataclass(frozen=True)
class DPARInputs:
    tokens: Path
    patch_maps: Path


@dataclass(frozen=True)
class DPAROutputs:
    model: Path
    metrics: Path
    curve: Path
    timings: Path


@dataclass(frozen=True)
class LlamaGenInputs:
    tokens: Path


@dataclass(frozen=True)
class LlamaGenOutputs:
    model: Path
    snapshots: Path
    metrics: Path
    curve: Path
    timings: Path


def identity(params: Params) -> dict[str, Any]:
    """Return what of the params decides the models: not where and with how many workers they are trained."""
    return {"seed": params.seed, "model": params.model.model_dump(mode="json"), "train": recipe(params.train)}


def _data_shape(shards: TokenShards) -> dict[str, int]:
    meta = shards.meta
    return {"codebook_size": meta.codebook_size, "row_width": meta.row_width, "num_classes": len(meta.classes)}


def classes_of(shards: TokenShards) -> dict[str, Any]:
    """Return what a model's file says of its classes: their names, and the numbers of those without a training image."""
    meta = shards.meta
    counts = np.bincount(shards.labels, minlength=len(meta.classes))
    untrained = np.flatnonzero(counts == 0).tolist()
    return {"classes": list(meta.classes), **({"untrained_classes": untrained} if untrained else {})}


def run_dpar(params: Params, inputs: DPARInputs, outputs: DPAROutputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Train DPAR on token shards joined with their patch lengths."""
    shards = TokenShards(inputs.tokens, "train")
    maps = PatchMaps(inputs.patch_maps, shards)
    tracker.log_input("tokens", inputs.tokens, shards.digest)
    tracker.log_input("patch_maps", inputs.patch_maps, maps.digest)
    config = dpar_config(params.model, **_data_shape(shards))
    tokens, maps_folder = inputs.tokens.resolve(), inputs.patch_maps.resolve()
    job = TrainJob("dpar", config, params.train, params.seed, tokens, patch_maps=maps_folder)
    read = {"tokens": shards.digest, "patch_maps": maps.digest}
    result = run_job(job, read, tracker, section="train", device=device, work=work)
    made_from = {
        **read,
        "tokenizer": shards.meta.tokenizer,
        **classes_of(shards),
        "entropy_model": maps.made_by.entropy_model,
        "rule": vars(maps.rule),
        **stated(maps.made_by.precision),
    }
    publish(result, outputs, made_from, tracker)


def run_llamagen(
    params: Params, inputs: LlamaGenInputs, outputs: LlamaGenOutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Train the LlamaGen baseline; keep it also as it was on the way, for the comparison at equal training time.

    Writes snapshots/step-NNNNNNNN.safetensors for every step that `train.equal_time_step` asks for; none when it is null.
    """
    shards = TokenShards(inputs.tokens, "train")
    tracker.log_input("tokens", inputs.tokens, shards.digest)
    config, training = llamagen_config(params.model, **_data_shape(shards)), params.train
    job = TrainJob(
        "llamagen", config, training, params.seed, inputs.tokens.resolve(), snapshot_steps=training.snapshot_steps()
    )
    read = {"tokens": shards.digest}
    result = run_job(job, read, tracker, section="train", device=device, work=work)
    made_from = {**read, "tokenizer": shards.meta.tokenizer, **classes_of(shards)}
    publish(result, outputs, made_from, tracker)
    with atomic_folder(outputs.snapshots) as folder:
        for step in job.snapshot_steps:
            publish_model(result.store.snapshot_file(step), folder / snapshot_name(step), job, {**made_from, "step": step})


def snapshot_name(step: int) -> str:
    """Return the file name of the baseline as it was at a step."""
    return f"step-{step:08d}.safetensors"
