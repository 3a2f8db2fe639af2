"""Stage entropy_model: train the unconditional GPT whose uncertainty cuts images into patches (DPAR, Sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpar_core.data.shards import TokenShards
from stages import params as P
from stages.shared.configs import entropy_config
from stages.shared.jobs import TrainJob, publish, recipe, run_job
from stages.tracker import Tracker


@dataclass(frozen=True)
class Params:
    seed: int
    entropy_model: P.EntropyModel


@dataclass(frozen=True)
class Inputs:
    tokens: Path


@dataclass(frozen=True)
class Outputs:
    model: Path
    metrics: Path
    curve: Path
    timings: Path


def identity(params: Params) -> dict[str, Any]:
    """Return what of the params decides the model: not where and with how many workers it is trained."""
    section = params.entropy_model.model_dump(mode="json")
    return {"seed": params.seed, "entropy_model": section | {"train": recipe(params.entropy_model.train)}}


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Train the entropy model on token shards and write its weights with curve, metrics and timings."""
    section = params.entropy_model
    shards = TokenShards(inputs.tokens, "train")
    tracker.log_input("tokens", inputs.tokens, shards.digest)
    config = entropy_config(section, codebook_size=shards.meta.codebook_size, row_width=shards.meta.row_width)
    job = TrainJob("entropy_model", config, section.train, params.seed, inputs.tokens.resolve())
    made_from = {"tokens": shards.digest, "tokenizer": shards.meta.tokenizer}
    result = run_job(job, made_from, tracker, section="entropy_model.train", device=device, work=work)
    publish(result, outputs, made_from, tracker)
