"""Delivers journals to MLflow, in order and once: one process for a pipeline run, as importing MLflow takes seconds.

Every event may be delivered twice with the effect of once (runs are found by their key, MLflow keeps equal metric rows
once), so nothing depends on knowing whether an answer that was lost had been acted upon.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from dpar_core.secrets import redacted
from pipeline.tracking import store
from pipeline.tracking.journal import EVENTS, Event, Reader, bury
from pipeline.tracking.store import HOST_TAG, PID_TAG, STARTED_TAG, TrackingError
from pipeline.tracking.summary import WORST_TAG
from stages.terminal import note
from stages.workers.child import command

SENT = "sent.json"
KEY_TAG, DIGEST_TAG = "dpar.key", "dpar.digest"
LARGEST_BATCH, LONGEST_VALUE = 900, 500  # MLflow takes 1000 metrics and 100 params a request
LOOK_SECONDS = 0.2  # between looks for journals that begin or end
POLL_SECONDS, LONGEST_PAUSE = 2.0, 30.0  # between deliveries of one that grows; between tries while the store is away
PATIENCE = 20.0  # seconds without an answer of a server until that is reported
# A database on this machine is made while MLflow is imported for the first time and models train beside it: 20 to 30 s on
# two cores. One that is locked, read-only, damaged or full answers at once.
LOCAL_PATIENCE = 60.0
LEAVE_SECONDS = 60.0  # that one request may take when the pipeline run is over
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}

Say = Callable[[str], None]


class Refused(Exception):
    """MLflow will never take this event."""


class Lost(Exception):
    """The store does not know a run that it had: it was made anew."""


class Away(TrackingError):
    """MLflow cannot be written now; the message says why, and what to do."""


@dataclass
class _Progress:
    """How far a journal is delivered, in bytes. Artifacts have their own count: no upload holds up a number."""

    values: int = 0
    artifacts: int = 0
    refused: list[str] = field(default_factory=list)


class Outbox:
    """The way from the journals of one project to its store."""

    def __init__(self, root: Path, say: Say) -> None:
        store.quiet_environment()  # before anything of MLflow is imported
        self.root, self.say = root, say
        self.uri = redacted(store.tracking_uri(root))
        self.asked = float("inf")  # when the request began that is not answered yet
        self.client: Any = None
        self.experiment = ""
        self._runs: dict[str, str] = {}
        self._finished: set[str] = set()  # runs that were whole before: left alone

    def deliver(self, folder: Path) -> int:
        """Send what a journal holds now; return how many events went out. Raises Away.

        Only for its own writer's outbox, or under `held`.
        """
        progress = _read_progress(folder)
        try:
            return self._deliver(folder, progress)
        except Lost:
            self._runs.clear()
            progress.values = progress.artifacts = 0
            try:
                return self._deliver(folder, progress)
            except Lost as error:
                raise Away(f"MLflow at {self.uri} loses runs while they are written ({error}): look at the server") from None

    def _deliver(self, folder: Path, progress: _Progress) -> int:
        count, away = 0, None
        for artifacts in (False, True):
            begin = progress.artifacts if artifacts else progress.values
            for events, offset in _batches(Reader(folder).after(begin), artifacts=artifacts):
                try:
                    self._send(folder, progress, events)
                except Away as error:
                    if not artifacts:
                        raise
                    away = error
                    break
                count += len(events)
                if artifacts:
                    progress.artifacts = offset
                else:
                    progress.values = offset
                _write_progress(folder, progress)
        if away is not None:
            raise away
        return count

    def _send(self, folder: Path, progress: _Progress, events: list[Event]) -> None:
        """Send events; what MLflow refuses is left out alone, and named."""
        try:
            self._apply(folder, events)
        except Refused as error:
            if len(events) > 1:
                for event in events:
                    self._send(folder, progress, [event])
                return
            why = str(error)
            if why not in progress.refused:
                progress.refused.append(why)
                self.say(f"MLflow at {self.uri} refused a record of {folder.name}, which is left out: {why}")

    def _apply(self, folder: Path, events: list[Event]) -> None:
        """Do what events of one run and one kind ask for. Raises Away, Refused, Lost."""
        from mlflow import MlflowClient  # noqa: F401  a minute on a busy machine, in which no answer is waited for
        from mlflow.exceptions import MlflowException

        event = events[0]
        if event.run in self._finished:
            return
        self.asked = time.monotonic()
        try:
            try:
                self.connect()
                self._do(folder, event, events)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    raise Lost(store.reason(error)) from error
                if "'active' state" in str(error):  # deleted, alone or with its experiment, which can come back
                    self.client = None
                    self.connect()
                if event.op == "model" and error.error_code == "ENDPOINT_NOT_FOUND":
                    raise Refused("it knows no logged models, as MLflow 3 does") from error
                if error.error_code in _REFUSED:
                    raise Refused(redacted(" ".join(str(error).split()))[:300]) from error
                raise
        except Away:
            self.client = None
            raise
        except (Refused, Lost):
            raise
        except TrackingError as error:
            self.client = None
            raise Away(str(error)) from error
        except FileNotFoundError as error:
            if error.filename is not None and str(folder) in str(error.filename):
                raise Refused(f"the copy of an artifact is gone from the journal: {error.filename}") from error
            self.client = None
            raise Away(f"MLflow at {self.uri} cannot be written: {store.reason(error)}") from error
        except Exception as error:
            self.client = None
            raise Away(f"MLflow at {self.uri} cannot be written: {store.reason(error)}") from error
        finally:
            self.asked = float("inf")

    def connect(self) -> None:
        """Open the store where that is still to be done, and close runs whose process is gone. Raises TrackingError."""
        if self.client is None:
            self.client, self.experiment = store.connect(self.root)
            self._close_dead_runs()

    def _do(self, folder: Path, event: Event, events: list[Event]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        data = event.data
        if event.op == "run":
            self._runs[event.run] = self._open(event)
            return
        run = self._run(event.run)
        if event.op == "metrics":
            metrics = [
                Metric(name, float(value), one.time, one.data["step"] or 0)
                for one in events
                for name, value in one.data["values"].items()
            ]
            for first in range(0, len(metrics), LARGEST_BATCH):
                self.client.log_batch(run, metrics=metrics[first : first + LARGEST_BATCH])
        elif event.op == "params":
            params = [Param(name, str(value)[:LONGEST_VALUE]) for name, value in data.items()]
            for first in range(0, len(params), 100):
                self.client.log_batch(run, params=params[first : first + 100])
        elif event.op == "input":
            dataset = Dataset(name=data["name"], digest=data["digest"], source_type="local", source=data["path"])
            self.client.log_inputs(run, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "input")])])
        elif event.op == "model":
            self._log_model(run, data)
        elif event.op == "artifact":
            self.client.log_artifact(run, str(folder / data["file"]))
        elif event.op == "tags":
            for name, value in data.items():
                self.client.set_tag(run, name, value)
        elif event.op == "end":
            worst = self.client.get_run(run).data.tags.get(WORST_TAG, data["status"])
            self.client.set_terminated(run, worst, end_time=event.time)

    def _open(self, event: Event) -> str:
        """Return the id of an event's run; it is made where it is not there. One that is there goes on."""
        with store.locked(self.root):
            found = self._find(event.run)
            if found is not None:
                if event.data["once"] and found.info.status == "FINISHED":
                    self._finished.add(event.run)
                else:
                    self.client.update_run(found.info.run_id, status="RUNNING")
                run: str = found.info.run_id
                return run
            tags = {KEY_TAG: event.run, "mlflow.runName": event.data["name"], **event.data["tags"]}
            if event.data["parent"] is not None:
                tags["mlflow.parentRunId"] = self._run(event.data["parent"])
            run = self.client.create_run(self.experiment, start_time=event.time, tags=tags).info.run_id
            return run

    def _log_model(self, run: str, data: dict[str, Any]) -> None:
        """Make a model (known by its digest) where it is not there, link it with a run, and give it metrics of the run."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

        client, words = self.client, f"tags.`{DIGEST_TAG}` = '{data['digest']}'"
        found = client.search_logged_models([self.experiment], words, max_results=1)
        if found:
            model = found[0]
        else:
            tags = {**data["tags"], DIGEST_TAG: data["digest"], "mlflow.model.isExternal": "true"}
            source = run if data["made"] else None
            model = client.create_logged_model(
                self.experiment, data["name"], source, tags, data["params"], model_type=data["kind"]
            )
        if model.status != "READY":
            client.finalize_logged_model(model.model_id, "READY")
        linked = client.get_run(run)
        if data["made"] and model.model_id not in {one.model_id for one in linked.outputs.model_outputs}:
            client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
        elif not data["made"] and model.model_id not in {one.model_id for one in linked.inputs.model_inputs}:
            client.log_inputs(run, models=[LoggedModelInput(model.model_id)])
        name, digest = data["dataset"] or (None, None)
        metrics = [
            Metric(key, value, at, step or 0, model.model_id, name, digest) for key, value, step, at in data["metrics"]
        ]
        if metrics:
            client.log_batch(run, metrics=metrics)

    def _find(self, key: str) -> Any:
        from mlflow.entities import ViewType

        words = f"tags.`{KEY_TAG}` = '{key}'"
        found = self.client.search_runs([self.experiment], words, run_view_type=ViewType.ALL, max_results=1)
        return found[0] if found else None

    def _run(self, key: str) -> str:
        if key not in self._runs:
            found = self._find(key)
            if found is None:
                raise Lost(f"no run {key}")
            self._runs[key] = found.info.run_id
        return self._runs[key]

    def _close_dead_runs(self) -> None:
        """Mark runs as KILLED whose process is gone and whose journal is as well."""
        from mlflow.entities import ViewType

        words = "attributes.status = 'RUNNING'"
        kind = ViewType.ACTIVE_ONLY
        for run in self.client.search_runs([self.experiment], words, run_view_type=kind, max_results=200):
            if _is_dead(run.data.tags):
                self.client.set_terminated(run.info.run_id, "KILLED")


def _is_dead(tags: dict[str, str]) -> bool:
    import psutil

    if not tags.get(PID_TAG, "").isdigit() or tags.get(HOST_TAG) != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(tags[PID_TAG]))
        started = tags.get(STARTED_TAG)
        return started is not None and abs(process.create_time() - float(started)) > 2
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError):
        return False


def _batches(found: list[tuple[Event | None, int]], *, artifacts: bool) -> Iterator[tuple[list[Event], int]]:
    """Group events of one lane: metrics of a run that follow each other go out together."""
    batch: list[Event] = []
    end = 0
    for event, offset in found:
        if event is None or (event.op == "artifact") is not artifacts:
            continue
        together = batch and event.op == "metrics" == batch[0].op and event.run == batch[0].run
        if batch and (not together or len(batch) >= LARGEST_BATCH):
            yield batch, end
            batch = []
        batch.append(event)
        end = offset
    if batch:
        yield batch, end


def _read_progress(folder: Path) -> _Progress:
    try:
        found = _Progress(**json.loads((folder / SENT).read_text("utf-8")))
        if all(type(count) is int and 0 <= count < 1 << 60 for count in (found.values, found.artifacts)):
            return found
    except (ValueError, TypeError, OSError, RecursionError):
        pass
    return _Progress()  # sending all of it again changes nothing


def _write_progress(folder: Path, progress: _Progress) -> None:
    # In place, under the lock that `held` has on this very file.
    with open(folder / SENT, "r+", encoding="utf-8") as stream:
        text = json.dumps(vars(progress))
        stream.write(text)
        stream.truncate(len(text))


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold the right to deliver a journal; False where somebody else has it, or it is delivered and gone."""
    try:
        stream = open(folder / SENT, "a")  # noqa: SIM115
    except FileNotFoundError:
        yield False
        return
    with stream:
        if not lock_descriptor(stream.fileno(), blocking=False):
            yield False
            return
        yield (folder / SENT).exists()


def journals(root: Path) -> list[Path]:
    """Return the journals that are not delivered, oldest first."""
    return sorted(path.parent for path in journal_folder(root).glob("*/events.jsonl"))


def journal_folder(root: Path) -> Path:
    """Return the folder of a project's journals."""
    return store.store_root(root) / "work" / "tracking"


def sync(outbox: Outbox, *, leave: Path | None = None) -> int:
    """Deliver the journals of processes that are gone; return how many events went out. Raises Away.

    leave: the journal of the process that asks, which its own outbox delivers.
    """
    count = 0
    for folder in journals(outbox.root):
        if folder == leave:
            continue
        with held(folder) as mine:
            if mine and bury(folder):
                count += outbox.deliver(folder)
                shutil.rmtree(folder)
    return count


def opened(root: Path) -> tuple[Any, str]:
    """Return (client, experiment id) of a store that has all of what processes left that are gone. Raises TrackingError."""
    outbox = Outbox(root, note)
    sync(outbox)
    outbox.connect()
    return outbox.client, outbox.experiment


def launch(root: Path, key: str, process: Any) -> None:
    """Start the process that delivers the journals of a pipeline run, where it is not at work already.

    key: of the pipeline run.
    process: psutil's, at whose end the run is over; None where its journals are all there is.
    """
    with open(lock_file(root, key), "ab") as log:  # locked as long as the other process has it, as its standard error
        if lock_descriptor(log.fileno(), blocking=False):
            last = () if process is None else (str(process.pid), str(process.create_time()))
            nothing = subprocess.DEVNULL
            subprocess.Popen(
                command("pipeline.tracking.outbox", str(root), key, *last),
                stdin=nothing,
                stdout=nothing,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the stages: they say how their runs end
            )


def at_work(root: Path, key: str) -> bool:
    """Tell whether the process that delivers the journals of a pipeline run is there."""
    try:
        with open(lock_file(root, key), "r+b") as log:
            return not lock_descriptor(log.fileno(), blocking=False)
    except FileNotFoundError:
        return False


def lock_file(root: Path, key: str) -> Path:
    """Return the file that this process has locked while it is there, and to which it writes what goes wrong in it."""
    return journal_folder(root) / f".courier-{key}.log"


def main() -> None:
    """Deliver the journals of a pipeline run, after those that earlier processes left."""
    import psutil

    root, key, *last = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a stage: its end is still to be delivered
    os.chdir(root)
    store.quiet_environment()
    process = None
    if last:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(last[0]))
            process = process if process.create_time() == float(last[1]) else None
    _Courier(Path(root), key, process).run()
    lock_file(Path(root), key).unlink(missing_ok=True)
    for left in journal_folder(Path(root)).glob(".courier-*.log"):  # of processes that were killed
        with suppress(OSError), open(left, "r+b") as log:
            if lock_descriptor(log.fileno(), blocking=False) and not log.read(1):
                left.unlink()


class _Courier:
    """Delivers the journals of a pipeline run as they grow, until `process` ends, and they with it.

    The runs of a journal whose writer was killed end at once. What a person should read goes to the journals' writers.
    """

    def __init__(self, root: Path, key: str, process: Any) -> None:
        self.root, self.said, self.process = root, said_file(key), process
        self.outbox = Outbox(root, self._say)
        self.away = False  # whether it was reported that the store is away
        self.missed, self.pause = False, POLL_SECONDS
        self.known: set[Path] = set()

    def run(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()
        due = 0.0
        while True:
            lasts, now = self._lasts(), time.monotonic()
            mine = self._mine()
            for folder in mine:
                with held(folder) as free:
                    if free and ((ended := bury(folder)) or now >= due):
                        self._deliver(folder, ended=ended)
            if now >= due:
                due = time.monotonic() + self.pause
            if not mine and not lasts:
                return
            time.sleep(LOOK_SECONDS)

    def _mine(self) -> list[Path]:
        return [folder for folder in journals(self.root) if (folder / self.said).exists()]

    def _lasts(self) -> bool:
        """Whether the pipeline run may have more journals."""
        return self.process is not None and lives(self.process)

    def _deliver(self, folder: Path, *, ended: bool) -> None:
        try:
            if folder not in self.known:  # journals of earlier processes may wait
                sync(self.outbox, leave=folder)
                self.known.add(folder)
            count = self.outbox.deliver(folder)
        except Away as error:
            self._tell(str(error))
            self.missed, self.pause = True, min(2 * self.pause, LONGEST_PAUSE)  # not tenacity: journals end meanwhile
            if ended:
                (folder / self.said).unlink(missing_ok=True)  # left to whoever comes next
            return
        if self.missed and count:
            self._say(f"MLflow at {self.outbox.uri} is back, it has {count} records that it missed")
        self.missed, self.pause = False, POLL_SECONDS
        if ended:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, why: str) -> None:
        if not self.away:
            self.away = True
            self._say(
                f"{why}. Work goes on; what MLflow misses is kept in work/tracking and sent by the next run, or by "
                "`dpar-cli runs sync`"
            )

    def _watch(self) -> None:
        """Say that the store does not answer while a request hangs, and leave it when nobody waits for it any more."""
        patience = LOCAL_PATIENCE if self.outbox.uri.startswith("sqlite:") else PATIENCE
        while True:
            time.sleep(0.5)
            waited = time.monotonic() - self.outbox.asked
            if waited > patience:
                self._tell(f"MLflow at {self.outbox.uri} has not answered for {patience:g} s")
            if waited > LEAVE_SECONDS and not self._lasts() and not any(map(_is_written, self._mine())):
                os._exit(3)

    def _say(self, sentence: str) -> None:
        for folder in self._mine():
            with (
                suppress(OSError),
                open(folder / self.said, "a", encoding="utf-8") as stream,
            ):  # nobody listens where it is gone
                print(sentence, file=stream, flush=True)


def lives(process: Any) -> bool:
    """Tell whether a process (psutil's) has not ended."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def said_file(key: str) -> str:
    """Return the name of the file in a journal by which a pipeline run's courier knows it and speaks to its writer."""
    return f"said-{key}"


def _is_written(folder: Path) -> bool:
    """Whether the writer of a journal is alive."""
    try:
        with open(folder / EVENTS, "rb") as stream:
            return not lock_descriptor(stream.fileno(), blocking=False)
    except FileNotFoundError:
        return False
