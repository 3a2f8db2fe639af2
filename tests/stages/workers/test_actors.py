"""Work spread over Ray's processes makes what one process makes, bit by bit. All tests share one start of Ray."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import ray
import torch

from dpar_core.evaluation.measure import PIECE
from stages.shared.scoring import measure_images
from stages.workers import cluster, tasks
from tests.helpers.paths import ROOT
from tests.helpers.sample_artifacts import write_artifacts
from tests.helpers.tiny_data import copy_of, make_project
from tests.stages.shared.test_scoring import pictures
from tests.stages.shared.test_scoring import same as same_features
from tests.stages.test_sample import run_dpar, same
from tests.stages.test_token_stages import ALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    torch.set_num_threads(1)
    with cluster.connected():
        yield


def test_ray_actors_make_the_same_bytes(tmp_path):
    """Two actors cut images into shards. In the other tests one shows that the work travels (order: test_token_stages)."""
    alone = make_project(tmp_path / "alone").tokenize().entropies().patch_maps()
    workers = {"tokenize_images": {"workers": 2}, "entropies": {"workers": 1}}
    other = copy_of(alone, tmp_path / "other", **workers).tokenize().entropies().patch_maps()
    assert other.bytes(*ALL) == alone.bytes(*ALL)


def test_ray_workers_draw_the_same_bytes(tmp_path):
    artifacts = write_artifacts(tmp_path)
    alone = run_dpar(artifacts, tmp_path / "alone")
    assert same(alone, run_dpar(artifacts, tmp_path / "workers", workers=1, batch_size=3))


def test_what_a_lost_machine_had_in_hand_is_done_by_the_others_and_each_result_comes_once(tmp_path, monkeypatch, capfd):
    nodes, looks = cluster.living_nodes(), []

    def fewer():
        looks.append(1)
        return nodes if len(looks) == 1 else []

    def build(threads):
        def work(unit):
            begun = tmp_path / f"begun-{unit}"
            if unit == 1 and not begun.exists():
                begun.touch()
                time.sleep(600)  # as if its machine were cut off
            return unit * unit

        return work

    monkeypatch.setattr(tasks, "living_nodes", fewer)
    monkeypatch.setattr(tasks, "_LOOK_SECONDS", 0.5)
    done = list(tasks.run_units(range(5), build, section="sample", workers=2))
    assert sorted(done) == [(unit, unit * unit) for unit in range(5)]
    assert "machine" in capfd.readouterr().err


def test_two_projects_share_a_cluster_and_who_waits_for_room_is_told_so(tmp_path, monkeypatch, capfd):
    """Another process, with a project and a folder of its own, samples on the same cluster at the same time."""
    monkeypatch.setattr(tasks, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(tasks, "_PATIENCE", 0.0)
    artifacts = write_artifacts(tmp_path / "mine")
    alone = run_dpar(artifacts, tmp_path / "alone")
    shutil.copytree(tmp_path / "mine", tmp_path / "theirs")
    script = (
        "import sys; from pathlib import Path; from tests.helpers.sample_artifacts import Artifacts; "
        "from tests.stages.test_sample import run_dpar; "
        "run_dpar(Artifacts(*map(Path, sys.argv[1:])), Path('out'), workers=1)"
    )
    names = [path.name for path in vars(artifacts).values()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-P", "-c", script, *names]
    with subprocess.Popen(command, env=environment, cwd=tmp_path / "theirs") as other:
        mine = run_dpar(artifacts, tmp_path / "workers", workers=1)
        assert other.wait() == 0
    assert same(alone, mine) and same(alone, tmp_path / "theirs" / "out" / "samples")
    assert "no worker has begun after 0 s" in capfd.readouterr().err


def test_workers_give_the_features_that_one_process_gives_and_end_with_their_own_sentence(network):
    images, done = pictures(2 * PIECE + 70), []
    alone, spread = measure_images(network, images), measure_images(network, images, workers=1, done=done.append)
    same_features(alone, spread)
    assert sorted(done) == [70, PIECE, PIECE]
    with pytest.raises(ValueError, match=r"^\S+ is another network on this machine .*: share one file$"):
        measure_images(replace(network, digest="0" * 16), images, workers=1)
