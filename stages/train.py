"""Stages train_dpar and train_llamagen: DPAR, and the LlamaGen twin of the same width, heads and total layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpar_core.dpar import DPARConfig
from dpar_core.gpt import GPTConfig
from dpar_core.patch_maps import PatchMaps
from dpar_core.shards import TokenShards
from stages import params as P
from stages.tracker import Tracker
from stages.training import Job, copy_whole, publish, publish_model, run_job


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
    equal_time: Path
    metrics: Path
    curve: Path
    timings: Path


def run_dpar(
    params: Params, inputs: DPARInputs, outputs: DPAROutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Train DPAR on token shards joined with their patch lengths."""
    shards = TokenShards(inputs.tokens, "train")
    maps = PatchMaps(inputs.patch_maps, shards)
    tracker.log_input("tokens", inputs.tokens, shards.digest)
    tracker.log_input("patch_maps", inputs.patch_maps, maps.digest)
    model = params.model
    config = DPARConfig(
        codebook_size=shards.meta.codebook_size,
        row_width=shards.meta.row_width,
        width=model.width,
        heads=model.heads,
        encoder_layers=model.encoder_layers,
        patch_layers=model.patch_layers,
        decoder_layers=model.decoder_layers,
        num_classes=len(shards.meta.classes),
        ffn_multiple=model.ffn_multiple,
        position_encoding=model.position_encoding,
        dropout=model.dropout,
        class_dropout=model.class_dropout,
    )
    job = Job(
        "dpar", config, params.train, params.seed, inputs.tokens.resolve(), patch_maps=inputs.patch_maps.resolve()
    )
    read = {"tokens": shards.digest, "patch_maps": maps.digest}
    result = run_job(job, read, tracker, section="train", device=device, work=work)
    made_from = {
        **read,
        "tokenizer": shards.meta.tokenizer,
        "entropy_model": maps.entropy_model_digest,
        "rule": vars(maps.rule),
    }
    publish(result, outputs, made_from, tracker)


def run_llamagen(
    params: Params, inputs: LlamaGenInputs, outputs: LlamaGenOutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Train DPAR's LlamaGen twin; keep it also as it was at `train.equal_time_step`.

    Without such a step, equal_time is the final model.
    """
    shards = TokenShards(inputs.tokens, "train")
    tracker.log_input("tokens", inputs.tokens, shards.digest)
    model, training = params.model, params.train
    config = GPTConfig(
        codebook_size=shards.meta.codebook_size,
        row_width=shards.meta.row_width,
        width=model.width,
        heads=model.heads,
        layers=model.layers,
        ffn_multiple=model.ffn_multiple,
        num_classes=len(shards.meta.classes),
        dropout=model.dropout,
        class_dropout=model.class_dropout,
    )
    snapshots = () if training.equal_time_step is None else (training.equal_time_step,)
    job = Job(
        "llamagen", config, training, params.seed, inputs.tokens.resolve(), snapshot_steps=snapshots
    )
    read = {"tokens": shards.digest}
    result = run_job(job, read, tracker, section="train", device=device, work=work)
    made_from = {**read, "tokenizer": shards.meta.tokenizer}
    publish(result, outputs, made_from, tracker)
    if snapshots:
        (step,) = snapshots
        publish_model(result.store.snapshot_file(step), outputs.equal_time, job, {**made_from, "step": step})
    else:
        copy_whole(outputs.model, outputs.equal_time)
