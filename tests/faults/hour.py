"""A training run with a fault a minute, and MLflow away a third of the time: the same weights, every metric once.

    python -m tests.faults.hour [--minutes 60] [--seed 1]

The model is tiny and sleeps most of a step, so that an hour of training costs some minutes of one core. MLflow is away when
its database is locked by somebody else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.faults import processes
from tests.faults.injection import SIGNALS, Injection
from tests.faults.processes import run_stage, wait_for_orphans
from tests.faults.project import World, contents, hurry, params, timed, walk

STAGE, STEP_SECONDS, LOG_EVERY = "train_dpar", 1.0, 5
LONGEST = 90.0  # seconds from one fault to the next
NEEDED = ("sources", "data", "tokenizer", "tokenize_images", "entropy_model", "entropies", "patch_maps")


def slow() -> None:
    """Let every step take a second; called in the process of a stage."""
    from stages.shared.jobs import TrainData

    hurry()
    quick = TrainData.micro_batch

    def micro_batch(self: Any, step: int, micro: int) -> Any:
        time.sleep(STEP_SECONDS)
        return quick(self, step, micro)

    TrainData.micro_batch = micro_batch  # type: ignore[method-assign]


class Away(threading.Thread):
    """Locks MLflow's database for 20 s of every minute."""

    def __init__(self, database: Path) -> None:
        super().__init__(daemon=True)
        self.database, self.ended, self.seconds = database, threading.Event(), 0.0

    def run(self) -> None:
        while not self.ended.wait(40):
            if not self.database.exists():
                continue
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(self.database)) as store:
                store.isolation_level = None
                store.execute("BEGIN EXCLUSIVE")
                self.ended.wait(20)
                self.seconds += 20
                store.execute("ROLLBACK")


def disturbed(root: Path, dice: random.Random, log: Counter[str]) -> int | None:
    """Train until a fault or the end; return the exit status."""
    moment = dice.uniform(30, LONGEST)
    kind = dice.choice(["kill", "term", "int", "kill the child", "ENOSPC", "EIO", "damage"])
    injection, timers = Injection(), []
    if kind in ("ENOSPC", "EIO"):
        injection = Injection(kind, "child", dice.randrange(30, 150), lasting=dice.random() < 0.5)

    def during(process: psutil.Process) -> None:
        def send() -> None:
            with contextlib.suppress(psutil.Error, ProcessLookupError, IndexError):
                target = process.children()[-1] if kind == "kill the child" else process
                os.kill(target.pid, SIGNALS.get(kind, SIGNALS["kill"]))

        # An error of the disk may be one that training survives: then it is killed after LONGEST.
        timers.append(threading.Timer(LONGEST if injection.what else moment, send))
        timers[0].start()

    environment = {"FAULTS_MLFLOW": "1"}
    ended = run_stage(STAGE, root, injection, environment=environment, prepare=slow, during=during, patience=1e9)
    for timer in timers:
        timer.cancel()
    if kind == "damage":
        files = [path for path in sorted(walk(root / "work" / STAGE)) if "/step-" in path]
        if files:
            path = root / "work" / STAGE / dice.choice(files)
            content = bytearray(path.read_bytes())
            if content:
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
                path.write_bytes(content)
    name = kind if ended.status != 0 else "the end"
    log[f"{name} ({ended.status})"] += 1
    last = [line for line in ended.said.splitlines() if line.strip() and "DPAR_DEBUG" not in line][-1:]
    print(f"{time.strftime('%H:%M:%S')} {ended.seconds:5.0f} s {kind}: status {ended.status} {last}", flush=True)
    if "Traceback (most recent call last)" in ended.said:
        log["tracebacks"] += 1
        print(ended.said[-3000:], flush=True)
    if left := wait_for_orphans(30):
        log["orphans"] += 1
        print(left, flush=True)
    return ended.status


def delivered(root: Path) -> dict[str, Any]:
    """Send what MLflow still misses, and return its rows of train/loss by run: [[step, value], ...]."""
    target = root / "rows.json"
    child = os.fork()
    if not child:
        with processes.leaving():
            os.chdir(root)
            from pipeline.tracking import outbox, store

            until = time.monotonic() + 120
            while outbox.journals(root) and time.monotonic() < until:
                with contextlib.suppress(outbox.Away):
                    outbox.sync(outbox.Outbox(root, print))
            client, experiment = store.connect(root)
            rows = {
                run.info.run_id: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "train/loss")]
                for run in client.search_runs([experiment], max_results=1000)
            }
            states = Counter(run.info.status for run in client.search_runs([experiment], max_results=1000))
            target.write_text(json.dumps({"rows": rows, "states": states, "left": len(outbox.journals(root))}))
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    steps = max(int(options.minutes * 60 * 0.8 / STEP_SECONDS) // 20 * 20, 20)
    top = Path(tempfile.mkdtemp(prefix="dpar-hour-"))
    os.environ |= {"OMP_NUM_THREADS": "1", "DPAR_CACHE": str(top / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    processes.import_everything((*NEEDED, STAGE), mlflow=True)
    processes.adopt_orphans()
    world, log, dice = World(top), Counter[str](), random.Random(options.seed)
    try:
        from tests.helpers.tiny_data import put_images

        values = params(put_images(top / "images", train=18, validation=8))
        values["train"] |= {"steps": steps, "checkpoint_every": 20, "validate_every": 20, "log_every": LOG_EVERY}
        values["train"] |= {"equal_time_step": None}
        world.prepare(world.whole, values)
        for stage in (*NEEDED, STAGE):
            ended = run_stage(stage, world.whole, prepare=hurry, patience=1e9)
            if ended.status != 0:
                raise RuntimeError(f"{stage} fails undisturbed:\n{ended.said}")
        expected = {path: data for path, data in contents(world.whole / "artifacts").items() if path.startswith("models/")}
        print(f"{time.strftime('%H:%M:%S')} undisturbed: {steps} steps", flush=True)
        root = top / "project"
        shutil.copytree(world.whole, root)
        for name in ("models",):
            shutil.rmtree(root / "artifacts" / name)
        shutil.rmtree(root / "work")
        (root / "work").mkdir()
        away, began = Away(root / "mlflow.db"), time.monotonic()
        away.start()
        starts = 0
        while disturbed(root, dice, log) != 0:
            starts += 1
        seconds = time.monotonic() - began
        away.ended.set()
        away.join()
        found = {path: data for path, data in contents(root / "artifacts").items() if path.startswith("models/")}
        differing = [path for path in expected if found.get(path) != expected[path] and not timed(path)]
        tracking = delivered(root)
        doubled = sum(len(rows) - len({step for step, _ in rows}) for rows in tracking["rows"].values())
        seen = {step: value for rows in tracking["rows"].values() for step, value in rows}
        disagreeing = sum(value != seen[step] for rows in tracking["rows"].values() for step, value in rows)
        logged = range(LOG_EVERY, steps + 1, LOG_EVERY)
        missing = [step for step in logged if step not in seen]
        print(
            f"{seconds / 60:.1f} minutes, {starts} faults: {dict(log)}; MLflow away {away.seconds / seconds:.0%} of the time"
        )
        print(f"files that differ: {differing or 'none'}")
        print(
            f"rows of train/loss: {len(logged) - len(missing)} steps of {len(logged)}, {doubled} twice within a run, "
            f"{disagreeing} of other values, missing {missing or 'none'}; runs {tracking['states']}, "
            f"{tracking['left']} journals left"
        )
        whole = not differing and not doubled and not disagreeing and not missing and not tracking["left"]
        sys.exit(0 if whole and not log["tracebacks"] and not log["orphans"] else 1)
    finally:
        shutil.rmtree(top, ignore_errors=True)


if __name__ == "__main__":
    main()
