"""Whether a sampling job gives the same images however it is cut, spread or interrupted.

    python benchmarks/sample_job.py [--root .] [--images 1000]

Draws images with the trained models under ROOT/artifacts: with batches of 64 in one process; with batches of 37 on two Ray
workers; and with batches of 64, killed (SIGKILL) in the middle and started again. Compares the bytes of what comes out, for
DPAR and for the baseline. Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages import artifacts
from stages.artifacts import METRICS, SAMPLE_GRID, SAMPLE_IMAGES, SAMPLE_PROTOCOL, SAMPLE_TOKENS

FILES = (SAMPLE_IMAGES, SAMPLE_TOKENS, SAMPLE_PROTOCOL, SAMPLE_GRID, METRICS)


def sample_job(model: str, root: Path, folder: Path, images: int, batch_size: int, workers: int) -> None:
    """Run one sampling stage (in a process of its own)."""
    from stages import params as P
    from stages import sample
    from stages.tracker import PrintTracker

    section = P.settled(P.load_params(root / "params.yaml"), "cpu").sample
    section = section.model_copy(update={"images": images, "batch_size": batch_size, "workers": workers})
    made, settings = root / artifacts.FOLDER, sample.Params(section)
    inputs = {field: one.below(made) for field, one in artifacts.INPUTS[f"sample_{model}"].items()}
    common = {"tracker": PrintTracker(), "device": "cpu", "work": folder / "work"}
    if model == "dpar":
        sample.run_dpar(settings, sample.DPARInputs(**inputs), sample.DPAROutputs(folder / "dpar"), **common)
    else:
        outputs = sample.LlamaGenOutputs(folder / "llamagen", folder / "early")
        sample.run_llamagen(settings, sample.LlamaGenInputs(**inputs), outputs, **common)


def run(root: Path, model: str, folder: Path, images: int, batch_size: int, workers: int, *, kill_after: int = 0) -> None:
    """Start a job; with `kill_after`, kill it once that many batches are whole, then start it again."""
    arguments = ["--sample", model, str(root), str(folder), str(images), str(batch_size), str(workers)]
    command = [sys.executable, __file__, *arguments]
    if kill_after:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(folder.rglob("batch-*.npz"))) < kill_after:
            time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit("the job ended before it could be killed: raise --images")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        print(f"  killed with {len(list(folder.rglob('batch-*.npz')))} batches whole", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> int:
    if sys.argv[1:2] == ["--sample"]:
        model, root, folder, *numbers = sys.argv[2:]
        sample_job(model, Path(root), Path(folder), *map(int, numbers))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    root, result, equal = options.root.resolve(), {}, True
    place = Path(tempfile.mkdtemp(prefix="sample-job-"))
    try:
        for model in ("dpar", "llamagen"):
            jobs = {
                "batches of 64": dict(batch_size=64, workers=0),
                "batches of 37 on two workers": dict(batch_size=37, workers=2),
                "batches of 64, killed in the middle": dict(batch_size=64, workers=0, kill_after=options.images // 128),
            }
            digests = {}
            for number, (name, job) in enumerate(jobs.items()):
                folder, started = place / f"{model}-{number}", time.perf_counter()
                run(root, model, folder, options.images, **job)
                sets = [model] if model == "dpar" else [model, "early"]
                content = b"".join((folder / name / file).read_bytes() for name in sets for file in FILES)
                digests[name] = hashlib.sha256(content).hexdigest()[:16]
                seconds = time.perf_counter() - started
                print(f"{model:9} {name:36} {digests[name]}  {seconds:.1f} s", flush=True)
            equal &= len(set(digests.values())) == 1
            result[model] = digests
    finally:
        shutil.rmtree(place)
    print("RESULT " + json.dumps({"images": options.images, "identical": equal, "digests": result}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
