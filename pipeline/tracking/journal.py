"""The journal of a process: what it has to say to MLflow, on local disk first, so that nothing waits and nothing is lost.

A journal is a folder work/tracking/TIME-PROCESS-NAME/ with `events.jsonl`, one event per line in the order they happened,
and `files/`, copies of artifacts. Its writer holds a lock on events.jsonl as long as it lives. Who delivers (outbox.py)
holds one on `sent.json`, which records how far it is, and removes the folder at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import lock_descriptor

from dpar_core.secrets import redacted_data

EVENTS, FILES = "events.jsonl", "files"
Operation = Literal["run", "params", "metrics", "input", "model", "artifact", "tags", "end"]


@dataclass(frozen=True)
class Event:
    """Something to do in MLflow. Doing it twice gives what doing it once gives.

    run: key of the run it belongs to, which the run carries as a tag.
    time: milliseconds since 1970.
    data: of "run" {name, tags, parent (a key or None), once (leave it alone where it is finished already)}; of "params" and
        "tags" names and values; of "metrics" {values, step}; of "input" {name, path, digest}; of "model" the fields of
        LoggedModel, dataset (name and digest, or None) and metrics, each as [name, value, step, time], which the run has as
        well; of "artifact" {file, below the journal's folder}; of "end" {status}.
    """

    op: Operation
    run: str
    time: int
    data: dict[str, Any]


class Journal:
    """Writes events of this process. Thread-safe. Raises OSError where the disk does."""

    def __init__(self, folder: Path, name: str) -> None:
        """folder: work/tracking. name: of this journal, for people."""
        moment = time.time()
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(moment))}.{int(moment % 1 * 1e6):06d}"
        self.folder = folder / f"{stamp}-{socket.gethostname()}-{os.getpid()}-{name.replace('/', '_').replace(' ', '_')}"
        self.folder.mkdir(parents=True)
        # Locked before it has its name: whoever found it unlocked would take its writer for dead, and remove it.
        unnamed = self.folder / f"{EVENTS}.new"
        self._stream = open(unnamed, "a", encoding="utf-8")  # noqa: SIM115
        lock_descriptor(self._stream.fileno())
        unnamed.rename(self.folder / EVENTS)
        self._lock, self._files = threading.Lock(), 0

    def write(self, op: Operation, run: str, data: dict[str, Any], *, time_ms: int | None = None) -> None:
        """Append an event, its passwords redacted. time_ms: when it happened, now when left out."""
        event = Event(op, run, int(time.time() * 1000) if time_ms is None else time_ms, redacted_data(data))
        line = json.dumps(dataclasses.asdict(event)) + "\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()

    def write_file(self, run: str, path: Path) -> None:
        """Keep a copy of a file as it is now, and an event that asks for it to be uploaded."""
        with self._lock:
            self._files += 1
            number = self._files
        copy = Path(FILES, str(number), path.name)
        (self.folder / copy).parent.mkdir(parents=True)
        shutil.copyfile(path, self.folder / copy)
        self.write("artifact", run, {"file": copy.as_posix()})

    def close(self) -> None:
        """Say that nothing more will come from here."""
        self._stream.close()


class Reader:
    """Reads the whole lines of a journal from a byte offset on."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS

    def after(self, offset: int) -> list[tuple[Event | None, int]]:
        """Return (event, offset behind it) of what is there now; None stands for a damaged line."""
        found: list[tuple[Event | None, int]] = []
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                found.append((_event(line), offset))
        return found


def _event(line: bytes) -> Event | None:
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return event if isinstance(event.data, dict) and isinstance(event.run, str) else None


def bury(folder: Path) -> bool:
    """Write the end of runs whose process is gone (kill -9, power cut) as KILLED; return whether the process is gone."""
    with open(folder / EVENTS, "r+b") as stream:
        if not lock_descriptor(stream.fileno(), blocking=False):
            return False
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        open_runs: dict[str, int] = {}
        last = int(os.path.getmtime(folder / EVENTS) * 1000)
        for line in content[:whole].splitlines():
            event = _event(line)
            if event is None:
                continue
            if event.op == "run":
                open_runs[event.run] = event.time
            elif event.op == "end":
                open_runs.pop(event.run, None)
        ends = [Event("end", run, last, {"status": "KILLED"}) for run in reversed(open_runs)]
        if ends or whole < len(content):
            stream.truncate(whole)  # the writer died in the middle of a line
            stream.seek(whole)
            stream.write(b"".join(json.dumps(dataclasses.asdict(end)).encode() + b"\n" for end in ends))
    return True
