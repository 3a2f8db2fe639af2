"""The one file lock: filelock's, with the number of the process that holds it in the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_POLL_SECONDS = 0.2  # between looks of those who wait


@contextmanager
def locked(path: Path, *, busy: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Hold the lock of a file, which ends with this process however it ends; wait where another process holds it.

    busy: called before waiting with the number of the process that holds the lock; it may raise instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The soft lock of file systems without locks would outlive a process that was killed.
    lock = FileLock(path, fallback_to_soft=False, poll_interval=_POLL_SECONDS)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        busy(path.read_text("utf-8").strip() or "unknown")
        held = lock.acquire()
    with held:
        path.write_text(str(os.getpid()))
        yield
