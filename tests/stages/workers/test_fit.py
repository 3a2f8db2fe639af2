"""Ray Train: what is refused before it starts, and a cluster that loses a node."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpar_core.files import load_weights
from dpar_core.training.parallel import Ranks
from stages.shared.configs import dpar_config
from stages.shared.jobs import TrainJob, train_job
from stages.workers import cluster
from stages.workers import fit as ray_train
from stages.workers.cluster import Node
from stages.workers.fit import Event, Scale, _Marker, _Tail, _worker
from stages.workers.lock import locked
from tests.helpers.processes import fork_server
from tests.helpers.tiny_shards import CODES, GRID, ROOT, tiny_params, write_maps, write_tokens
from tests.stages.test_training_stages import Silent


def require(nodes, *, workers, cpus=1, gpus=0):
    cluster.require(nodes, workers=workers, cpus=cpus, gpus=gpus, section="train")


def test_what_the_cluster_can_hold_is_accepted():
    require([Node(2, 0)], workers=2)
    require([Node(1, 0), Node(4, 0)], workers=2, cpus=2)
    require([Node(16, 8), Node(16, 8)], workers=16, cpus=2, gpus=1)


@pytest.mark.parametrize(
    ("nodes", "asked", "words"),
    [
        ([Node(2, 0)], {"workers": 3}, "asks for 3 workers of 1 CPUs each, but the cluster has 2 CPUs .* room for 2"),
        ([Node(3, 0), Node(3, 0)], {"workers": 3, "cpus": 2}, "6 CPUs and 0 GPUs on 2 nodes, room for 2"),
        ([Node(16, 1)], {"workers": 2, "gpus": 1}, "2 workers of 1 CPUs and 1 GPUs each"),
        ([Node(16, 0)], {"workers": 1, "gpus": 1}, "room for 0: lower it, or start a larger cluster and set RAY_ADDRESS"),
    ],
)
def test_more_workers_than_the_cluster_has_are_refused(nodes, asked, words):
    with pytest.raises(ValueError, match=words):
        require(nodes, **asked)


def test_too_many_workers_are_refused_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "connected", lambda: pytest.fail("Ray was started"))
    scale = Scale(workers=10_000, cpus=1, gpus=0, group=True)
    with pytest.raises(ValueError, match=r"`entropy_model.train.workers` asks for 10000 workers"):
        ray_train.fit(
            print, root=str(tmp_path / "run"), work=tmp_path, scale=scale, section="entropy_model.train", on_event=print
        )


def test_a_run_in_progress_is_not_started_twice(tmp_path):
    busy = ray_train._trained_already
    with locked(tmp_path / "lock"), pytest.raises(RuntimeError, match=f"process {os.getpid()} is training"):
        with locked(tmp_path / "lock", busy=busy):
            pass


def test_only_whole_lines_are_delivered(tmp_path):
    path, seen = tmp_path / "events", []
    path.write_text('{"kind": "log", "step": 1}\n{"kind": "begin", "st')
    lines = '{"kind": "log", "step": 3}\n{"kind": "log", "step": 4}\n'
    with open(path, "rb") as reader, open(path, "a") as writer:
        tail = _Tail(reader)
        for more, expected in (("", [1]), ("ep", [1]), ('": 2}\n', [1, 2]), (lines, [1, 2, 3, 4])):
            writer.write(more)
            writer.flush()
            tail.deliver(lambda event: seen.append(event.step))
            assert seen == expected


def test_a_run_that_does_not_begin_says_so_once(monkeypatch, capsys, tmp_path):
    scale, log = Scale(workers=3, cpus=4, gpus=1, group=True), Event("log", 1)
    monkeypatch.setattr(ray_train, "_PATIENCE", 0.0)
    silence = ray_train._StartWatch(scale, str(tmp_path))
    for events in ([], [], [log, log], []):
        time.sleep(0.01)
        silence.hear(events)
    said = " ".join(capsys.readouterr().err.split())  # without the terminal's line ends
    assert said.count("no worker has begun") == 1
    assert "room for 3 of 4 CPUs and 1 GPUs each" in said
    begun = ray_train._StartWatch(scale, str(tmp_path))
    begun.hear([log])
    time.sleep(0.01)
    begun.hear([])
    assert capsys.readouterr().err == ""


def test_lost_workers_are_reported_and_the_wait_for_new_ones_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ray_train, "_PATIENCE", 0.0)
    ray_train._Marker(str(tmp_path)).write(error=None)
    lost = Event("lost", 0, reason="Worker 1 failed\nThe actor is dead because its node has died.\n\tat somewhere")
    watch = ray_train._StartWatch(Scale(workers=2, cpus=1, gpus=0, group=True), str(tmp_path))
    watch.hear([Event("log", 1)])
    watch.hear([lost])
    time.sleep(0.01)
    watch.hear([])
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("a worker was lost (The actor is dead because its node has died.): Ray starts them again when")
    assert "no worker has begun after" in said
    ray_train._Marker(str(tmp_path)).write(error="a loss of nan")  # which trying again cannot change: the run ends with it
    watch.hear([lost])
    assert "a worker was lost" not in capsys.readouterr().err


class FakeContext:
    def get_local_world_size(self):
        return 1

    def get_world_rank(self):
        return 0

    def get_world_size(self):
        return 1


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Runs a function as Ray would on the only rank."""
    from ray import train

    monkeypatch.setattr(train, "get_context", FakeContext)
    _Marker(str(tmp_path)).write(error=None)
    return lambda function: _worker(function, str(tmp_path), Scale(1, 1, 0, group=False, threads=1))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("patch map was made with another entropy model"), "patch map was made with another entropy model"),
        (OSError("shard 3 is short"), "shard 3 is short"),
        (RuntimeError("no such kernel"), "RuntimeError: no such kernel"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "a GPU ran out of memory"),
    ],
)
def test_a_reason_that_trying_again_cannot_change_is_returned(worker, error, expected):
    def fails(*, ranks, hooks):
        raise error

    assert worker(fails)["error"].startswith(expected)


def test_a_lost_connection_is_left_to_ray(worker):
    def fails(*, ranks, hooks):
        raise ConnectionError("peer gone")

    with pytest.raises(ConnectionError):
        worker(fails)


def test_a_worker_that_does_not_see_the_storage_says_so(worker, tmp_path):
    (tmp_path / "run.json").unlink()
    assert "does not see" in worker(lambda **_: {})["error"]


def test_a_reason_left_by_an_earlier_attempt_stops_the_next(worker, tmp_path):
    _Marker(str(tmp_path)).write(error="shard 3 is short")
    assert worker(lambda **_: {}) == {"error": "shard 3 is short"}


def test_a_worker_has_the_threads_of_its_share(worker):
    def threads(*, ranks, hooks):
        assert ranks == Ranks()
        return {"threads": torch.get_num_threads()}

    assert worker(threads) == {"threads": 1}


LOW_ON_MEMORY = """A worker health check failed.
Worker info: Worker(actor=Actor(RayTrainWorker, 0a1b), world_rank=1)
2 worker(s) were killed due to the node running low on memory. Memory on the node was 15.3GB / 16GB (0.957).
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/. To adjust the kill threshold, set
the environment variable `RAY_memory_usage_threshold`. If the idle workers have a non-trivial memory footprint, consider
setting the environment variable `RAY_idle_worker_killing_memory_threshold_bytes` to a lower value.
"""
CUDA = """Traceback (most recent call last):
  File "dpar_core/training/loop.py", line 180, in _step
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""
RAISED = """Traceback (most recent call last):
  File "dpar_core/models/layers.py", line 12, in forward
IndexError: index 17 is out of range

The above is shown as Ray has it. Set the environment variable RAY_TRACEBACKS to 0 to hide it.
"""
KILLED = """A worker health check failed.
Worker info: Worker(actor=Actor(RayTrainWorker, 0a1b), world_rank=1)
The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR
Set the environment variable RAY_anything to see more.
"""
HANGS = """A worker health check has been hanging for 30.00 seconds. Marking the worker as dead.
Set the RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S environment variable to increase the timeout.
"""
FEWER = "raise `accumulate`, lower `workers` or free memory there, and run the same command again"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LOW_ON_MEMORY, f"a machine ran out of memory, and with it a worker ended: {FEWER}"),
        (CUDA, f"a GPU ran out of memory, and with it a worker ended: {FEWER}"),
        (RAISED, "IndexError: index 17 is out of range"),
        (KILLED, "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
        (HANGS, "A worker health check has been hanging for 30.00 seconds. Marking the worker as dead."),
    ],
)
def test_what_ended_a_run_is_reported_in_one_sentence(text, expected):
    from ray.train import ControllerError, WorkerGroupError

    class Trainer:
        def __init__(self, error):
            self.error = error

        def fit(self):
            raise self.error

    for error in (WorkerGroupError(text, {0: RuntimeError(text)}), ControllerError(RuntimeError(text))):
        fit = ray_train._Fit(Trainer(error))
        fit.join()
        with pytest.raises(RuntimeError) as caught:
            fit.outcome()
        assert str(caught.value).startswith(f"Ray Train gave up: {expected}") and "\n" not in str(caught.value)
        assert "RAY_" not in str(caught.value)


def test_memory_that_ran_out_on_any_worker_is_reported():
    assert "a machine ran out of memory" in ray_train._cause(["RuntimeError: Connection closed by peer", LOW_ON_MEMORY])


def test_of_lines_between_two_reports_the_newest_is_sent_and_every_validation(monkeypatch, tmp_path):
    from ray import train

    sent = []
    monkeypatch.setattr(train, "report", lambda metrics, checkpoint, **_: sent.append(metrics["events"]))
    monkeypatch.setattr(ray_train, "_REPORT_SECONDS", 1e9)
    hooks = ray_train.RayHooks(Ranks(), str(tmp_path))
    hooks.begin(0)
    for step in range(1, 1001):
        metrics = {"train/loss": 1.0} if step % 2 == 0 else {}
        metrics |= {"validation/loss": 2.0} if step in (300, 501) else {}
        if metrics:
            hooks.log(step, metrics)
    waiting = len(hooks.waiting)
    hooks.begin(1000)
    assert [event["step"] for event in sent[-1]] == [300, 500, 501, 1000, 1000] and waiting == 4
    hooks.log(1002, {"train/loss": 1.0})
    hooks.begin(1002)
    assert [event["step"] for event in sent[-1]] == [1002, 1002]


STAGE = """
from pathlib import Path
import torch
torch.set_num_threads(1)
from stages.workers import fit
from tests.stages.test_training_stages import run_stage
from stages.tracker import PrintTracker
fit._LOST_WORKERS = 1
run_stage("dpar", Path({data!r}), Path({out!r}), Path({work!r}), PrintTracker(), workers=2, steps=120)
"""


def undisturbed_rank(rank: int, data: Path, root: Path) -> None:
    """Train the same job on two ranks without Ray."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{data}/group", rank=rank, world_size=2)
    params = tiny_params(workers=2, steps=120)
    config = dpar_config(params.model, codebook_size=CODES, row_width=GRID, num_classes=2)
    job = TrainJob("dpar", config, params.train, params.seed, data / "tokens", data / "maps")
    train_job(job, str(root), ranks=Ranks(rank, 2), hooks=Silent())
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_survives_a_killed_node(tmp_path):
    """Two nodes of one CPU with a worker each; one is killed in the middle, and as on a cloud another one comes.

    It comes after more tries to start the workers (a second each, a minute in earnest) than the run may lose workers (one,
    ten in earnest): the run waits for it.
    The end is bit by bit that of two ranks which nothing disturbed.
    """
    cluster._quiet()
    from ray.cluster_utils import Cluster

    write_tokens(tmp_path / "tokens")
    write_maps(tmp_path / "maps", tmp_path / "tokens")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=small)
    lost = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    script = STAGE.format(data=str(tmp_path), out=str(tmp_path / "out"), work=str(tmp_path / "work"))
    environment = {**os.environ, "RAY_ADDRESS": nodes.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1"}
    try:
        with open(tmp_path / "output", "w") as log:
            run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=log, stderr=log)
        while run.poll() is None and not list((tmp_path / "work").glob("run-*/step-00000010")):
            time.sleep(0.05)
        assert run.poll() is None, (tmp_path / "output").read_text()
        nodes.remove_node(lost, allow_graceful=False)
        time.sleep(4)
        nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        assert run.wait(900) == 0, (tmp_path / "output").read_text()
    finally:
        nodes.shutdown()
    events = [json.loads(line) for line in (tmp_path / "work" / "events.jsonl").read_text().splitlines()]
    begun = [event["step"] for event in events if event["kind"] == "begin"]
    assert begun[0] == 0 and len(begun) == 2 and 0 < begun[1] < 120

    undisturbed = tmp_path / "undisturbed"
    fork_server()
    mp.start_processes(undisturbed_rank, (tmp_path, undisturbed), nprocs=2, start_method="forkserver")
    expected = load_weights(undisturbed / "step-00000120" / "model.safetensors", kind="dpar")
    found = load_weights(tmp_path / "out" / "model.safetensors", kind="dpar")
    assert found.config == expected.config and found.meta["step"] == expected.meta["step"] == 120
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)
