"""Stage entropy_model: train the unconditional GPT whose uncertainty cuts images into patches (DPAR, Sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpar_core.gpt import GPTConfig
from dpar_core.shards import TokenShards
from stages import params as P
from stages.tracker import Tracker
from stages.training import Job, publish, run_job


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


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Train the entropy model on token shards and write its weights with curve, metrics and timings."""
    section = params.entropy_model
    shards = TokenShards(inputs.tokens, "train")
    tracker.log_input("tokens", inputs.tokens, shards.digest)
    config = GPTConfig(
        codebook_size=shards.meta.codebook_size,
        row_width=shards.meta.row_width,
        width=section.width,
        heads=section.heads,
        layers=section.layers,
        ffn_multiple=section.ffn_multiple,
        num_classes=None,
        dropout=section.dropout,
    )
    job = Job("entropy_model", config, section.train, params.seed, inputs.tokens.resolve())
    made_from = {"tokens": shards.digest, "tokenizer": shards.meta.tokenizer}
    result = run_job(job, made_from, tracker, section="entropy_model.train", device=device, work=work)
    publish(result, outputs, made_from, tracker)
