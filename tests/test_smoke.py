"""The whole workflow on the smoke preset, as a user runs it: once, again, and after a change.

It runs where things are hard: outside git, in a path with a space, an umlaut and characters that addresses escape, without a
home folder, in a plain locale, on a CPU without bfloat16 (torch and oneDNN are set so), and without the calls that macOS
lacks.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.results import result_line
from pipeline.runner import STAGES
from tests.helpers.paths import ROOT

# Read by every Python process below the test: takes away what only Linux on x86 has.
ANOTHER_SYSTEM = """
import os
from pathlib import Path

import dpar_core.system

del os.sched_getaffinity
dpar_core.system._STATM = Path("nowhere")
dpar_core.system.is_x86 = lambda: False
"""
COPIED = ("dvc.yaml", ".dvc/config", ".dvcignore", "params")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "ä b%20?#1" / "project"
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / name, target) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, target)
    params = (ROOT / "params" / "smoke.yaml").read_text()
    assert "  threads: 0 " in params
    (folder / "params.yaml").write_text(params.replace("  threads: 0 ", "  threads: 1 "))  # other tests run beside this one
    (folder.parent / "sitecustomize.py").write_text(ANOTHER_SYSTEM)
    below = folder / "params"
    check = (sys.executable, "-c", "from pipeline.cli import main; main()", "params", "check")
    assert "outside git" in run(folder, *check, cwd=below)
    return folder


def run(folder: Path, *command: str, cwd: Path) -> str:
    """Run a command and return what it printed. Its home is where nobody can make a folder, not even root."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(folder.parent)}
    environment |= {"HOME": "/proc/none" if Path("/proc").exists() else "/System/none"}
    environment |= {"LC_ALL": "C", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    for name in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME", "MPLCONFIGDIR", "DPAR_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def dvc(folder: Path, *words: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *words, cwd=folder)


def would_run(folder: Path) -> set[str]:
    """Return the stages that a change makes out of date, and all that read what those write."""
    lines = dvc(folder, "repro", "--dry").splitlines()
    found = {line.split("'")[1] for line in lines if line.startswith("Running stage")} - {"sources"}  # which always looks
    for name, spec in STAGES.items():  # in order, so one pass follows every path
        made = [path for other in found for path in STAGES[other].outputs.values()]
        if any(path.startswith(out) or out.startswith(f"{path}/") for path in spec.inputs.values() for out in made):
            found.add(name)
    return found


@pytest.mark.slow
def test_one_command_makes_everything_and_a_change_only_what_depends_on_it(project):
    started = time.monotonic()
    dvc(project, "repro")
    print(f"dvc repro on the smoke preset: {time.monotonic() - started:.0f} s")
    artifacts = project / "artifacts"
    assert (artifacts / "report" / "index.html").stat().st_size > 50_000
    for name in ("dpar", "llamagen", "llamagen_equal_time"):
        assert (artifacts / "samples" / name / "samples.npz").exists()
        assert (artifacts / "scores" / f"{name}.json").exists()

    assert not [stage for stage in STAGES if not result_line(stage, project)]

    started = time.monotonic()
    lines = dvc(project, "repro").splitlines()
    assert [line for line in lines if line.startswith("Running stage")] == ["Running stage 'sources':"]
    assert sum("didn't change, skipping" in line for line in lines) == len(STAGES) - 1
    print(f"dvc repro with nothing to do: {time.monotonic() - started:.1f} s")

    params = project / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("cfg_scale: 2.0 ", "cfg_scale: 1.5 "))
    sampling = {"sample_dpar", "sample_llamagen", "time_sampling", "score_dpar", "score_llamagen", "report"}
    assert would_run(project) == sampling
    params.write_text(text.replace("target_mean_length: 1.81 ", "target_mean_length: 1.6 "))
    assert would_run(project) == {"patch_maps", "train_dpar", "time_training"} | sampling
    params.write_text(text)

    metrics = json.loads(dvc(project, "metrics", "show", "--json", "artifacts/metrics.json"))
    shown = metrics[""]["data"]["artifacts/metrics.json"]["data"]
    assert {"dpar_loss", "baseline_loss", "patches_per_image"} < set(shown) and len(shown) <= 12
    dvc(project, "remote", "add", "--default", "store", "../store")  # DVC writes no umlaut under a C locale
    dvc(project, "push")
    shutil.rmtree(artifacts)
    shutil.rmtree(project / ".dvc" / "cache")
    dvc(project, "pull")
    status = dvc(project, "status").split("\n")
    assert [line for line in status if line and not line[0].isspace()] == ["sources:"], status  # always changed

    from mlflow import MlflowClient

    plain = project.parents[1] / "plain"  # no address can hold the project's name, and MLflow keeps connections by address
    plain.symlink_to(project)
    client = MlflowClient(f"sqlite:///{plain / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("dpar").experiment_id])
    parents = [run for run in runs if "dpar.pass" in run.data.tags]
    assert len(parents) == 1
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == 16
    assert {run.info.status for run in children} == {"FINISHED"}


@pytest.mark.slow
def test_dvc_runs_shows_and_compares_experiments_once_the_project_is_under_git(project):
    """What docs/experiments.md shows, on the project that the test above has finished."""
    if not (project / "artifacts" / "report").exists():
        dvc(project, "repro")
    shutil.copy(ROOT / ".gitignore", project)
    for words in ("init -q", "config user.name a", "config user.email a@b", "add -A", "commit -qm one"):
        run(project, "git", *words.split(), cwd=project)
    check = (sys.executable, "-c", "from pipeline.cli import main; main()", "params", "check")
    assert "under git now: removed core.no_scm" in run(project, *check, cwd=project).replace("\n  ", " ")

    printed = dvc(project, "exp", "run", "--name", "two", "-S", "report.examples=2")
    ran = [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]
    assert ran == ["sources", "report"]
    table = dvc(project, "exp", "show", "--only-changed", "--csv").splitlines()
    assert "report.examples" in table[0].split(",") and "train.steps" not in table[0]
    assert any(line.startswith("two,") for line in table)

    metrics = project / "artifacts" / "metrics.json"
    found = json.loads(metrics.read_text())
    metrics.write_text(json.dumps(found | {"dpar_loss": found["dpar_loss"] + 1}))
    (line,) = [line for line in dvc(project, "metrics", "diff", "two").splitlines() if "dpar_loss" in line]
    assert float(line.split()[-1]) == pytest.approx(1.0)
    metrics.write_text(json.dumps(found))
    dvc(project, "plots", "diff", "HEAD", "two")
    page = (project / "dvc_plots" / "index.html").read_text()
    assert "losses.svg" in page and "patch_lengths.svg" in page and "https://" not in page
