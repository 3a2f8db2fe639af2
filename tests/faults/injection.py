"""Faults inside a process: at the n-th change that it makes to the files of a project, something happens.

Changes are seen through Python's audit events (open for writing, rename, link, remove, mkdir, rmdir, chmod, truncate) and
a wrapped os.fsync, so nothing of the program is replaced. Native writers (safetensors, Arrow) write between two such
points; a limit on the size of files stops those as a full disk does.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVENTS = {
    "os.rename": "rename",
    "os.link": "link",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.chmod": "chmod",
    "os.truncate": "truncate",
}
NEEDS_ROOM = {"open", "mkdir", "link", "fsync"}  # what a full disk refuses
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Injection:
    """What happens, and when. where: "stage" or "child", the process it happens in. at: the number of the change.

    what: kill, term, int, ENOSPC, EIO, EROFS, or clock (the time of day jumps by `seconds`). lasting: whether every later
    change meets the error as well. largest: bytes of the largest file that this process may write, None: any.
    """

    what: str = ""
    where: str = "stage"
    at: int = -1
    lasting: bool = False
    seconds: float = 0.0
    largest: int | None = None


@dataclass
class Watch:
    """Counts the changes of this process below a folder, and does what an injection asks for."""

    root: str
    injection: Injection
    where: str = "stage"
    count: int = 0
    done: bool = False
    names: list[str] = field(default_factory=list)

    def change(self, kind: str, path: object) -> None:
        """Take note of a change that is about to be made."""
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not os.path.abspath(path).startswith(self.root):
            return
        number, self.count = self.count, self.count + 1
        asked = self.injection
        if asked.where != self.where or not asked.what or number < asked.at or (self.done and not asked.lasting):
            return
        if asked.what == "ENOSPC" and kind not in NEEDS_ROOM:  # then the next one that does
            return
        self.done = True
        if asked.what in SIGNALS:
            os.kill(os.getpid(), SIGNALS[asked.what])
        elif asked.what == "clock":
            jump(asked.seconds)
        else:
            raise OSError(ERRORS[asked.what], os.strerror(ERRORS[asked.what]), path)


def watch(root: Path, injection: Injection) -> Watch:
    """Begin to watch this process; there is no way back, so it is done in a process made for it."""
    found = Watch(str(root), injection)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and flags & _WRITES):
                found.change("open", path)
        elif event in EVENTS:
            found.change(EVENTS[event], arguments[0])
        elif event in ("socket.connect", "socket.getaddrinfo") and (host := host_of(event, arguments)) is not None:
            with open(root / "connections", "a") as stream:
                stream.write(f"{event} {host} by {sys.argv}\n")

    sys.addaudithook(hook)
    fsync = os.fsync

    def watched(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        found.change("fsync", os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    os.fsync = watched
    return found


def host_of(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Return what a process is about to reach or look up, None where that stays within this machine."""
    if event == "socket.connect":
        connection, address = arguments
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return None  # a datagram socket that connects sends nothing: Ray learns its own address that way
        address = address[0]
    else:
        address = arguments[0]
    host = os.fsdecode(address) if isinstance(address, str | bytes) else ""
    return None if host in ("", "localhost", "::1") or host.startswith(("127.", "10.231.0.")) else host  # nodes.py


def limit_files(injection: Injection, where: str) -> None:
    """Let no file of this process grow beyond the injection's limit; what would, fails with EFBIG."""
    if injection.largest is not None and injection.where == where:
        resource.setrlimit(resource.RLIMIT_FSIZE, (injection.largest, resource.RLIM_INFINITY))


def jump(seconds: float) -> None:
    """Set this process's time of day forward or back."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
