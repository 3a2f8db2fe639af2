"""The edge of the program: above it there are no tracebacks.

What users can mend gets one sentence and exit 1; an error that nobody foresaw one sentence, a file with the details and
exit 70; Ctrl-C exit 130 and SIGTERM 143. DPAR_DEBUG=1 lets tracebacks through.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

UNEXPECTED, INTERRUPTED, TERMINATED, PIPE_CLOSED = 70, 130, 143, 141

# What readers raise on a file that is damaged or of another format, by name: nothing is imported to find out.
_DAMAGE = {
    "BadZipFile": "is not an intact zip file (as .npz and .pt are)",
    "SafetensorError": "is not an intact safetensors file",
    "JSONDecodeError": "is not intact JSON",
    "ReadError": "is not an intact tar file",
    "EOFError": "ends too early",
    "IncompleteRead": "ended in the middle of a transfer",
    "UnpicklingError": "is not an intact checkpoint",
    "UnicodeDecodeError": "is not text in UTF-8",
    "UnidentifiedImageError": "is not an image",
    "DecompressionBombError": "is an image of too many pixels",
    "ArrowInvalid": "is not an intact Parquet or Arrow file",
    "zlib.error": "holds damaged compressed data",
    "LZMAError": "holds damaged compressed data",
    "struct.error": "is cut short",
    "YAMLError": "is not valid YAML",
}


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of an address, as the first part of the path that it was taken for
_guarded = False  # whether `guarded` is around the present call


class Terminated(KeyboardInterrupt):
    """SIGTERM: everything ends as on Ctrl-C."""


class Carried(BaseException):
    """Carries the error of a command past typer, which ends in its own way on some errors."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def guarded(run: Callable[[], None]) -> None:
    """Run it, and end the process as the errors that come out of it ask for."""
    global _guarded
    before, _guarded = _guarded, True
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
            threading.excepthook = _in_a_thread
            from stages.crash import plain_warnings

            plain_warnings()
        run()
    except (Exception, KeyboardInterrupt, Carried) as caught:
        error = caught.error if isinstance(caught, Carried) else caught
        if os.environ.get("DPAR_DEBUG") == "1" and not isinstance(error, KeyboardInterrupt):
            raise error from None
        sentence, status = verdict(error)
        say(sentence, colour=status not in (INTERRUPTED, TERMINATED))
        raise SystemExit(status) from None
    finally:
        _guarded = before


def carry_errors(app: Any) -> None:
    """Let errors of all commands of a typer app come out as they are, of groups that do something by themselves as well."""
    for command in (*app.registered_commands, app.registered_callback):
        if command is not None and command.callback is not None and not hasattr(command.callback, "carries_errors"):
            command.callback = _carrying(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            carry_errors(group.typer_instance)


def _carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(**values: Any) -> Any:
        try:
            _refuse_odd_paths(values)
            _refuse_non_values(values)
            return function(**values)
        except (ValueError, OSError, RuntimeError, EOFError, KeyboardInterrupt) as error:
            if not _guarded:  # typer's own test runner calls commands without an edge around them
                raise
            if type(error).__module__.startswith(("typer", "click")):  # how they end a command on purpose
                raise
            raise Carried(error) from None

    call.carries_errors = True  # type: ignore[attr-defined]
    return call


def _refuse_odd_paths(values: Mapping[str, Any]) -> None:
    """Raise OSError for a path of the command line that is an address, a device, a pipe, a socket or a link to itself.

    What is written to an address would lie in a folder `s3:` here; reading pipes may never end; links to themselves end
    pathlib in an error of its own.
    """
    paths = [one for value in values.values() for one in (value if isinstance(value, list | tuple) else [value])]
    for path in paths:
        if isinstance(path, Path) and any(map(_SCHEME.fullmatch, path.parts)) and not os.path.exists(path):
            scheme = next(part for part in path.parts if _SCHEME.fullmatch(part))
            raise OSError(f"{scheme}//... is an address, expected a path of this machine")
        if isinstance(path, Path) and os.path.islink(path):
            try:
                os.stat(path)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise OSError(f"{path} is a link that leads to itself, expected a file or a folder") from None
        if isinstance(path, Path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError(f"{path} is a device, a pipe or a socket, expected a file or a folder")


def _refuse_non_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a number that is none (no limit of an option keeps nan out), and for bytes that are no text."""
    for name, value in values.items():
        if isinstance(value, str) and not value.isascii() and value != value.encode(errors="replace").decode():
            raise ValueError(f"--{name.replace('_', '-')} is {value!a}, expected text in UTF-8")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a finite number")


def verdict(error: BaseException) -> tuple[str, int]:
    """Return the sentence for an error that reached the edge, and the exit status."""
    from dpar_core.secrets import redacted

    stopped = _stopped_by(error)
    if stopped is not None:
        status = TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
        return "\nstopped; run the same command again to go on from here", status
    if isinstance(error, BrokenPipeError) and error.filename is None:
        # Whoever read our output has left, as `head` does.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return "", PIPE_CLOSED
    sentence = _known(error)
    if sentence is not None:
        return f"{redacted(sentence)}\n(DPAR_DEBUG=1 shows where this was raised)", 1
    from stages.crash import crash_sentence

    return crash_sentence(error, doing=redacted(" ".join(["dpar-cli", *sys.argv[1:]]))), UNEXPECTED


def _stopped_by(error: BaseException) -> KeyboardInterrupt | None:
    """Return the KeyboardInterrupt behind an error: libraries that are interrupted while they start raise others over it."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        if isinstance(one, KeyboardInterrupt):
            return one
        seen.add(id(one))
        one = one.__cause__ or one.__context__
    return None


def _known(error: BaseException) -> str | None:
    """Return the sentence of an error that somebody foresaw, None for any other."""
    from stages.crash import disk_sentence, file_at_work, ours

    text = str(error)
    names = {name for one in type(error).__mro__ for name in (one.__name__, f"{one.__module__}.{one.__name__}")}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        where = f" while at work on {file}" if (file := file_at_work(error)) else ""
        return f"memory ran out{where}: free some, or lower batch sizes and workers ({text or 'MemoryError'})"
    if (said := disk_sentence(error)) is not None:
        return said
    if isinstance(error, ValueError | OSError | RuntimeError) and ours(error) and not hasattr(error, "__notes__"):
        return text or None
    for name, meaning in _DAMAGE.items():
        if name in names and (file := file_at_work(error)) is not None:
            return f"{file} {meaning} ({text or name}): make it again, or fetch it again if it came from outside"
    if isinstance(error, OSError) and error.strerror:
        return text
    return None


def say(sentence: str, *, colour: bool = True) -> None:
    """Print a sentence to standard error, wrapped, and red on a terminal."""
    if not sentence:
        return
    from stages.terminal import colour as coloured
    from stages.terminal import fitted

    with contextlib.suppress(OSError):  # nobody is there to read it; the exit status says the rest
        text = fitted(sentence)
        print(coloured(text, "red", stream=sys.stderr) if colour else text, file=sys.stderr, flush=True)


def _terminate(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what ends now must not be stopped from ending
    raise Terminated


def _in_a_thread(hook: Any) -> None:
    """Print the sentence of an error that ended a thread."""
    if hook.exc_value is not None and not isinstance(hook.exc_value, SystemExit):
        say(verdict(hook.exc_value)[0])
