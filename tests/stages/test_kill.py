"""kill -9 at random moments, again and again: the run that ends gives the bytes of an undisturbed one.

A kill comes a random time after a random number of shards, not after a random time alone, which a busy machine stretches.
"""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from tests.helpers.processes import fork_server
from tests.helpers.tiny_data import Project, make_project, run_stage

KILLS = 10
SMALL_SHARDS = {"tokenize_images": {"shard_images": 2}}
OUTPUTS = {
    "entropies": ("entropies",),
    "patch_maps": ("patch_maps", "patch_maps.json", "lengths.csv"),
}


@pytest.fixture(scope="module")
def processes():
    return fork_server()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Project:
    torch.set_num_threads(1)
    project = make_project(tmp_path_factory.mktemp("whole"), **SMALL_SHARDS)
    return project.tokenize().entropies().patch_maps()


@pytest.mark.slow
@pytest.mark.parametrize("stage", OUTPUTS)
def test_ten_kills_end_with_the_same_bytes(whole, tmp_path, processes, stage):
    names = OUTPUTS[stage]
    for path in whole.root.iterdir():
        if path.name not in {*names, "work", "images"}:
            shutil.copytree(path, tmp_path / path.name) if path.is_dir() else shutil.copy(path, tmp_path)
    project = Project(tmp_path, whole.params)
    dice, moments = random.Random(stage), []

    def start():
        child = processes.Process(target=run_stage, args=(tmp_path, whole.root / "images", stage), kwargs=SMALL_SHARDS)
        child.start()
        return child

    def shards() -> int:
        return len(list(project.work.rglob("*.json")))

    killed = 0
    while killed < KILLS:
        child, more, pause = start(), dice.randrange(3), dice.uniform(0.0, 0.05)
        wanted = shards() + more
        while more and child.is_alive() and shards() < wanted:
            time.sleep(0.001)
        child.join(pause if more else 10 * pause)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
            moments.append(f"{more} more shards and {pause:.3f} s, {shards()} shards")
        else:  # it was through before its moment came: begin anew
            assert child.exitcode == 0 and project.bytes(*names) == whole.bytes(*names)
            for name in (*names, "work"):
                path = tmp_path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    last = start()
    last.join()
    assert last.exitcode == 0
    assert project.bytes(*names) == whole.bytes(*names), moments
    assert not list(tmp_path.rglob(".*.tmp")) and not list(tmp_path.rglob(".*.old"))
