"""Stage time_training: DPAR and its LlamaGen baseline train in turns, and the baseline is taken at equal training time.

Two models that were trained one after the other cannot be compared by those clocks: whatever else ran on the machine
slowed one of them. Here steps of both alternate within seconds. The step at which the baseline had trained as long as
DPAR follows from their ratio, and is recorded in the file of speeds and in the model that is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dpar_core.data.shards import TokenShards
from dpar_core.models.load import read_trained
from dpar_core.training import parallel
from dpar_core.training.optim import adamw, clip_gradients
from dpar_core.training.parallel import Ranks
from dpar_core.turns import take_turns
from stages import params as P
from stages.shared.jobs import ModelKind, TrainData, TrainJob, TrainObjective, build, copy_whole
from stages.shared.pace import SECONDS, Pace, machine_words, wait_for_helpers, write_pace
from stages.tracker import Tracker

BATCHES = 4  # steps of data that the turns go round: the number of patches differs between them


@dataclass(frozen=True)
class Params:
    seed: int
    train: P.Train


@dataclass(frozen=True)
class Inputs:
    tokens: Path
    patch_maps: Path
    dpar: Path
    llamagen: Path
    snapshots: Path


@dataclass(frozen=True)
class Outputs:
    speed: Path
    equal_time: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Time steps of both models in turns and copy the baseline's snapshot that had trained as long as DPAR.

    Each step is one worker's share: its micro-batches forward and backward, clipping and the optimizer's update. Data,
    validation, checkpoints and communication between workers are left out. Raises ValueError in a sentence when the
    models were trained on other tokens.
    """
    tokens = inputs.tokens.resolve()
    digest = TokenShards(tokens, "train").digest
    steps = []
    models: tuple[tuple[ModelKind, Path, Path | None], ...] = (
        ("dpar", inputs.dpar, inputs.patch_maps.resolve()),
        ("llamagen", inputs.llamagen, None),
    )
    for name, file, maps in models:
        trained = read_trained(file, name, made_with={"tokens": digest})
        tracker.log_input(name, file, trained.digest)
        job = TrainJob(name, trained.config, params.train, params.seed, tokens, patch_maps=maps)
        steps.append(training_step(job, torch.device(device)))
        del trained
    wait_for_helpers()
    with tracker.progress(int(SECONDS), "time training in turns", unit="s") as bar:
        turns = take_turns(
            *steps,
            seconds=SECONDS,
            most=params.train.steps // 5,  # a run of a dozen steps is not timed longer than it took
            wait=waits_for(device),
            progress=whole_seconds(bar.advance),
        )
    pace = Pace("step", params.train.batch_size // params.train.workers, turns, machine_words(device))
    chosen, needed = choose(inputs, params.train, turns.ratio)
    copy_whole(chosen, outputs.equal_time)
    step = step_of(chosen, params.train.steps)
    write_pace(outputs.speed, pace, equal_time={"step": step, "needed": needed, "steps": params.train.steps})
    for model, rate in pace.images_per_s.items():
        tracker.log_metrics({f"speed/training_{model}": rate})
    tracker.log_metrics({"speed/training_ratio": turns.ratio, "equal_time/step": step})


def choose(inputs: Inputs, train: P.Train, ratio: float) -> tuple[Path, float]:
    """Return the baseline's model that had trained about as long as DPAR, and the step that would have been exact.

    ratio: how many times as fast as the baseline's per step of DPAR is. With `equal_time_step: auto` it is the snapshot
    (or final model) whose step is nearest on a scale of ratios; with a number the snapshot of that step; with null the
    final model.
    """
    needed = train.steps / ratio
    kept = {step_of(path, train.steps): path for path in sorted(inputs.snapshots.glob("step-*.safetensors"))}
    if isinstance(train.equal_time_step, int) and train.equal_time_step in kept:
        return kept[train.equal_time_step], needed
    kept[train.steps] = inputs.llamagen
    if train.equal_time_step != "auto":
        return inputs.llamagen, needed
    return kept[min(kept, key=lambda step: max(step / needed, needed / step))], needed


def step_of(path: Path, last: int) -> int:
    """Return the step of a snapshot by its name; of any other model, the last one."""
    found = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
    return int(found[1]) if found else last


def training_step(job: TrainJob, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one optimizer step of a job on one worker's share of the data."""
    training = job.training
    model = build(job.config, job.seed).to(device)
    if training.compile:
        parallel.compile_blocks(model)
    if training.activation_checkpointing:
        parallel.checkpoint_activations(model)
    model.train()
    settings, objective = job.settings(), TrainObjective(job.config)
    optimizer = adamw(model.named_parameters(), settings.optim)
    parameters = list(model.parameters())
    data = TrainData(job, Ranks(0, training.workers, device))
    batches = [[data.micro_batch(step, micro).to(device) for micro in range(training.accumulate)] for step in range(BATCHES)]
    taken = 0

    def step() -> None:
        nonlocal taken
        micros = batches[taken % BATCHES]
        for batch in micros:
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                loss = objective.loss(model, batch) / len(micros)
            loss.backward()
        clip_gradients(parameters, settings.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken += 1

    return step


def waits_for(device: str) -> Callable[[], None]:
    """Return what waits until a device has done all that was asked of it."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def whole_seconds(advance: Callable[[int], object]) -> Callable[[float], None]:
    """Turn durations into steps of whole seconds."""
    spent, shown = 0.0, 0

    def add(seconds: float) -> None:
        nonlocal spent, shown
        spent += seconds
        advance(int(spent) - shown)
        shown = int(spent)

    return add
