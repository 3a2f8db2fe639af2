"""How long `dpar-cli stage entropy_model` takes to its first training step, from a cold process, as a user starts it.

    python benchmarks/ray_start.py [--repeats 3]

Starts that command in a project of its own with tiny shards, a tiny model and one step: Python, the command line, an empty
MLflow store, Ray Train's worker, the step. Reads the clock when the driver opens the file of events (all else is there),
when Ray Train brings the news that the worker is about to take its first step and that the step is done (up to half a
second late), and when the command has ended. Other load on the machine lengthens all of it: the load average is printed
beside.
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
from pathlib import Path

from dpar_core.system import cpus

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["stage", "entropy_model"]
NEWS = {"begin": "worker is ready", "log": "first step is done"}


def make_project(folder: Path) -> None:
    """Write what the stage reads: params.yaml, a dvc.yaml to stand in for the workflow, token shards."""
    from ruamel.yaml import YAML

    from stages.artifacts import TOKENS
    from tests.helpers.tiny_shards import tiny_params, write_tokens

    params = tiny_params(steps=1, validate_every=1, log_every=1, checkpoint_every=1, equal_time_step=None)
    raw = params.model_dump(mode="json")
    raw["compute"]["device"] = "cpu"
    write_tokens(folder / TOKENS.path)
    with open(folder / "params.yaml", "w") as stream:
        YAML().dump(raw, stream)
    (folder / "dvc.yaml").write_text("stages: {}\n")


def watch(folder: Path) -> dict[str, float]:
    """Run the command in a project and return the seconds after which each thing had happened."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [str(Path(sys.executable).parent / "dpar-cli"), *COMMAND]
    times: dict[str, float] = {}
    with open(folder / "said", "w+") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for events in folder.glob("work/entropy_model/*/events.jsonl"):
                times.setdefault("Ray Train is called", time.monotonic() - started)
                for line in events.read_text().splitlines(keepends=True):
                    if line.endswith("\n") and (name := NEWS.get(json.loads(line)["kind"])):
                        times.setdefault(name, time.monotonic() - started)
            time.sleep(0.02)
        times["command is over"] = time.monotonic() - started
        said.seek(0)
        if process.returncode or not set(NEWS.values()) <= set(times):
            raise RuntimeError(f"`dpar-cli {' '.join(COMMAND)}` ended with {process.returncode}: {said.read()}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    import ray

    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(repeats):
            make_project(folder := Path(temporary) / str(number))
            load = os.getloadavg()[0]
            runs.append({**watch(folder), "load average before": load})
    count = cpus()
    print(
        f"python benchmarks/ray_start.py --repeats {repeats}: Ray {ray.__version__}, Python {platform.python_version()}, "
        f"{count} CPUs; seconds from the start of the command, cold, no warm-up"
    )
    print(f"{'':24}" + "".join(f"{f'run {number}':>10}" for number in range(repeats)) + f"{'median':>10}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:24}" + "".join(f"{value:>10.1f}" for value in values) + f"{statistics.median(values):>10.1f}")
    steps = [run["first step is done"] for run in runs]
    print("RESULT", json.dumps({"seconds_to_first_step": statistics.median(steps), "best": min(steps), "cpus": count}))


if __name__ == "__main__":
    main()
