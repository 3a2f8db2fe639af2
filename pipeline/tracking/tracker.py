"""MLflow: every stage a run, all runs of one pipeline run under one parent. Written from the driver process only.

Every event goes to a journal on local disk at once; a process beside those of the pipeline run (outbox.py) brings it to
MLflow. So an MLflow that is slow, away or broken costs the work no time, and no value is lost.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpar_core.files import digest_of, sha256_file
from pipeline.headline import Headline, read_headline
from pipeline.presets.use import preset_of
from pipeline.tracking import summary
from pipeline.tracking.journal import Journal
from pipeline.tracking.models import LoggedModel, models_of
from pipeline.tracking.outbox import SENT, at_work, journal_folder, launch, lock_file, said_file
from pipeline.tracking.store import HOST_TAG, PASS_TAG, PID_TAG, STARTED_TAG, store_root, tracking_uri
from pipeline.tracking.system import system_metrics
from stages.artifacts import FOLDER, OUTPUTS, REPORT_PAGE, SAMPLE_GRID, SAMPLES
from stages.terminal import note
from stages.tracker import LineProgress, Progress, rate_words

if TYPE_CHECKING:  # pydantic takes a while to import
    from stages.params import Params

CLOSE_SECONDS = 15.0  # that the end of a stage waits for the store
WATCH_SECONDS, LONGEST_WATCH_SECONDS = 30.0, 3600.0  # between looks whether the process that delivers is there


def pass_identity(root: Path) -> tuple[str, str, Any]:
    """Return (identity, name, process) of the pipeline run this process belongs to.

    Under `dvc repro` or `dvc exp run` that is the dvc process: all its stages find the same one. Each experiment of a
    queue is one of its own, and so is a stage run by hand.
    """
    import psutil

    process = psutil.Process()
    if "DVC_STAGE" in os.environ:  # which dvc sets for the commands of stages
        for ancestor in process.parents():
            with suppress(psutil.Error):
                if _is_dvc(ancestor.cmdline()):
                    process = ancestor
                    break
    started = process.create_time()
    name = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    copy = "" if store_root(root) == root.resolve() else f"-{root.resolve().name}"
    return f"{socket.gethostname()}-{process.pid}-{started:.2f}{copy}", name, process


def _is_dvc(words: list[str]) -> bool:
    """Return whether a command line is dvc's: `dvc ...`, `python .../dvc ...` or `python -m dvc ...`."""
    names = [Path(word).name.removesuffix(".exe") for word in words]
    if not names:
        return False
    if names[0] == "dvc":
        return True
    if not names[0].lower().startswith(("python", "pypy")):
        return False
    for index, word in enumerate(words[1:], 1):
        if word == "-m":
            return names[index + 1 : index + 2] == ["dvc"]
        if word in ("-W", "-X"):
            continue
        if not word.startswith("-") and words[index - 1] not in ("-W", "-X"):
            return names[index] == "dvc"
    return False


def process_tags(process: Any = None) -> dict[str, str]:
    """Return the tags by which a later process finds out that this one is gone."""
    import psutil

    process = process or psutil.Process()
    return {PID_TAG: str(process.pid), HOST_TAG: socket.gethostname(), STARTED_TAG: f"{process.create_time():.2f}"}


class Recording:
    """A journal that is being delivered. Runs have keys of our own, which name them before MLflow does."""

    def __init__(self, root: Path, name: str) -> None:
        identity, _, process = pass_identity(root)
        self.root, self.key = store_root(root), digest_of([identity, tracking_uri(root)])
        self._last = None if process.pid == os.getpid() else process
        self.name, self.bar = name, None
        self.journal = Journal(journal_folder(self.root), name)
        (self.journal.folder / SENT).touch()
        self._said = self.journal.folder / said_file(self.key)
        self._said.touch()
        launch(self.root, self.key, self._last)
        self._closed = threading.Event()
        self._words = open(self._said, encoding="utf-8")  # noqa: SIM115
        self._ends = 0  # of the process that delivers, before this journal was delivered
        self._listener = threading.Thread(target=self._listen, name="outbox", daemon=True)
        self._listener.start()

    def run(
        self,
        key: str,
        name: str,
        *,
        tags: Mapping[str, str],
        parent: str | None = None,
        once: bool = False,
        time_ms: int | None = None,
    ) -> str:
        """Open a run, or go on with it; return its key.

        once: leave it alone where it is finished already.
        time_ms: when it began, now when left out.
        """
        data = {"name": name, "tags": dict(tags), "parent": parent, "once": once}
        self.journal.write("run", key, data, time_ms=time_ms)
        return key

    def params(self, run: str, values: Mapping[str, object]) -> None:
        self.journal.write("params", run, {name: str(value) for name, value in values.items()})

    def tags(self, run: str, values: Mapping[str, object]) -> None:
        self.journal.write("tags", run, {name: str(value) for name, value in values.items()})

    def metrics(self, run: str, values: Mapping[str, float], step: int | None = None, *, time_ms: int | None = None) -> None:
        data = {"values": {name: float(value) for name, value in values.items()}, "step": step}
        self.journal.write("metrics", run, data, time_ms=time_ms)

    def artifact(self, run: str, path: Path) -> None:
        self.journal.write_file(run, path)

    def end(self, run: str, status: str, *, time_ms: int | None = None) -> None:
        self.journal.write("end", run, {"status": status}, time_ms=time_ms)

    def close(self) -> None:
        """Let the rest be delivered, for some seconds; what is left then is kept and named."""
        self._closed.set()
        self._listener.join()
        self.journal.close()
        until, before = time.monotonic() + CLOSE_SECONDS, self._ends
        while self._said.exists():
            if self._revive():
                until = time.monotonic() + CLOSE_SECONDS
            again = self._ends > before + 1
            if again or time.monotonic() > until:
                log = lock_file(self.root, self.key)
                later = "the next run, or `dpar-cli runs sync`"
                self._say(
                    f"the process that writes to MLflow ended again (details: {log}): records of {self.name} that MLflow "
                    f"does not have yet are kept in work/tracking and sent by {later}"
                    if again
                    else f"MLflow is slow: the last records of {self.name} reach it after this command has ended, at the "
                    f"latest by {later}"
                )
                break
            self._repeat()
            time.sleep(0.05)
        self._repeat()
        self._words.close()

    def _revive(self) -> bool:
        """Start the process that delivers anew where it is gone and this journal is not; return whether it was."""
        if at_work(self.root, self.key) or not self._said.exists():
            return False
        self._ends += 1
        if lock_file(self.root, self.key).exists():  # else it left in good order, just before this journal began
            self._say("the process that writes to MLflow ended too early: another one goes on with its work")
        launch(self.root, self.key, self._last)
        return True

    def _listen(self) -> None:
        pause = WATCH_SECONDS
        look = time.monotonic() + pause
        while not self._closed.wait(0.2):
            self._repeat()
            if time.monotonic() > look:
                pause = min(2 * pause, LONGEST_WATCH_SECONDS) if self._revive() else WATCH_SECONDS
                look = time.monotonic() + pause

    def _repeat(self) -> None:
        """Say what the process that delivers has to say."""
        for line in self._words:
            self._say(line.rstrip("\n"))

    def _say(self, sentence: str) -> None:
        if self.bar is not None:
            self.bar.console.print(sentence, markup=False, highlight=False)
        else:
            note(sentence)


@contextmanager
def recording(root: Path, name: str) -> Iterator[Recording]:
    """Open a recording; nothing that goes wrong while it closes hides what went wrong before."""
    one = Recording(root, name)
    try:
        yield one
    finally:
        failing = sys.exc_info()[1] is not None
        try:
            one.close()
        except OSError as error:
            if not failing:
                raise
            note(f"the last records of {name} are lost: {error}")


@contextmanager
def open_tracker(stage: str, params: Params, chosen: Any, *, root: Path) -> Iterator[MlflowTracker]:
    """Open the run of a stage under its parent run; it ends FINISHED, FAILED, or KILLED when stopped."""
    from stages.params import dotted, flattened, plain

    identity, name, process = pass_identity(root)
    with recording(root, stage) as records:
        preset = preset_of(root)
        name = f"{preset} · {name}"
        source = summary.source_tags(root, "dvc repro")
        tags = {PASS_TAG: identity, **process_tags(process), **source}
        parent = records.run(digest_of(identity), name, tags=tags)
        records.params(parent, flattened(params))
        tags = {"dpar.stage": stage, **process_tags(), **source}
        tracked = [name for name in OUTPUTS if name != "sources"]  # which looks on every run, and has nothing to track
        run = records.run(records.journal.folder.name, summary.child_name(stage, tracked), tags=tags, parent=parent)
        tracker = MlflowTracker(records, run, parent, stage, source)
        tracker.log_params(dotted(plain(chosen)))
        with tracker.ending():
            with system_metrics(lambda values, count: records.metrics(run, values, count)):
                yield tracker
            for model in models_of(stage, root):
                tracker.log_model(model)
            lock = root / "dvc.lock"
            if lock.exists():
                records.tags(parent, {"dpar.dvc_lock": sha256_file(lock)[:16]})
            if stage == "report" and (headline := read_headline(root)):
                _show_results(records, parent, preset, headline, root)


def _show_results(records: Recording, parent: str, preset: str, headline: Headline, root: Path) -> None:
    """Give a pipeline run its name, note, speeds and pictures once the report is there."""
    note = summary.note(preset, headline)
    records.tags(parent, {"mlflow.runName": summary.run_name(preset, headline), "mlflow.note.content": note})
    records.metrics(parent, summary.headline_metrics(headline))
    for path in (REPORT_PAGE.below(root / FOLDER), SAMPLES["dpar"].below(root / FOLDER) / SAMPLE_GRID):
        if path.exists():
            records.artifact(parent, path)


def status_of(error: BaseException | None) -> str:
    """Return how a run ends: FINISHED, FAILED, or KILLED where somebody stopped it."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


class MlflowTracker:
    """Implements stages.tracker.Tracker."""

    def __init__(self, records: Recording, run: str, parent: str, stage: str, source: Mapping[str, str]) -> None:
        """source: tags of who started it from what, which models that it records carry as well."""
        self.records, self.run, self.parent, self.stage, self.source = records, run, parent, stage, source
        self._last: dict[str, tuple[float, int | None, int]] = {}  # value, step, when in milliseconds since 1970
        self._curves: set[str] = set()  # metrics that have a value for each of several steps
        self._datasets: dict[str, str] = {}
        self._lock = threading.Lock()

    def log_params(self, params: Mapping[str, object]) -> None:
        self.records.params(self.run, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        with self._lock:
            self._curves |= set() if step is None else set(metrics)
            # MLflow takes a value without a step for one of step 0: the end of a curve would be drawn as its beginning.
            written = {name: value for name, value in metrics.items() if step is not None or name not in self._curves}
            self._last |= {name: (float(value), step, now) for name, value in written.items()}
        if written:
            self.records.metrics(self.run, written, step, time_ms=now)

    def log_input(self, name: str, path: Path, digest: str) -> None:
        self._datasets[name] = digest
        self.records.journal.write("input", self.run, {"name": name, "path": str(path), "digest": digest})

    def log_model(self, model: LoggedModel) -> None:
        """Record a model with what this stage measured of it, and the data that this was measured on."""
        data = next((name for name in ("reference", "tokens", "manifest") if name in self._datasets), None)
        dataset = None if data is None else [data, self._datasets[data]]
        metrics = [[name, *self._last[name]] for name in model.metrics_of(self._last)]
        content = {**vars(model), "tags": {**model.tags, **self.source}, "dataset": dataset, "metrics": metrics}
        self.records.journal.write("model", self.run, content)

    def log_picture(self, path: Path) -> None:
        self.records.artifact(self.run, path)

    def log_artifact(self, path: Path) -> None:
        self.records.artifact(self.run, path)

    @contextmanager
    def progress(self, total: int, description: str, *, done: int = 0, unit: str = "it") -> Iterator[Progress]:
        if not sys.stderr.isatty():
            yield LineProgress(total, description, done=done, unit=unit)
            return
        with _rich_bar() as bar:
            task = bar.add_task(description, total=total, completed=done, values="", unit=unit)
            self.records.bar = bar
            try:
                yield _RichProgress(bar, task)
            finally:
                self.records.bar = None

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End the run as the block ends, and give the parent what it shows of this stage."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # the disk is full: that is the error being raised
                self._end(status_of(error))
            raise
        self._end("FINISHED")

    def _end(self, status: str) -> None:
        if kept := summary.short_metrics(self.stage, {name: last[0] for name, last in self._last.items()}):
            self.records.metrics(self.parent, kept)
        if status != "FINISHED":
            self.records.tags(self.parent, {summary.WORST_TAG: status})
        self.records.end(self.run, status)
        # The parent has no end of its own: it is as far as its latest stage, and ended as its worst one did.
        self.records.end(self.parent, status)


def _rich_bar() -> Any:
    from rich import progress as rich

    class Rate(rich.ProgressColumn):
        def render(self, task: rich.Task) -> str:
            return "" if task.speed is None else rate_words(task.speed, task.fields["unit"])

    return rich.Progress(
        rich.TextColumn("{task.description}", style="bold", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        Rate(),
        rich.TextColumn("{task.fields[values]}"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )


class _RichProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def advance(self, amount: int = 1, **values: float) -> None:
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.update(self.task, advance=amount, values=shown)
