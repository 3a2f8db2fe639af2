"""What is kept of an error that nobody foresaw: one sentence for the terminal, the details in a file."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

from dpar_core.secrets import redacted
from stages.terminal import note

_OURS = Path(__file__).resolve().parents[1]
_ROOMS = tuple(str(_OURS / name) + os.sep for name in ("dpar_core", "stages", "pipeline"))

# What a disk says, and what to do about it, by the number of the error.
DISK = {
    errno.ENOSPC: "the disk is full: make room there",
    errno.EDQUOT: "the quota of this user is used up: make room there",
    errno.EFBIG: "the file is larger than this process may write (`ulimit -f`): raise the limit",
    errno.EROFS: "the file system is read-only: make it writable",
    errno.EIO: "the disk, or the connection to it, fails: look at the system's log",
    errno.ESTALE: "the connection to the file server is lost: mount it again",
    errno.EMFILE: "this process may not open more files (`ulimit -n`): raise the limit",
}


def disk_sentence(error: BaseException) -> str | None:
    """Return what a disk or a connection says, and what to do; None for an error of another kind."""
    if isinstance(error, ConnectionError | TimeoutError) and not ours(error):
        what = " ".join(str(error).split())[:300] or type(error).__name__
        return f"a connection failed ({what}): run the same command again when the server answers, it goes on"
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    named = isinstance(error.filename, str | bytes | os.PathLike)
    where = os.fsdecode(error.filename) if named else f"a file below {os.getcwd()}"
    return f"{where}: {DISK[error.errno]}, and run the same command again, it goes on from what is there"


def crash_sentence(error: BaseException, *, doing: str) -> str:
    """Write the details of an error to work/crash-*.txt and return the sentence that names it.

    doing: what stopped, as "dpar-cli stage train_dpar". Outside a project the file goes to the temporary folder.
    """
    kind, first = type(error).__name__, " ".join(str(error).split())[:300]
    while_reading = "" if (file := file_at_work(error)) is None or str(file) in first else f", while at work on {file}"
    what = f"{kind}: {first}" if first else kind
    sentence = redacted(f"{doing} stopped with an error that it did not expect, {what}{while_reading}")
    try:
        path = _write(error, sentence)
    except OSError as failed:
        return f"{sentence}; its details could not be written ({failed}): DPAR_DEBUG=1 shows them"
    return f"{sentence}; the details are in {path}"


def plain_warnings() -> None:
    """Print warnings as sentences, without the line of code that gave them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"warning: {redacted(str(message))}")

    warnings.showwarning = show


def ours(error: BaseException) -> bool:
    """Return whether this project's own code raised an error, in a sentence of its own."""
    frame = _innermost(error)
    return frame is None or frame.f_code.co_filename.startswith(_ROOMS)


def file_at_work(error: BaseException) -> Path | None:
    """Return the file that our innermost function with one in hand was reading or writing, None when there is none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        if not frame.f_code.co_filename.startswith(_ROOMS):
            continue
        found = [value for value in frame.f_locals.values() if isinstance(value, Path)]
        if files := [path for path in found if path.is_file()]:
            return files[-1]
    return None


def _innermost(error: BaseException) -> FrameType | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else None


def _write(error: BaseException, sentence: str) -> Path:
    in_project = Path("dvc.yaml").exists()
    folder = Path("work").resolve() if in_project else Path(tempfile.gettempdir())
    folder.mkdir(exist_ok=True)
    path = folder / f"crash-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
    details = "".join(traceback.format_exception(error))
    lines = (
        f"command   {' '.join(sys.argv)}\nfolder    {Path.cwd()}\nsystem    {platform.platform()}\n"
        f"python    {sys.version.split()[0]} at {sys.executable}\ncode      {_OURS}\n"
    )
    with open(path, "x", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{sentence}\n\n{redacted(lines)}\n{redacted(details)}")
    return path
