"""How long a one-worker training run takes to its first step: the whole stage, from a cold process.

    python benchmarks/ray_start.py [--repeats 3]

Starts `stages.entropy_model` on a tiny data set as `dpar-cli stage` does, with Ray started by it, and reads the clock
when the driver begins, when Ray Train's worker is about to take its first step, and when that step is done. Other load
on the machine lengthens all of it: the load average is printed beside.
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

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import json, sys, time
sys.path.insert(0, {tests!r})
started = {started}
from pathlib import Path
from tiny_shards import tiny_params
from stages import cluster, entropy_model, ray_train, training
from stages.params import select
from stages.tracker import NullTracker
times = {{"imports": time.time() - started}}
whole = cluster.connected
from contextlib import contextmanager
@contextmanager
def connected():
    with whole() as nodes:
        times["Ray is up"] = time.time() - started
        yield nodes
cluster.connected = connected
deliver = training._Reporter.__call__
def call(self, event):
    names = {{"begin": "worker is ready", "log": "first step is done"}}
    times.setdefault(names.get(event["event"], event["event"]), time.time() - started)
    deliver(self, event)
training._Reporter.__call__ = call
params = tiny_params(steps=1, validate_every=1, log_every=1, checkpoint_every=1, equal_time_step=None)
out = Path({out!r})
outputs = entropy_model.Outputs(*(out / name for name in ("model.safetensors", "metrics.json", "curve.csv", "t.json")))
inputs = entropy_model.Inputs(Path({tokens!r}))
entropy_model.run(select(params, entropy_model.Params), inputs, outputs, NullTracker(), device="cpu", work=out / "work")
times["stage is over"] = time.time() - started
print("TIMES", json.dumps(times))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    tests = str(ROOT / "tests" / "stages")
    sys.path.insert(0, tests)
    import ray
    from tiny_shards import write_tokens

    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        tokens = write_tokens(Path(temporary) / "tokens")
        for number in range(repeats):
            load = os.getloadavg()[0]
            script = RUN.format(tests=tests, started=time.time(), out=f"{temporary}/out{number}", tokens=str(tokens))
            told = subprocess.run(
                [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            times = json.loads(next(line for line in told.splitlines() if line.startswith("TIMES"))[6:])
            runs.append({**times, "load average before": load})
    cpus = len(os.sched_getaffinity(0))
    print(f"python benchmarks/ray_start.py --repeats {repeats}: Ray {ray.__version__}, Python {platform.python_version()}, "
          f"{cpus} CPUs; seconds from the start of the process, cold, no warm-up")  # fmt: skip
    print(f"{'':24}" + "".join(f"{f'run {number}':>10}" for number in range(repeats)) + f"{'median':>10}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:24}" + "".join(f"{value:>10.1f}" for value in values) + f"{statistics.median(values):>10.1f}")
    steps = [run["first step is done"] for run in runs]
    print("RESULT", json.dumps({"seconds_to_first_step": statistics.median(steps), "best": min(steps), "cpus": cpus}))


if __name__ == "__main__":
    main()
