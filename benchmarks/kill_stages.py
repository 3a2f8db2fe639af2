"""Stages killed with -9 at random moments and started again end with the same bytes as undisturbed ones.

    python benchmarks/kill_stages.py [--stages tokenize_images,patch_maps] [--kills 10] [--seed 0]

Run it in a project folder after `dpar-cli run` (the smoke preset is quick): what is there was made undisturbed. For each
stage a copy of the project loses the stage's outputs and half-done work, the stage is started and killed --kills times,
started once more, and its outputs are compared byte by byte. A start that ends before its moment does not count: all begins
anew and another moment is chosen. Kills that left files of half-done work are counted. Seconds (timings.json) are left
out, as they differ between any two runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline.runner import STAGES
from stages.artifacts import FOLDER

COPIED = (FOLDER, "params", "params.yaml", "dvc.yaml")


def start(stage: str, root: Path) -> subprocess.Popen:
    """Start a stage as `dvc repro` does, in a process group of its own."""
    words = [sys.executable, "-c", "from pipeline.cli import main; main()", "stage", stage]
    path = f"{Path.cwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        words, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill(process: subprocess.Popen) -> str:
    """Kill a process and all its children with -9; return what it said."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGKILL)
    for child in family:
        if child.is_running():
            child.kill()
    return process.communicate()[0]


def kill_at_random(
    stage: str, place: Path, outputs: list[str], *, kills: int, seconds: float, rng: random.Random
) -> tuple[list[float], int]:
    """Start a stage and kill it, `kills` times; return the seconds each lived, and how many left half-done work.

    seconds: what an undisturbed run takes. Raises SystemExit when the stage fails, or ends too early again and again.
    """
    lived: list[float] = []
    half_done = early = 0
    while len(lived) < kills:
        moment = rng.uniform(0.15, 1.0) * seconds
        process = start(stage, place)
        try:
            said, _ = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            said = kill(process)
        if process.returncode == -signal.SIGKILL:
            lived.append(moment)
            half_done += any(path.is_file() for path in (place / "work" / stage).rglob("*"))
            continue
        if process.returncode:
            raise SystemExit(f"{stage} fails after {len(lived)} kills:\n{said}")
        early += 1
        if early > 10 * kills:
            raise SystemExit(f"{stage} ended before its moment {early} times, killed {len(lived)} times: give it more work")
        remove(place, outputs, stage)  # it had gone on so far that it finished
    return lived, half_done


def files(root: Path, outputs: list[str]) -> dict[str, bytes]:
    """Return the bytes of all files that a stage has put out."""
    found = {}
    for output in outputs:
        place = root / output
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file() and file.name != "timings.json":
                found[str(file.relative_to(root))] = file.read_bytes()
    return found


def remove(root: Path, outputs: list[str], stage: str) -> None:
    """Remove a stage's outputs and whatever work it left."""
    for path in [*(root / output for output in outputs), root / "work" / stage]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def restore(home: Path, place: Path, outputs: list[str]) -> None:
    """Bring a stage's first outputs back, with the timings that later stages read."""
    for output in outputs:
        (shutil.copytree if (home / output).is_dir() else shutil.copy)(home / output, place / output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, home = random.Random(options.seed), Path.cwd()
    place = Path(tempfile.mkdtemp(prefix="kill-"))
    for name in COPIED:
        source = home / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
    equal: dict[str, bool] = {}
    killed: dict[str, int] = {}
    half_done: dict[str, int] = {}
    try:
        for stage in options.stages.split(","):
            outputs = list(STAGES[stage].outputs.values())
            before = files(place, outputs)
            remove(place, outputs, stage)
            began = time.perf_counter()
            whole = start(stage, place)
            said, _ = whole.communicate()
            if whole.returncode:
                raise SystemExit(f"{stage} fails undisturbed:\n{said}")
            seconds = time.perf_counter() - began
            same = files(place, outputs) == before
            remove(place, outputs, stage)
            moments, half_done[stage] = kill_at_random(stage, place, outputs, kills=options.kills, seconds=seconds, rng=rng)
            killed[stage] = len(moments)
            last = start(stage, place)
            said, _ = last.communicate()
            if last.returncode:
                raise SystemExit(f"{stage} fails after {len(moments)} kills:\n{said}")
            found = files(place, outputs)
            differing = [name for name in before.keys() | found.keys() if before.get(name) != found.get(name)]
            left = [str(path) for path in (place / FOLDER).rglob(".*") if path.is_file()]
            equal[stage] = same and not differing and not left
            shown = ", ".join(f"{moment:.1f}" for moment in moments)
            verdict = (
                "same bytes"
                if equal[stage]
                else f"DIFFERS: {sorted(differing)[:4]} {left[:2]} {'' if same else 'undisturbed too'}"
            )
            print(
                f"{stage:16} {seconds:6.1f} s undisturbed, {len(moments)} kills ({half_done[stage]} left work half done) "
                f"after {shown} s: {verdict}",
                flush=True,
            )
            remove(place, outputs, stage)
            restore(home, place, outputs)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    result = {"kills": killed, "half_done": half_done, "stages": equal, "identical": all(equal.values())}
    print("RESULT " + json.dumps(result))
    raise SystemExit(0 if all(equal.values()) else 1)


if __name__ == "__main__":
    main()
