"""The thin Ray Train (V2) adapter: runs a function on every rank, brings its log lines to the driver.

One worker on this machine alone works in Ray Train's local mode (stages/workers/local.py), any other run in a cluster.
Checkpoints belong to dpar_core.training.checkpoint. They lie in Ray's folder of the run and are reported to Ray as they
are, so a run continues when it is started again under its name, and Ray's own snapshot of them (not written atomically)
is never needed.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import torch.distributed

from dpar_core.system import cpus
from dpar_core.training import allocator
from dpar_core.training.checkpoint import CheckpointError, file_system
from dpar_core.training.loop import TrainingStopped
from dpar_core.training.parallel import Ranks
from stages.params import Training
from stages.terminal import note
from stages.workers import cluster
from stages.workers.local import Call, LocalFit
from stages.workers.lock import locked

EVENTS, RETURNED = "events.jsonl", "returned.json"
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
_REPORT_SECONDS = 1.0  # log lines go to the driver together, at most this often
_LOST_WORKERS = 10  # times a run may lose a worker or a node and go on from its last checkpoint
_PATIENCE = 60.0  # seconds until a run that has not begun reports it
_START_TRIES = 24 * 60  # times Ray waits a minute for room: until a lost machine is replaced, or other work ends
_NO_MEMORY = re.compile(r"low on memory|OutOfMemory|CUDA out of memory")
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")  # the line of a traceback that names the error

Returned = dict[str, Any]  # what a worker's function returned, or {"error", perhaps "traceback"}


@dataclass(frozen=True)
class Event:
    """What a run reports on its way.

    metrics: of a log line.
    address: of a checkpoint.
    reason: why workers were lost, in Ray's words.
    """

    kind: Literal["begin", "log", "checkpoint", "lost"]
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    address: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Scale:
    """How many workers of which size. threads: CPU threads all workers of a node share (0: all its cores)."""

    workers: int
    cpus: int
    gpus: int
    group: bool  # whether the workers form a torch process group
    threads: int = 0

    @staticmethod
    def of(training: Training, *, device: str) -> Scale:
        """Read it from params. On device cuda a worker gets a GPU even if params ask for none."""
        gpus = training.gpus_per_worker or (1 if device == "cuda" else 0)
        group = training.workers > 1 or training.strategy == "fsdp" or gpus > 0
        limit = torch.get_num_threads()  # as the driver was set; all of its cores mean all cores of any node
        threads = 0 if limit >= cpus() else limit
        return Scale(training.workers, training.cpus_per_worker, gpus, group, threads)


class TrainingFailed(RuntimeError):
    """A worker stopped for a reason it could name, in its own sentence."""


def run_folder(storage: str | None, work: Path, name: str) -> str:
    """Return where a run keeps its checkpoints: a folder (absolute) or an address."""
    if storage is None:
        return str(work.resolve() / name)
    return f"{storage.rstrip('/')}/{name}" if "://" in storage else str(Path(storage).resolve() / name)


def fit(
    function: Callable[..., Returned],
    *,
    root: str,
    work: Path,
    scale: Scale,
    section: str,
    on_event: Callable[[Event], None],
) -> Returned:
    """Run `function(ranks=, hooks=)` on every rank and return what rank 0 returned, which has to be plain data.

    function: importable by name on the workers (a module-level function or a partial of one), reports by `hooks`.
    root: folder or address of the run, on storage that all nodes see.
    work: local folder of this stage.
    on_event: called here, in order.
    Raises TrainingFailed with a worker's sentence, ValueError when the cluster is too small, RuntimeError when too many
    workers were lost.
    """
    work.mkdir(parents=True, exist_ok=True)
    events = work / EVENTS
    require = partial(cluster.require, workers=scale.workers, cpus=scale.cpus, gpus=scale.gpus, section=section)
    if (own := cluster.expected()) is not None:
        require(own)
    with locked(work / "lock", busy=_trained_already):
        events.write_text("")
        if own is not None and scale.workers == 1 and not scale.group:
            returned = _fit_here(function, root, events, scale, on_event)
        else:
            with cluster.connected() as nodes:
                require(nodes)
                thread = _Fit(_trainer(function, root, events, scale))
                _follow(thread, events, _StartWatch(scale, root), on_event)
            returned = thread.outcome()
    if "error" in returned:
        failure = TrainingFailed(returned["error"])
        if "traceback" in returned:
            failure.add_note(returned["traceback"])
        raise failure
    return returned


def _fit_here(
    function: Callable[..., Returned], root: str, events: Path, scale: Scale, on_event: Callable[[Event], None]
) -> Returned:
    _prepare(root)
    loop = partial(_worker, function, root, scale, events.absolute())
    thread = LocalFit(Call(root.rsplit("/", 1)[1], loop, events.absolute().with_name(RETURNED)))
    try:
        _follow(thread, events, None, on_event)
    finally:
        thread.stop()
    return thread.outcome()


def _follow(thread: threading.Thread, events: Path, silence: _StartWatch | None, on_event: Callable[[Event], None]) -> None:
    """Pass events on until the thread ends."""
    with open(events, "rb") as stream:
        tail = _Tail(stream)
        while thread.is_alive():
            thread.join(0.5)
            new = tail.deliver(on_event)
            if silence is not None:
                silence.hear(new)
        tail.deliver(on_event)


def _trainer(function: Callable[..., Returned], root: str, events: Path, scale: Scale) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    files, path = file_system(root)
    parent, name = path.rsplit("/", 1)
    _prepare(root)
    scaling = ScalingConfig(
        num_workers=scale.workers,
        use_gpu=scale.gpus > 0,
        resources_per_worker={"CPU": scale.cpus, **({"GPU": scale.gpus} if scale.gpus else {})},
    )
    run = RunConfig(
        name=name,
        storage_path=parent,
        storage_filesystem=files,
        failure_config=FailureConfig(max_failures=_LOST_WORKERS, controller_failure_limit=_START_TRIES),
        checkpoint_config=CheckpointConfig(),
        logging_config=LoggingConfig(log_level="ERROR"),
        callbacks=[_relay(events)],
        worker_runtime_env={} if scale.gpus else {"env_vars": allocator.ENVIRONMENT},
    )
    # Not as train_loop_config: Ray's controller would unpack that, and import torch with it.
    loop = partial(_worker, function, root, scale)
    options = {"scaling_config": scaling, "run_config": run}
    if scale.group:
        from ray.train.torch import TorchTrainer

        return TorchTrainer(loop, **options)
    # One process needs no process group, and so Ray's controller no torch: two seconds of two cores saved.
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer(loop, **options)


def _prepare(root: str) -> None:
    """Make the run's folder, mark it, and drop Ray's list of checkpoints: some of them may be gone or half written."""
    from pyarrow import fs

    files, path = file_system(root)
    files.create_dir(path, recursive=True)
    _Marker(root).write(error=None)
    if files.get_file_info(f"{path}/{_RAY_SNAPSHOT}").type != fs.FileType.NotFound:
        files.delete_file(f"{path}/{_RAY_SNAPSHOT}")


def _relay(events: Path) -> Any:
    """Return the callback that writes reports to a file; it runs in Ray's controller, on the driver's machine."""
    from ray.train import UserCallback

    class Relay(UserCallback):  # type: ignore[misc]  # Ray's classes are Any here
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            _append(events, metrics[0]["events"])

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            reason = "\n".join(str(error) for error in worker_exceptions.values())
            _append(events, [{"kind": "lost", "step": 0, "reason": reason}])

    return Relay()


def _append(path: Path, events: list[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(event) + "\n" for event in events)


def _worker(function: Callable[..., Returned], root: str, scale: Scale, events: Path | None = None) -> Returned:
    """What runs on every rank. A reason that trying again cannot change is returned, anything else makes Ray retry.

    events: the file for reports in local mode, where Ray calls nobody back.
    """
    from ray import train

    context = train.get_context()
    threads = (scale.threads or cpus()) // context.get_local_world_size()
    torch.set_num_threads(max(threads, 1))  # Ray starts workers with one
    device = torch.device("cpu")
    if scale.gpus:
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    try:
        stop = _first(_Marker(root).error(), ranks)
        return {"error": stop} if stop else function(ranks=ranks, hooks=RayHooks(ranks, root, events))
    except (CheckpointError, TrainingStopped) as error:  # all ranks stop with it
        return {"error": str(error)}
    except (ConnectionError, TimeoutError):
        raise
    except (ValueError, OSError) as error:  # trying again cannot help
        if ranks.world == 1:
            return {"error": str(error)}
        _Marker(root).write(error=str(error))
        raise  # so that Ray ends the ranks that wait for this one
    except Exception as error:
        if ranks.world == 1 and isinstance(error, torch.OutOfMemoryError):
            return {"error": _ran_out("a GPU")}
        if ranks.world == 1:
            return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        raise  # perhaps because another rank died


def _first(sentence: str | None, ranks: Ranks) -> str | None:
    """Return the first rank's sentence that is one, on all ranks; collective."""
    if ranks.world == 1:
        return sentence
    sentences: list[str | None] = [None] * ranks.world
    torch.distributed.all_gather_object(sentences, sentence)
    return next((one for one in sentences if one), None)


class _Marker:
    """A small file in a run's folder: it shows that a node sees the folder, and carries a reason to stop for good."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.files, folder = file_system(root)
        self.path = f"{folder}/run.json"

    def write(self, *, error: str | None) -> None:
        with self.files.open_output_stream(self.path) as stream:
            stream.write(json.dumps({"error": error}).encode())

    def error(self) -> str | None:
        """Return why a run cannot go on: an earlier attempt left a reason, or this node does not see the folder."""
        if not self.files.get_file_info(self.path).is_file:
            return (
                f"a worker on {os.uname().nodename} does not see {self.root}: set `storage` to a path that all nodes "
                "share, or to an address such as s3://bucket/path"
            )
        with self.files.open_input_stream(self.path) as stream:
            reason: str | None = json.loads(stream.read())["error"]
        return reason


class RayHooks:
    """Hooks of dpar_core.training.loop that report to Ray, every rank equally often."""

    def __init__(self, ranks: Ranks, root: str, events: Path | None = None) -> None:
        self.ranks, self.root, self.file = ranks, root, events
        self.waiting: list[Event] = []
        self.reported = time.monotonic()

    def begin(self, step: int) -> None:
        self._report(Event("begin", step))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # Of lines between two reports the newest is sent, and every validation loss: however short a step, few wait.
        if "train/loss" in metrics and self.waiting and "validation/loss" not in self.waiting[-1].metrics:
            self.waiting.pop()
        self.waiting.append(Event("log", step, metrics))
        if self.ranks.agree(time.monotonic() - self.reported > _REPORT_SECONDS):
            self._report()

    def checkpoint(self, step: int, address: str) -> None:
        self._report(Event("checkpoint", step, address=address))

    def _report(self, event: Event | None = None) -> None:
        from ray import train
        from ray.train import Checkpoint, CheckpointUploadMode

        checkpoint = None
        if event is not None and event.address is not None and self.ranks.first:
            files, path = file_system(event.address)
            checkpoint = Checkpoint(path, filesystem=files)
        # As plain data: Ray's controller would import this module, and torch with it, to read records.
        events = [asdict(one) for one in (*self.waiting, *([event] if event else []))]
        train.report({"events": events}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if self.file is not None:
            _append(self.file, events)
        self.waiting, self.reported = [], time.monotonic()


class _Fit(threading.Thread):
    """`trainer.fit()` beside the main thread, so that Ctrl-C stops the driver at once (Ray's handler only asks)."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self._returned: Returned = {}
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._returned = self._trainer.fit().return_value
        except BaseException as error:  # raised again by `outcome`, in the main thread
            self._error = error

    def outcome(self) -> Returned:
        if self._error is None:
            return self._returned
        error = self._error
        failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
        cause = _cause([str(failure) or type(failure).__name__ for failure in failures.values()])
        raise RuntimeError(f"Ray Train gave up: {cause}") from error


def _cause(texts: list[str]) -> str:
    """Say in one sentence what ended a run or its workers, from what Ray says in pages."""
    short = next((text for text in texts if _NO_MEMORY.search(text)), None)
    if short is not None:
        return _ran_out("a GPU" if "CUDA out of memory" in short else "a machine")
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    dead = [line for line in lines if "is dead because" in line]
    return [*lines[:1], *dead[:1], *raised[-1:]][-1] if lines else "no reason given"


def _ran_out(where: str) -> str:
    return (
        f"{where} ran out of memory, and with it a worker ended: raise `accumulate`, lower `workers` or free memory "
        "there, and run the same command again, it goes on from its last checkpoint (`dpar-cli cost --gpu NAME` names how "
        "many images fit in a GPU; a smaller `batch_size` helps as well, but starts the run afresh)"
    )


class _Tail:
    """Reads the lines that are new in a growing file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._begun = stream, b""

    def deliver(self, on_event: Callable[[Event], None]) -> list[Event]:
        """Pass new events on, and return them."""
        new = []
        while line := self._stream.readline():
            self._begun += line
            if self._begun.endswith(b"\n"):
                event, self._begun = Event(**json.loads(self._begun)), b""
                on_event(event)
                new.append(event)
        return new


class _StartWatch:
    """Prints on standard error that workers were lost, and once per start that Ray has not started them yet."""

    def __init__(self, scale: Scale, root: str) -> None:
        self.root, self.until = root, time.monotonic() + _PATIENCE
        self.size = f"{scale.workers} of {scale.cpus} CPUs" + (f" and {scale.gpus} GPUs" if scale.gpus else "") + " each"

    def hear(self, events: list[Event]) -> None:
        """Take note of what came since the last call."""
        for event in events:
            lost = event.kind == "lost"
            self.until = time.monotonic() + _PATIENCE if lost else float("inf")
            if lost and _Marker(self.root).error() is None:  # else the run ends, with that sentence
                self._say(
                    f"a worker was lost ({_cause([event.reason])}): Ray starts them again when the cluster has room for "
                    f"{self.size}, and training goes on from its newest checkpoint"
                )
        if time.monotonic() > self.until:
            self.until = float("inf")
            self._say(
                f"no worker has begun after {_PATIENCE:g} s: Ray waits for room for {self.size}, or they are still starting"
            )

    def _say(self, what: str) -> None:
        note(f"{what}; it goes on by itself, Ctrl-C stops it (`ray status` shows what is in use)")


def _trained_already(holder: str) -> None:
    raise RuntimeError(f"process {holder} is training this run already: wait for it, or end it")
