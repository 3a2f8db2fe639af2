"""One worker on this machine: Ray Train's local mode, in a process that tells why it ends and ends with its parent."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dpar_core.training import allocator
from dpar_core.training.parallel import Ranks
from stages.workers import cluster, local
from stages.workers import fit as ray_train
from stages.workers.fit import Scale, TrainingFailed
from tests.helpers.processes import gone

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


class Dies:
    """Ends the process that unpickles it: nothing has to be imported there first."""

    def __init__(self, how, code) -> None:
        self.how, self.code = how, code

    def __reduce__(self):
        return self.how, (self.code,)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Dies(signal.raise_signal, signal.SIGKILL), r"was killed \(signal 9\): .* want of memory"),
        (Dies(os._exit, 3), "ended with exit status 3, .* goes on from the last checkpoint$"),
    ],
    ids=["is killed", "ends"],
)
def test_what_ends_the_process_is_reported_in_one_sentence(tmp_path, function, message):
    returned = tmp_path / "returned.json"
    returned.write_bytes(b"of an earlier call")
    thread = local.LocalFit(local.Call("run", function, returned))
    thread.join()
    with pytest.raises(RuntimeError, match=message) as caught:
        thread.outcome()
    assert "\n" not in str(caught.value)


def test_a_reason_that_the_process_returns_is_raised(tmp_path, monkeypatch):
    class Returns(threading.Thread):
        def outcome(self):
            return {"error": "shard 3 is short"}

        def stop(self):
            pass

    monkeypatch.setattr(ray_train, "LocalFit", lambda call: Returns())
    with pytest.raises(TrainingFailed, match=r"^shard 3 is short$"):
        fit(print, tmp_path)


def sleeps(*, ranks, hooks):
    Path(hooks.root, "pid").write_text(str(os.getpid()))
    hooks.begin(0)
    time.sleep(300)


def test_ctrl_c_ends_the_process(tmp_path):
    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(sleeps, tmp_path, interrupt)
    assert gone(int((tmp_path / "run" / "pid").read_text()))
