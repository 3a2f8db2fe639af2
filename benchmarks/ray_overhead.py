"""What Ray Train takes of a training step at size B.

    python -m benchmarks.ray_overhead [--size B] [--batch 8] [--steps 60] [--cluster]

Trains the LlamaGen baseline of a size (16,384 codes) twice at once: through Ray Train on one worker with all cores (in local
mode, as the stages do on one machine; with --cluster in an actor of a cluster), and in a plain process with the same
settings of the allocator. The two take turns of two steps; while the plain one works, every process that Ray runs is
stopped (SIGSTOP), the worker included. So both see the same machine within seconds, and what a neighbour takes falls on
both. A turn of Ray's ends with its report. Shown: the median over pairs of neighbouring turns of
how much longer Ray's took, and the 95 % interval of that median by redrawing pairs.

Beside that, from /proc: the CPU seconds of every process that Ray runs apart from the worker (gcs, raylet, controller and
its helpers, agents; none in local mode) and of the driver, in Ray's turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import ray
import torch

from benchmarks.train_memory import GRID, make_data
from dpar_core.data.shards import TokenShards
from dpar_core.models.gpt import GPTConfig
from dpar_core.models.sizes import GATE_SIZES, GateSize
from dpar_core.system import cpus
from dpar_core.training import allocator
from dpar_core.training.parallel import Ranks
from stages.params import load_params, settled
from stages.shared.jobs import TrainJob, train_job
from stages.workers import cluster
from stages.workers import fit as ray_train

ROOT = Path(__file__).resolve().parents[1]
MODULE = "benchmarks.ray_overhead"
SHAPES = {"tiny": GateSize(64, 4, 2), "S": GATE_SIZES["S"], "B": GATE_SIZES["B"]}
EVERY = 2  # steps of a turn
CODES = 16384  # of the model; the shards made here draw on the first 1,024 of them, which costs a step the same


class Turns:
    """One of two processes that work in turn. The one whose `first` is true begins."""

    def __init__(self, folder: Path, *, first: bool) -> None:
        self.mine, self.other = (folder / name for name in (("a", "b") if first else ("b", "a")))
        self.begins, self.started, self.seconds = first, 0.0, []

    def change(self) -> None:
        """End a turn, let the other have one, and begin the next; the first call begins the first."""
        if self.started:
            self.seconds.append(time.perf_counter() - self.started)
            self.give()
        elif not self.begins:
            self.give()
        self.take()
        self.started = time.perf_counter()

    def give(self) -> None:
        with open(self.other, "w") as pipe:
            pipe.write("x")

    def take(self) -> None:
        with open(self.mine) as pipe:
            pipe.read()


class Still(Turns):
    """The turns of the plain process: everything that Ray runs stands still in them."""

    def __init__(self, folder: Path, driver: int) -> None:
        super().__init__(folder, first=False)
        self.driver, self.stopped = psutil.Process(driver), []

    def take(self) -> None:
        super().take()
        own = {os.getpid()}
        self.stopped = [process for process in self.driver.children(recursive=True) if process.pid not in own]
        for process in self.stopped:
            process.suspend()

    def give(self) -> None:
        for process in self.stopped:
            process.resume()
        super().give()


class Paced:
    """Hooks that change turns whenever a log line has been passed on to `hooks`."""

    def __init__(self, turns: Turns, hooks=None) -> None:
        self.turns, self.hooks = turns, hooks

    def begin(self, step: int) -> None:
        if self.hooks is not None:
            self.hooks.begin(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.hooks is not None:
            self.hooks.log(step, metrics)
        if "train/loss" in metrics:
            self.turns.change()

    def checkpoint(self, step: int, address: str) -> None:
        if self.hooks is not None:
            self.hooks.checkpoint(step, address)


def with_ray(job: TrainJob, root: str, folder: Path, *, ranks, hooks) -> list[float]:
    """Train in Ray's worker; return the seconds of its turns."""
    turns = Turns(folder, first=True)
    train_job(job, root, ranks=ranks, hooks=Paced(turns, hooks))
    turns.give()
    return turns.seconds


def plain(size: str, batch: int, steps: int, data: Path, driver: int) -> None:
    """Train without Ray in this process and print the seconds of its turns as JSON."""
    torch.set_num_threads(cpus())
    turns = Still(data, driver)
    try:
        with tempfile.TemporaryDirectory() as root:
            train_job(make_job(size, batch, steps, data), root, ranks=Ranks(), hooks=Paced(turns))
    finally:
        for process in turns.stopped:
            process.resume()
    print(json.dumps(turns.seconds))


class Meter:
    """Reads CPU seconds of Ray's processes, and of this one, whenever a log line arrives: only Ray's turns count."""

    def __init__(self, plain_process: subprocess.Popen) -> None:
        self.without, self.points = plain_process.pid, []

    def __call__(self, event: ray_train.Event) -> None:
        if event.kind != "log":
            return
        ray_seconds = worker = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                times, name = process.cpu_times(), " ".join(process.cmdline())
            except psutil.Error:
                continue
            if process.pid == self.without:
                continue
            if "RayTrainWorker" in name or "stages.workers.local" in name:
                worker += times.user + times.system
            else:
                ray_seconds += times.user + times.system
        self.points.append((event.step, ray_seconds, worker))


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median of ratios (n,)."""
    medians = np.median(np.random.default_rng(0).choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def make_job(size: str, batch: int, steps: int, data: Path) -> TrainJob:
    width, heads, layers = SHAPES[size]
    meta = TokenShards(data / "tokens", "train").meta
    config = GPTConfig(CODES, GRID, width, heads, layers, num_classes=len(meta.classes), dropout=0.1)
    training = settled(load_params(ROOT / "params" / "demo.yaml"), "cpu").train.model_copy(
        update={
            "steps": steps,
            "batch_size": batch,
            "log_every": EVERY,
            "validate_every": 10**6,
            "checkpoint_every": 10**6,
            "validation_images": batch,
            "workers": 1,
            "accumulate": 1,
        }
    )
    return TrainJob("llamagen", config, training, 0, data / "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="B")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--plain-on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--driver", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = (options.size, options.batch, options.steps)
    if options.plain_on is not None:
        return plain(*asked, options.plain_on, options.driver)
    count = cpus()
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        make_data(data, 500)
        for name in "ab":
            os.mkfifo(data / name)
        job = make_job(*asked, data)
        scale = ray_train.Scale.of(job.training, device="cpu")
        words = [sys.executable, "-m", MODULE, *zip_words(asked), "--plain-on", str(data), "--driver", str(os.getpid())]
        beside = subprocess.Popen(words, env={**os.environ, **allocator.ENVIRONMENT}, stdout=subprocess.PIPE, text=True)
        try:
            meter, root = Meter(beside), str(data / "run")
            function = partial(importlib.import_module(MODULE).with_ray, job, root, data)  # found by its name
            with cluster.connected() if options.cluster else contextlib.nullcontext():
                with_turns = ray_train.fit(
                    function, root=root, work=data / "work", scale=scale, section="train", on_event=meter
                )
            without_turns = json.loads(beside.communicate()[0].splitlines()[-1])
        finally:
            beside.kill()
    # The first turn of each still fills caches and compiles kernels.
    with_ray_s, without_s = (np.array(times[1:]) / EVERY for times in (with_turns, without_turns))
    pairs = min(len(with_ray_s), len(without_s))
    ratios = with_ray_s[:pairs] / without_s[:pairs]
    first, last = meter.points[1], meter.points[-1]
    steps, of_ray, of_worker = (last[i] - first[i] for i in range(3))
    share = of_ray / (of_ray + of_worker)
    versions = f"Ray {ray.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    said = [*zip_words(asked), *(["--cluster"] if options.cluster else [])]
    print(f"python -m {MODULE} {' '.join(said)}: {versions}, {count} CPUs, bf16")
    print(f"{'':34}{'CPU s per step':>14}{'share':>10}")
    print(f"{'the worker':34}{of_worker / steps:>14.3f}{1 - share:>10.2%}")
    print(f"{'Ray and the driver':34}{of_ray / steps:>14.3f}{share:>10.2%}")
    slower, (low, high) = float(np.median(ratios)) - 1, interval(ratios)
    within, without = float(np.median(with_ray_s)), float(np.median(without_s))
    print(
        f"a step by the clock: {within:.3f} s with Ray, {without:.3f} s without; of {pairs} pairs of turns the median is "
        f"{slower:+.1%} (95 % interval {low - 1:+.1%} to {high - 1:+.1%})"
    )
    result = {
        "ray_share_of_cpu": round(share, 4),
        "step_s": round(within, 3),
        "plain_step_s": round(without, 3),
        "slower_by": round(slower, 4),
        "slower_by_interval": [round(low - 1, 4), round(high - 1, 4)],
        "pairs": pairs,
        "size": options.size,
        "batch": options.batch,
        "cluster": options.cluster,
    }
    print("RESULT", json.dumps(result))


def zip_words(asked: tuple) -> list[str]:
    """Return the command-line words for size, batch and steps."""
    return [word for name, value in zip(("--size", "--batch", "--steps"), asked) for word in (name, str(value))]


if __name__ == "__main__":
    main()
