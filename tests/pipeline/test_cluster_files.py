"""The files of docs/cluster: what can be checked without a cluster."""

import subprocess

import pytest
import ray
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from pipeline.runner import STAGES
from tests.helpers.paths import ROOT

FOLDER = ROOT / "docs" / "cluster"


def load(name: str) -> dict:
    return YAML(typ="safe").load((FOLDER / name).read_text())


def test_ray_accepts_the_ray_up_file():
    validate_config(prepare_config(load("ray-up.yaml")))  # as `ray up` does


def test_the_job_runs_the_ray_version_of_the_constraints():
    job = load("rayjob.yaml")
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert job["kind"] == "RayJob" and f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" == pinned
    assert f"ray:{ray.__version__}-" in (FOLDER / "Dockerfile").read_text()


def test_all_pods_of_the_job_see_the_project():
    cluster = load("rayjob.yaml")["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        claims = {v["name"] for v in spec["volumes"] if v.get("persistentVolumeClaim") == {"claimName": "dpar-project"}}
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert [mounts[name] for name in claims] == ["/project"]
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", ["rayjob.yaml", "ray-up.yaml", "slurm.sh"])
def test_the_files_start_a_stage_that_exists(name):
    words = (FOLDER / name).read_text().replace("'", " ").replace('"', " ").split()
    started = [words[i + 2] for i in range(len(words) - 2) if words[i : i + 2] == ["dpar-cli", "run"]]
    assert started and all(stage in STAGES or stage == "$stage" for stage in started)


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)


def test_the_slurm_steps_ask_for_their_cpus_and_the_log_needs_no_folder():
    lines = (FOLDER / "slurm.sh").read_text().replace("\\\n", " ").splitlines()
    steps = [line for line in lines if "srun " in line and not line.startswith("#") and " hostname " not in line]
    assert len(steps) == 3 and all('--cpus-per-task="$SLURM_CPUS_PER_TASK"' in line for line in steps)
    (log,) = [line.split("=", 1)[1] for line in lines if line.startswith("#SBATCH --output=")]
    assert "/" not in log  # sbatch makes no folder, and without one the job ends without a word


def test_every_process_of_ray_asks_for_a_token():
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}  # KubeRay makes and mounts it
    up = load("ray-up.yaml")
    starts = [line for key in ("head", "worker") for line in up[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2 and all(line.startswith("export RAY_AUTH_MODE=token ") for line in starts)
    assert up["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert any("chmod 600 ~/.ray/auth_token" in line for line in up["setup_commands"])
    commands = [line for line in (FOLDER / "ray-up.yaml").read_text().splitlines() if "ray exec" in line]
    assert commands and all("RAY_AUTH_MODE=token" in line for line in commands)
    slurm = (FOLDER / "slurm.sh").read_text()
    first = min(slurm.index(word) for word in ("ray get-auth-token", "ray start", "ray status", "ray.init"))
    exports = [line for line in slurm[:first].splitlines() if line.startswith("export ")]
    assert any("RAY_AUTH_MODE=token" in line.split() for line in exports)
    assert "(umask 077; ray get-auth-token --generate" in slurm and "chmod 600 ~/.ray/auth_token" in slurm


def test_no_head_of_ray_reports_usage():
    starts = [line for line in load("ray-up.yaml")["head_start_ray_commands"] if "ray start" in line]
    assert starts and all("RAY_USAGE_STATS_ENABLED=0; " in line for line in starts)
    (head,) = load("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in head["env"]
    slurm = (FOLDER / "slurm.sh").read_text()
    assert "RAY_USAGE_STATS_ENABLED=0" in slurm[: slurm.index("ray start")]
