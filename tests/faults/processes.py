"""Stages in processes that start in milliseconds: forked from this one, in which everything is imported already.

What a stage starts itself (Ray Train's local mode, the outbox of MLflow) is forked as well instead of started anew. The
functions are the same that a new interpreter would call (stages/workers/child.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from tests.faults.injection import Injection, Watch, limit_files, watch
from tests.faults.shares import TRAINING
from tests.helpers.paths import ROOT

SUBREAPER = 36  # of prctl: orphans below this process become its children
IMPORTED = (
    "torch._dynamo",
    "pipeline.cli",
    "pipeline.tracking.outbox",
    "PIL.Image",
    "pyarrow.parquet",
    "safetensors.torch",
    "scipy.linalg",
    "stages.time_sampling",  # and time_training, whose seconds `hurry` shortens
)
ORPHAN_SECONDS = 90.0
PATIENCE = 120.0  # seconds until a stage counts as hanging


def import_everything(stages: Sequence[str], *, mlflow: bool = False) -> None:
    """Import what stages import, so that no process has to; no thread may be left behind. mlflow: MLflow as well."""
    import torch

    torch.set_num_threads(1)
    from pipeline.runner import load_stage

    for name in stages:
        load_stage(name)
    training = ["ray.train.v2.api.data_parallel_trainer"] if {*TRAINING} & {*stages} else []
    pictures = ["matplotlib.pyplot"] if "report" in stages else []
    for name in (*IMPORTED, *training, *pictures):
        import_module(name)
    if mlflow:
        from pipeline.tracking.store import quiet_environment

        quiet_environment()
        for name in ("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.data.meta_dataset", "alembic.command"):
            import_module(name)


def adopt_orphans() -> None:
    """Become the parent of whatever processes below this one outlive theirs."""
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    status: exit status, negative for a signal, None where it hung. counts: changes to files that it and what it started
    made. cpu: seconds.
    """

    status: int | None
    said: str
    seconds: float
    counts: dict[str, int]
    cpu: float = 0.0


def run_stage(
    stage: str,
    root: Path,
    injection: Injection | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    during: Callable[[psutil.Process], None] | None = None,
    patience: float = PATIENCE,
) -> Ended:
    """Run `dpar-cli stage` in the project at `root` and wait for its end.

    environment: variables besides those of this process. prepare: called in the new process first. during: called here once
    it runs, with the process.
    """
    counts = root / "counts"
    empty(counts)
    output, told = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        with leaving():
            os.close(output)
            os.dup2(told, 1)
            os.dup2(told, 2)
            os.environ.update(environment or {})
            _be_stage(stage, root, injection or Injection(), counts, prepare)
    os.close(told)
    said = b""
    if during is not None:
        during(psutil.Process(child))
    status, cpu = None, 0.0
    while time.monotonic() - began < patience:
        ready, _, _ = select.select([output], [], [], 0.02)
        if ready and (piece := os.read(output, 1 << 16)):
            said += piece
            continue
        found, code, used = os.wait4(child, os.WNOHANG)
        if found:
            status, cpu = os.waitstatus_to_exitcode(code), used.ru_utime + used.ru_stime
            break
        if ready:  # closed, and not ended yet
            time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.set_blocking(output, False)
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(output, 1 << 16):
            said += piece
    os.close(output)
    changes = {file.name: int(text) for file in counts.iterdir() if (text := file.read_text())}  # empty: not written yet
    return Ended(status, said.decode(errors="replace"), time.monotonic() - began, changes, cpu)


def run_dvc(stage: str, root: Path, during: Callable[[psutil.Process], None] | None = None) -> Ended:
    """Run `dvc repro` of one stage in real processes, and wait for all that it started."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    # A store that refuses connections: importing MLflow is all that remains of it.
    environment |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    words = [sys.executable, "-P", "-m", "dvc", "repro", "--single-item", stage]
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        if during is not None:
            during(psutil.Process(process.pid))
        status = process.wait()
        wait_for_orphans()
        log.seek(0)
        return Ended(status, log.read().decode(errors="replace"), time.monotonic() - began, {})


def empty(folder: Path) -> None:
    """Make a folder, or remove the files in it."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()


@contextlib.contextmanager
def leaving():
    """End this process with the block: it must not go on as a second copy of its parent."""
    status = 99
    try:
        yield
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _be_stage(stage: str, root: Path, injection: Injection, counts: Path, prepare: Callable[[], None] | None) -> None:
    from pipeline.boundary import guarded
    from pipeline.cli import start

    _own_streams()
    os.chdir(root)
    sys.argv[:] = ["dpar-cli", "stage", stage]
    subprocess.Popen = _popen(counts)  # type: ignore[misc]
    if prepare is not None:
        prepare()
    limit_files(injection, "stage")
    global _watch
    _watch = watch(root, injection)
    try:
        guarded(start)
    finally:
        note(counts)


_watch: Watch | None = None


def note(counts: Path) -> None:
    """Write down how many changes this process made."""
    if _watch is not None:
        name, number = _watch.where, _watch.count
        _watch.injection = Injection()
        (counts / name).write_text(str(number))


def _own_streams() -> None:
    sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True, errors="backslashreplace")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def forget_files() -> None:
    """Let go of files and pipes, and of the locks on them, that this process would not have if it were started anew."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of the list itself, which is closed by now
            kind = os.fstat(int(name)).st_mode
            if int(name) > 2 and (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
                os.dup2(
                    nothing, int(name)
                )  # not closed: objects that think it theirs would close what comes to have its number


class Forked:
    """What subprocess.Popen is for our own modules: a fork that calls the module's `main`."""

    def __init__(self, module: str, arguments: Sequence[str], counts: Path, **how: Any) -> None:
        self.returncode: int | None = None
        reading, writing = os.pipe()
        output, told = os.pipe() if how.get("stdout") == subprocess.PIPE else (None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            with leaving():
                os.setpgid(0, 0)  # as Ctrl-C sees it, what a new session is; and it has its share of a busy machine
                os.dup2(reading, 0)
                os.dup2(os.open(os.devnull, os.O_WRONLY) if told is None else told, 1)
                if (log := how.get("stderr")) is not None:
                    os.dup2(log.fileno(), 2)
                forget_files()
                os.environ.update(how.get("env") or {})
                self._be(module, arguments, counts)
        os.close(reading)
        self.stdin: Any = os.fdopen(writing, "w" if how.get("text") else "wb")
        self.stdout: Any = None
        if told is not None:
            os.close(told)
            self.stdout = os.fdopen(output)

    def _be(self, module: str, arguments: Sequence[str], counts: Path) -> None:
        from stages.workers import child

        _own_streams()
        sys.stdin = os.fdopen(0)
        global _watch
        assert _watch is not None
        _watch.where, _watch.count = ("child" if module.endswith("local") else "outbox"), 0
        limit_files(_watch.injection, _watch.where)
        sys.argv[:] = [child.__file__, "\n".join(sys.path), module, *arguments]
        try:
            if module.endswith("outbox") and os.environ.get("FAULTS_MLFLOW") != "1":
                sys.exit(3)  # an MLflow that takes nothing: the journal is kept
            child.main()
        finally:
            note(counts)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                found, code = os.waitpid(self.pid, os.WNOHANG)
                if found:
                    self.returncode = os.waitstatus_to_exitcode(code)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _popen(counts: Path) -> Callable[..., Any]:
    from stages.workers import child

    real = subprocess.Popen

    class Popen(real):  # a class, as others derive from it
        def __new__(cls, words: Any, *arguments: Any, **how: Any) -> Any:
            if isinstance(words, list) and child.__file__ in words:
                _, module, *rest = words[words.index(child.__file__) + 1 :]
                if module.endswith((".local", ".outbox")):
                    return Forked(module, rest, counts, **how)
            return super().__new__(cls)

    return Popen


KEPT: set[int] = set()  # processes that stay on purpose, with all below them


def orphans() -> list[psutil.Process]:
    """Return what runs below this process, after collecting what ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    kept = {*KEPT}
    for pid in KEPT:
        with contextlib.suppress(psutil.NoSuchProcess):
            kept |= {one.pid for one in psutil.Process(pid).children(recursive=True)}
    found = psutil.Process().children(recursive=True)
    return [one for one in found if one.pid not in kept and one.status() != psutil.STATUS_ZOMBIE]


def wait_for_orphans(seconds: float = ORPHAN_SECONDS) -> list[str]:
    """Wait until nothing runs below this process any more; return the names of what still does after `seconds`.

    A real outbox may take a minute more: it has MLflow to import first.
    """
    until = time.monotonic() + seconds
    while left := orphans():
        late = time.monotonic() - until
        names = [f"{one.pid} {' '.join(words_of(one))}" for one in left]
        if late > 60 or (late > 0 and not all("pipeline.tracking.outbox" in name for name in names)):
            return names
        time.sleep(0.02)
    return []


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
