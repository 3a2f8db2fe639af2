"""How long `dpar-cli sweep threshold` takes on the demo's checkpoint, what a trial costs besides drawing, and a kill.

    python benchmarks/sweep.py [--images 200] [--kill-after 5]

Run it in the project's folder after `dpar-cli run`. Sweeps 4 thresholds x 3 cfg scales twice under names of its own:
once undisturbed, once killed with -9 after some trials and started again. Compares the results of both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dpar_core.patches.maps import read_rule
from dpar_core.system import cpus
from stages.artifacts import PATCH_RULE
from stages.tools.sweep import TrialResult, read_result


def command(name: str, images: int) -> list[str]:
    """Return the sweep of 4 x 3 trials around the training threshold."""
    middle = read_rule(Path(PATCH_RULE.path)).threshold
    thresholds = ",".join(f"{middle + offset:.2f}" for offset in (-0.4, 0.0, 0.3, 0.6))
    return [
        sys.executable,
        "-c",
        "from pipeline.cli import main; main()",
        "sweep",
        "threshold",
        "--thresholds",
        thresholds,
        "--cfg",
        "1.0,1.5,2.0",
        "--images",
        str(images),
        "--name",
        name,
    ]


def results(name: str) -> list[TrialResult]:
    """Return the trials of a sweep."""
    folder = Path("sweeps", name, "trials")
    found = [read_result(folder, path.stem) for path in sorted(folder.glob("*.json"))]
    return [one for one in found if one is not None]


def kill_after(process: subprocess.Popen, name: str, count: int) -> dict[str, int]:
    """Kill the sweep and its children when `count` trials are there; return their files' times."""
    folder = Path("sweeps", name, "trials")
    while process.poll() is None and len(list(folder.glob("*.json"))) < count:
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in family:
        if child.is_running():
            child.kill()
    process.wait()
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def same(a: list[dict], b: list[dict]) -> bool:
    """Whether two sweeps found the same, the clock left out."""
    clock = ("seconds", "perf/images_per_s")
    return [{n: v for n, v in one.items() if n not in clock} for one in a] == [
        {n: v for n, v in one.items() if n not in clock} for one in b
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--kill-after", type=int, default=5)
    options = parser.parse_args()
    for name in ("benchmark-whole", "benchmark-killed"):
        for folder in (Path("sweeps", name), Path("work", "sweeps", name)):
            shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(command("benchmark-whole", options.images), check=True)
    seconds = time.perf_counter() - started
    whole = results("benchmark-whole")
    search = [one for one in whole if not one.trial.final]
    inside = sum(one.seconds for one in whole)
    drawing = sum(one.trial.images / one.images_per_s for one in whole)
    process = subprocess.Popen(command("benchmark-killed", options.images), start_new_session=True)
    kept = kill_after(process, "benchmark-killed", options.kill_after)
    again = subprocess.run(command("benchmark-killed", options.images), check=True, stdout=subprocess.DEVNULL)
    folder = Path("sweeps", "benchmark-killed", "trials")
    untouched = all((folder / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    found = {
        "trials": len(search),
        "finals": len(whole) - len(search),
        "images": options.images,
        "seconds": seconds,
        "seconds_per_trial": statistics.median(one.seconds for one in search),
        "overhead_per_trial": (seconds - inside) / len(whole),
        "not_drawing_per_trial": (seconds - drawing) / len(whole),
        "kept_after_kill": len(kept),
        "kept_untouched": untouched,
        "same_after_kill": again.returncode == 0 and same(whole, results("benchmark-killed")),
        "cpus": cpus(),
    }
    for name, value in found.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
