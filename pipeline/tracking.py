"""MLflow: every stage a run, all runs of one pipeline pass under one parent. Written from the driver process only."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.tracker import LineProgress, Progress

EXPERIMENT = "dpar"
PASS_TAG, PID_TAG, HOST_TAG = "dpar.pass", "dpar.pid", "dpar.host"
FLUSH_SECONDS, LARGEST_BATCH, LONGEST_VALUE = 5.0, 900, 500


class TrackingError(RuntimeError):
    """MLflow could not be written; the message says where it was looked for."""


def quiet_environment() -> None:
    """Set what keeps MLflow and its libraries from talking to the outside or over our output. Before importing them."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"),
        ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false"),
        ("MLFLOW_LOGGING_LEVEL", "ERROR"),
        ("GIT_PYTHON_REFRESH", "quiet"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
    ):
        os.environ.setdefault(name, value)


def tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite store in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def connect(root: Path) -> tuple[Any, str]:
    """Return (client, experiment id); store and experiment are made once, under a lock. Raises TrackingError."""
    quiet_environment()
    uri = tracking_uri(root)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        with locked(root):
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is not None:
                return client, experiment.experiment_id
            local = uri.startswith("sqlite:")
            place = (root.resolve() / "mlartifacts").as_uri() if local else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=place)
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow store {uri} cannot be used: {error}; check MLFLOW_TRACKING_URI") from error


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock under which runs are found and made: two processes never make the same one."""
    folder = root / "work"
    folder.mkdir(exist_ok=True)
    with open(folder / ".mlflow.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pass_identity() -> tuple[str, str]:
    """Return (identity, name) of the pipeline pass this process belongs to.

    Under `dvc repro` or `dvc exp run` that is the dvc process: all its stages find the same one. A stage run by hand is
    a pass of its own.
    """
    import psutil

    process = psutil.Process()
    for ancestor in process.parents():
        try:
            words = ancestor.cmdline()
        except psutil.Error:
            continue
        names = {Path(word).name for word in words[:3]}
        if "dvc" in names or ("-m" in words and "dvc" in words):
            process = ancestor
            break
    started = process.create_time()
    name = time.strftime("pass %Y-%m-%d %H:%M:%S", time.localtime(started))
    return f"{socket.gethostname()}-{process.pid}-{started:.2f}", name


@contextmanager
def open_tracker(stage: str, params: Any, chosen: Any, *, root: Path) -> Iterator[MlflowTracker]:
    """Open the run of a stage under the parent of its pass; it ends FINISHED, FAILED, or KILLED on Ctrl-C."""
    from pipeline.runner import plain, whole_params

    client, experiment = connect(root)
    identity, name = pass_identity()
    with locked(root):
        close_dead_runs(client, experiment)
        parent = _parent_run(client, experiment, identity, name, whole_params(params))
        tags = {"mlflow.parentRunId": parent, "mlflow.runName": stage, "dpar.stage": stage}
        tags |= {PID_TAG: str(os.getpid()), HOST_TAG: socket.gethostname()}
        run = client.create_run(experiment, tags=tags).info.run_id
    tracker = MlflowTracker(client, run, parent, stage)
    tracker.log_params(_flatten(plain(chosen)))
    try:
        yield tracker
        tracker.close("FINISHED")
    except KeyboardInterrupt:
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _parent_run(client: Any, experiment: str, identity: str, name: str, params: dict[str, Any]) -> str:
    found = client.search_runs([experiment], filter_string=f"tags.`{PASS_TAG}` = '{identity}'", max_results=1)
    if found:
        return found[0].info.run_id
    run = client.create_run(experiment, tags={PASS_TAG: identity, "mlflow.runName": name}).info.run_id
    _log_params(client, run, params)
    return run


def _log_params(client: Any, run: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run, params=[Param(key, str(value)[:LONGEST_VALUE]) for key, value in params.items()])


def close_dead_runs(client: Any, experiment: str) -> None:
    """Mark runs whose process is gone (kill -9, power cut) as KILLED."""
    import psutil

    for run in client.search_runs([experiment], filter_string="attributes.status = 'RUNNING'", max_results=200):
        tags = run.data.tags
        dead = PID_TAG in tags and tags.get(HOST_TAG) == socket.gethostname() and not psutil.pid_exists(int(tags[PID_TAG]))
        if dead:
            client.set_terminated(run.info.run_id, "KILLED")


class MlflowTracker:
    """Implements stages.tracker.Tracker. Metrics are written in batches, as each row costs a transaction otherwise."""

    def __init__(self, client: Any, run: str, parent: str, stage: str) -> None:
        self.client, self.run, self.parent, self.stage = client, run, parent, stage
        self._waiting: list[Any] = []
        self._last: dict[str, float] = {}
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    def log_params(self, params: Mapping[str, object]) -> None:
        _log_params(self.client, self.run, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            self._waiting += [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
            self._last |= {name: float(value) for name, value in metrics.items()}
        if time.monotonic() - self._flushed > FLUSH_SECONDS or len(self._waiting) > LARGEST_BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the metrics that wait. Raises TrackingError after three attempts."""
        from mlflow.exceptions import MlflowException

        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._flushed = time.monotonic()
        for first in range(0, len(waiting), LARGEST_BATCH):
            for attempt in range(3):
                try:
                    self.client.log_batch(self.run, metrics=waiting[first : first + LARGEST_BATCH])
                    break
                except MlflowException as error:
                    if attempt == 2:
                        raise TrackingError(f"metrics of {self.stage} could not be written to MLflow: {error}") from error
                    time.sleep(1.0 + attempt)

    def log_input(self, name: str, path: Path, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest, source_type="local", source=str(path))
        self.client.log_inputs(self.run, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "input")])])

    def log_picture(self, path: Path) -> None:
        self.client.log_artifact(self.run, str(path))

    def log_artifact(self, path: Path) -> None:
        self.client.log_artifact(self.run, str(path))

    @contextmanager
    def progress(self, total: int, description: str, *, done: int = 0, unit: str = "it") -> Iterator[Progress]:
        if not sys.stderr.isatty():
            yield LineProgress(total, description, done=done, unit=unit)
            return
        with _rich_bar() as bar:
            task = bar.add_task(description, total=total, completed=done, values="", unit=unit)
            yield _RichProgress(bar, task)

    def close(self, status: str) -> None:
        """Write what waits, copy the last values to the parent under the stage's name, and end the run."""
        from mlflow.entities import Metric

        self.flush()
        now = int(time.time() * 1000)
        kept = {n: v for n, v in self._last.items() if not n.startswith(("perf/", "train/"))}
        self.client.log_batch(self.parent, metrics=[Metric(f"{self.stage}/{n}", v, now, 0) for n, v in kept.items()])
        self.client.set_terminated(self.run, status)
        # The parent has no end of its own: it is as far as its latest stage.
        self.client.set_terminated(self.parent, status)


def _rich_bar():
    from rich import progress as rich

    class Rate(rich.ProgressColumn):
        def render(self, task: rich.Task) -> str:
            return "" if task.speed is None else f"{task.speed:.1f} {task.fields['unit']}/s"

    return rich.Progress(
        rich.TextColumn("[bold]{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), Rate(),
        rich.TextColumn("{task.fields[values]}"), rich.TimeElapsedColumn(), rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )  # fmt: skip


class _RichProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def advance(self, amount: int = 1, **values: float) -> None:
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.update(self.task, advance=amount, values=shown)
