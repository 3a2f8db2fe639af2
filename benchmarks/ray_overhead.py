"""What Ray Train takes of a training step at size B.

    python benchmarks/ray_overhead.py [--size B] [--batch 8] [--steps 30] [--turns 3]

Trains the LlamaGen twin of a size (16,384 codes) through Ray Train on one worker with all cores, its log lines reported
every two steps, and adds up from /proc the CPU seconds of every process that Ray runs apart from the worker itself (gcs,
raylet, controller and its helpers, agents) and of the driver, between the third step and the last. Beside that, the time
that the worker itself spent in reporting, and the clock's verdict: the same steps in a plain process with the same
settings of the allocator, the two taking turns, medians of the steps' times, and the 95 % interval of the difference that
redrawing these times gives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
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

from dpar_core import allocator
from dpar_core.gpt import GPTConfig
from dpar_core.parallel import Ranks
from dpar_core.shards import TokenShards
from stages import ray_train
from stages.params import load_params
from stages.training import Job, train_job

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
SHAPES = {"tiny": (64, 4, 2), "S": (384, 6, 6), "B": (768, 12, 12)}
CODES = 16384  # of the model; the shards made here draw on the first 1,024 of them, which costs a step the same


class Meter:
    """Reads CPU seconds of Ray's processes and of this one whenever a log line arrives."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float, float]] = []

    def __call__(self, event: dict) -> None:
        if event["event"] != "log":
            return
        ray_seconds = worker = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                times, name = process.cpu_times(), " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "RayTrainWorker" in name:
                worker += times.user + times.system
            else:
                ray_seconds += times.user + times.system
        self.points.append((event["step"], time.monotonic(), ray_seconds, worker))


def measured(job: Job, root: str, *, ranks, hooks) -> dict:
    """Train, adding up the time spent in hooks."""
    spent = {"seconds": 0.0, "steps": []}

    def timed(method):
        def call(step, *arguments):
            started = time.perf_counter()
            method(step, *arguments)
            spent["seconds"] += time.perf_counter() - started
            if step > 2 and arguments and "perf/step_time" in arguments[0]:
                spent["steps"].append(arguments[0]["perf/step_time"])

        return call

    for name in ("log", "checkpoint"):
        setattr(hooks, name, timed(getattr(hooks, name)))
    train_job(job, root, ranks=ranks, hooks=hooks)
    return spent


class Silent:
    """Hooks that nobody listens to."""

    def begin(self, step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def checkpoint(self, step: int, address: str) -> None: ...


def plain(size: str, batch: int, steps: int, data: Path) -> None:
    """Train without Ray in this process and print the steps' times as JSON."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(measured(make_job(size, batch, steps, data), root, ranks=Ranks(), hooks=Silent())["steps"]))


def interval(ray_times: list[float], plain_times: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of how much slower Ray's median step is, as a share."""
    rng = np.random.default_rng(0)
    ray_medians, plain_medians = (
        np.median(rng.choice(times, (2000, len(times))), axis=1) for times in (ray_times, plain_times)
    )
    low, high = np.quantile(ray_medians / plain_medians - 1, (0.025, 0.975))
    return float(low), float(high)


def make_job(size: str, batch: int, steps: int, data: Path) -> Job:
    from train_memory import GRID

    width, heads, layers = SHAPES[size]
    meta = TokenShards(data / "tokens", "train").meta
    config = GPTConfig(CODES, GRID, width, heads, layers, num_classes=len(meta.classes), dropout=0.1)
    training = load_params(ROOT / "params" / "demo.yaml").train.model_copy(
        update={
            "steps": steps, "batch_size": batch, "log_every": 2, "validate_every": 10**6,
            "checkpoint_every": 10**6, "validation_images": batch, "workers": 1, "accumulate": 1,
        }
    )  # fmt: skip
    return Job("llamagen", config, training, 0, data / "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="B")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--plain-on", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = (options.size, options.batch, options.steps)
    if options.plain_on is not None:
        return plain(*asked, options.plain_on)
    from train_memory import make_data

    cpus = len(os.sched_getaffinity(0))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    times: dict[str, list[float]] = {"ray": [], "plain": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        make_data(data, 500)
        job = make_job(*asked, data)
        scale = ray_train.Scale.of(job.training, device="cpu")
        words = [sys.executable, __file__, *zip_words(asked), "--plain-on", str(data)]
        for turn in range(options.turns):
            meter, root = Meter(), str(data / f"run{turn}")
            spent = ray_train.fit(
                partial(measured, job, root),
                root=root,
                work=data / f"work{turn}",
                scale=scale,
                section="train",
                on_event=meter,
            )
            times["ray"] += spent["steps"]
            said = subprocess.run(
                words, env={**os.environ, **allocator.ENVIRONMENT}, capture_output=True, text=True, check=True
            )
            times["plain"] += json.loads(said.stdout.splitlines()[-1])
            print(f"turn {turn}: a step {statistics.median(spent['steps']):.3f} s in Ray's worker", flush=True)
    # Lines of one report arrive together: only the last of each counts.
    seen = [a for a, b in zip(meter.points, meter.points[1:]) if b[1] - a[1] > 0.05][:-1]
    first, last = seen[0], seen[-1]
    steps, seconds = last[0] - first[0], last[1] - first[1]
    of_ray, of_worker = last[2] - first[2], last[3] - first[3]
    share = of_ray / (of_ray + of_worker)
    versions = f"Ray {ray.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"python benchmarks/ray_overhead.py {' '.join(zip_words(asked))}: {versions}, {cpus} CPUs, bf16")
    print(f"last turn, steps {first[0] + 1} to {last[0]}: {seconds / steps:.2f} s a step (load {os.getloadavg()[0]:.1f})")
    print(f"{'':34}{'CPU s a step':>14}{'share':>10}")
    print(f"{'the worker':34}{of_worker / steps:>14.3f}{1 - share:>10.2%}")
    print(f"{'Ray and the driver':34}{of_ray / steps:>14.3f}{share:>10.2%}")
    waits = spent["seconds"] / options.steps
    print(f"{'the worker in reports, s a step':34}{waits:>14.3f}{waits * steps / seconds:>10.2%}")
    within, without = (statistics.median(times[name]) for name in ("ray", "plain"))
    low, high = interval(times["ray"], times["plain"])
    print(
        f"a step by the clock: {within:.3f} s with Ray, {without:.3f} s without: {within / without - 1:+.1%} "
        f"(95 % interval {low:+.1%} to {high:+.1%}, {len(times['ray'])} and {len(times['plain'])} times)"
    )
    result = {
        "ray_share_of_cpu": round(share, 4), "report_share": round(waits * steps / seconds, 4), "step_s": round(within, 3),
        "plain_step_s": round(without, 3), "slower_by": round(within / without - 1, 4),
        "slower_by_interval": [round(low, 4), round(high, 4)], "size": options.size,
        "batch": options.batch,
    }  # fmt: skip
    print("RESULT", json.dumps(result))


def zip_words(asked: tuple) -> list[str]:
    """Return the command-line words for size, batch and steps."""
    return [word for name, value in zip(("--size", "--batch", "--steps"), asked) for word in (name, str(value))]


if __name__ == "__main__":
    main()
