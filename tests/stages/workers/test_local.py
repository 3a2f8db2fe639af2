"""One worker on this machine: Ray Train's local mode, in a process that tells why it ends and ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dpar_core.training import allocator
from dpar_core.training.parallel import Ranks
from stages.workers import cluster
from stages.workers import fit as ray_train
from stages.workers.fit import Scale, TrainingFailed

ALONE = Scale(1, 1, 0, group=False, threads=1)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "connected", lambda: pytest.fail("Ray was started"))


def fit(function, folder, on_event=lambda event: None):
    return ray_train.fit(
        function, root=str(folder / "run"), work=folder / "work", scale=ALONE, section="train", on_event=on_event
    )


def reports(answer, *, ranks, hooks):
    import ray

    hooks.begin(0)
    hooks.log(1, {"train/loss": 0.5})
    hooks.checkpoint(2, hooks.root + "/step-2")
    return {
        "answer": answer,
        "process": os.getpid(),
        "ranks": ranks == Ranks(),
        "threads": torch.get_num_threads(),
        "ray": ray.is_initialized(),
        "environment": {name: os.environ.get(name) for name in allocator.ENVIRONMENT},
    }


def test_reports_and_the_result_come_back_without_a_cluster(tmp_path, capfd):
    seen = []
    found = fit(partial(reports, 42), tmp_path, seen.append)
    assert [(event.kind, event.step) for event in seen] == [("begin", 0), ("log", 1), ("checkpoint", 2)]
    assert seen[1].metrics == {"train/loss": 0.5}
    assert found["answer"] == 42 and found["process"] != os.getpid()
    assert found["ranks"] and found["threads"] == 1 and not found["ray"]
    assert found["environment"] == allocator.ENVIRONMENT
    said = capfd.readouterr()
    assert not any(word in said.out + said.err for word in ("INFO", "Error", "Reported metrics"))


def fails(*, ranks, hooks):
    raise ValueError("shard 3 is short")


def dies(how, code, *, ranks, hooks):
    how(code)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (fails, TrainingFailed, "^shard 3 is short$"),
        (partial(dies, signal.raise_signal, signal.SIGKILL), RuntimeError, r"was killed \(signal 9\): .* want of memory"),
        (partial(dies, os._exit, 3), RuntimeError, "ended with exit status 3, .* goes on from the last checkpoint$"),
    ],
    ids=["says why", "is killed", "ends"],
)
def test_what_ends_the_process_is_reported_in_one_sentence(tmp_path, function, error, message):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ray_train.RETURNED).write_bytes(b"of an earlier call")
    with pytest.raises(error, match=message) as caught:
        fit(function, tmp_path)
    assert "\n" not in str(caught.value)


def sleeps(*, ranks, hooks):
    Path(hooks.root, "pid").write_text(str(os.getpid()))
    hooks.begin(0)
    time.sleep(300)


def gone(process: int) -> bool:
    """Return whether a process ends within some seconds (a zombie nobody waited for has ended)."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_ends_the_process(tmp_path):
    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(sleeps, tmp_path, interrupt)
    assert gone(int((tmp_path / "run" / "pid").read_text()))


PARENT = """
from pathlib import Path
from tests.stages.workers import test_local
test_local.fit(test_local.sleeps, Path({folder!r}))
"""


def test_the_process_does_not_outlive_who_started_it(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(folder=str(tmp_path))])
    note = tmp_path / "run" / "pid"
    while not (note.exists() and note.read_text()) and parent.poll() is None:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert gone(int(note.read_text()))
