"""benchmarks/gpu.py on the CPU, so that nothing in it is tried first on a GPU. Its other parts: test_gpu_parts.py."""

import json
import subprocess
import sys

from tests.helpers.paths import ROOT


def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_models_and_finds_everything_right(tmp_path):
    command = [
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--tiny",
        "--parts",
        "correctness,sampling",
        "--schedules",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    result = json.loads(last.removeprefix("RESULT "))
    assert result == json.loads((tmp_path / "out").read_text())
    assert result["correctness"]["wrong"] == {} and len(result["correctness"]["cases"]) >= 10
    models = {row["model"] for row in result["sampling"]["rows"]}
    assert {"LlamaGen", "LlamaGen, not captured", "LlamaGen, ragged"} <= models
    assert {f"DPAR, gate XS fp32, {schedule}" for schedule in ("ahead", "buckets", "rounds")} <= models
    assert all(row["images_per_s"] > 0 for row in result["sampling"]["rows"])
