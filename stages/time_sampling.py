"""Stage time_sampling: DPAR and its LlamaGen baseline sample images in turns, so that their speeds can be compared."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dpar_core.generation.parts import timed_parts
from dpar_core.turns import take_turns
from stages import params as P
from stages.shared.pace import SECONDS, Pace, machine_words, wait_for_helpers, write_pace
from stages.shared.sampler import Files, Sampler, log_inputs
from stages.time_training import waits_for, whole_seconds
from stages.tracker import Tracker

LONGEST = 10.0  # seconds of a turn: where a batch takes longer, fewer images are timed, and the file records how many


@dataclass(frozen=True)
class Params:
    sample: P.Sample


@dataclass(frozen=True)
class Inputs:
    dpar: Path
    llamagen: Path
    entropy_model: Path
    tokenizer: Path
    patch_rule: Path


@dataclass(frozen=True)
class Outputs:
    speed: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Sample the same classes and seeds with both models in turns; tokens only, decoding to pixels is the same for both."""
    log_inputs(tracker, inputs, "dpar", "llamagen", "entropy_model")
    models = (
        Sampler(Files(inputs.dpar, inputs.tokenizer, inputs.entropy_model, inputs.patch_rule), params.sample, device=device),
        Sampler(Files(inputs.llamagen, inputs.tokenizer), params.sample, device=device),
    )
    images = min(params.sample.batch_size, params.sample.images)

    def run_once(sampler: Sampler) -> None:
        time_batch(sampler, images, params.sample.seed)

    while images > 1:
        started = time.perf_counter()
        run_once(models[0])
        spent = time.perf_counter() - started
        if spent <= LONGEST:
            break
        images = max(int(images * LONGEST / (2 * spent)), 1)
    wait_for_helpers()
    with tracker.progress(int(SECONDS), "time sampling in turns", unit="s") as bar:
        turns = take_turns(
            lambda: run_once(models[0]),
            lambda: run_once(models[1]),
            seconds=SECONDS,
            units=images,
            most=2 * params.sample.images // images,  # twice the images that the run samples, from each model
            wait=waits_for(device),
            progress=whole_seconds(bar.advance),
        )
    pace = Pace("image", images, turns, machine_words(device))
    parts = {
        name: parts_of(sampler, images, params.sample.seed, seconds=pace.seconds[name])
        for name, sampler in zip(("dpar", "llamagen"), models)
    }
    pace = replace(pace, parts=parts if all(parts.values()) else {})
    write_pace(outputs.speed, pace)
    for name, rate in pace.images_per_s.items():
        tracker.log_metrics({f"speed/sampling_{name}": rate})
    tracker.log_metrics({"speed/sampling_ratio": turns.ratio})


def time_batch(sampler: Sampler, images: int, seed: int) -> Tensor:
    """Sample the images that are timed; return their tokens (images, T)."""
    labels = [sampler.trained_labels[index % len(sampler.trained_labels)] for index in range(images)]
    return sampler.generate(labels, [seed + index for index in range(images)]).tokens


def parts_of(sampler: Sampler, images: int, seed: int, *, seconds: float) -> dict[str, float]:
    """Return the seconds per image of each part of sampling and of decoding to pixels; empty on a GPU (see timed_parts).

    seconds: per image of sampling, measured in turns. One more batch gives the share of each part alone: it does not run in
    turns with the other model's, so its own clock cannot be compared with theirs.
    """
    with timed_parts(sampler.generator) as spent:
        started = time.perf_counter()
        tokens = time_batch(sampler, images, seed)
        whole = time.perf_counter() - started
    if not spent:
        return {}
    spent["choosing tokens and bookkeeping"] = whole - sum(spent.values())
    started = time.perf_counter()
    sampler.pixels(tokens)
    decoding = (time.perf_counter() - started) / images
    return {**{part: seconds * took / whole for part, took in spent.items()}, "decoding to pixels": decoding}
