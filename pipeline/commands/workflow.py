"""`dpar-cli run`, `status` and `doctor`: bringing the workflow up to date, and what stands in the way of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from pipeline.boundary import INTERRUPTED, TERMINATED, Terminated
from pipeline.project import project_folder
from stages.tracker import PROGRESS_SECONDS

if TYPE_CHECKING:
    from pipeline.state import StageState

# What DVC prints around the stages' own words.
_CHATTER = re.compile(
    r"> |Running stage '|Stage '.*(didn't change, skipping|is cached)|(Generating|Updating) lock file|To track the changes|"
    r"\s*git add |To enable auto staging|\s*dvc config core.autostage|Use `dvc push`|Data and pipelines are up to date|"
    r"Verifying data sources|'.*\.dvc' didn't change"
)
# On standard error, after a run that was killed; DVC sorts its locks out by itself.
_LOCK_CHATTER = re.compile(r"WARNING: Process '.*' with \(Pid \d+\), in RWLock-file '.*' had been killed")
_RUNNING = re.compile(r"Running stage '(?:dvc\.yaml:)?([^']+)'")
_CACHED = re.compile(r"Stage '(?:dvc\.yaml:)?([^']+)' is cached")
_PROGRESS = re.compile(r"(?P<what>.*?) (?P<count>\d+/\d+ .*) ETA (?P<left>\d+:\d\d:\d\d)(?P<values>.*)")
# Seconds of each stage on two AVX2 cores, for stages that have not run on this machine yet.
EXPECTED: dict[str, dict[str, float]] = {
    "demo": {
        "data": 9,
        "tokenizer": 118,
        "features": 13,
        "tokenize_images": 12,
        "entropy_model": 37,
        "entropies": 14,
        "patch_maps": 5,
        "train_dpar": 143,
        "train_llamagen": 179,
        "time_training": 40,
        "time_sampling": 27,
        "sample_dpar": 22,
        "sample_llamagen": 30,
        "score_dpar": 6,
        "score_llamagen": 9,
        "report": 10,
    },
}
EXPECTED["smoke"] = dict.fromkeys(EXPECTED["demo"], 5.4)  # of which only the whole was measured: 150 s with all starts
SIZES = ("data.image_size", "tokenizer.base_width", "model.width")  # params that are alike here take as long per step
STEPS = {
    "tokenizer": "tokenizer.steps",
    "entropy_model": "entropy_model.train.steps",
    "train_dpar": "train.steps",
    "train_llamagen": "train.steps",
}
STARTING = 4.0  # seconds until a stage has imported what it needs and begins, which its own clock does not count
LOOK = "sources"  # the stage that runs every time, for a second: nothing to announce
LEAVING = 30.0  # seconds that stages have to end after Ctrl-C


def run(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; all when left out.")] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Run stages that are up to date as well, and all that they need.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what DVC prints, too.")] = False,
) -> None:
    """Bring the whole workflow up to date.

    Checks the machine and every path in params.yaml, prints a plan, runs `dvc repro` on the stages named, and ends with
    the verdict. Writes artifacts/ and the MLflow store. An interrupted run continues when it is started again.

        dpar-cli run               # everything that is out of date
        dpar-cli run score_dpar    # one stage, and what it needs
    """
    from pipeline.doctor import examine, lines
    from pipeline.state import project_state, with_needs
    from stages.params import load_params
    from stages.terminal import wrapped

    root = project_folder()
    load_params(root / "params.yaml")
    states = with_needs(project_state(root), targets or [])
    checks = examine(root)
    problems = [check for check in checks if check.verdict != "ok"]
    if problems:
        print("\n".join(lines(checks, only_problems=True)))
    if any(check.verdict == "fail" for check in checks):
        raise ValueError("nothing was started: fix what is marked FAIL above, then run the same command again")
    if not problems:
        print(wrapped(f"checks passed ({len(checks)}; `dpar-cli doctor` lists them)"))
    plan = RunPlan(root, [state for state in states if state.name != LOOK], force=force)
    print(plan.words(), flush=True)
    if not force:
        _fill_cache(root, [state.name for state in states if state.uncached and state.name != LOOK])
    command = [sys.executable, "-P", "-m", "dvc", "repro", *(["--force"] if force else []), *(targets or [])]
    code = _follow(command, Narrator(plan, Screen(sys.stdout)), verbose=verbose)
    if code:
        raise SystemExit(code)
    print(_verdict(root, [state.name for state in project_state(root) if state.state != "fresh"]))


def _fill_cache(root: Path, names: list[str]) -> None:
    """Put outputs into DVC's cache that are here and not there: DVC would remove them and run their stages again."""
    from pipeline.dvc_cache import put_back
    from stages.terminal import wrapped

    if names:
        stages = "a stage" if len(names) == 1 else f"{len(names)} stages"
        print(wrapped(f"DVC's cache lacks outputs of {stages}: they are put back, so that nothing runs again"), flush=True)
        for name in put_back(root, names):
            print(wrapped(f"{name}: its outputs are not those that DVC recorded, so it runs again"), flush=True)


@dataclass
class RunPlan:
    """What a run is expected to do: the stages in order, and how long each takes by its last run here or by EXPECTED."""

    root: Path
    states: list[StageState]
    force: bool = False
    _seconds: dict[str, float | None] = field(init=False)

    def __post_init__(self) -> None:
        expected = expected_seconds(self.root)
        self._here = {one.name: one.seconds for one in self.states if one.seconds is not None and not one.changes}
        best = {one.name: self._here.get(one.name, expected.get(one.name, one.seconds)) for one in self.states}
        self._seconds = {name: None if seconds is None else seconds + STARTING for name, seconds in best.items()}

    @property
    def due(self) -> list[str]:
        """The stages that are not up to date."""
        return [state.name for state in self.states if self.force or state.state != "fresh"]

    def left(self, names: list[str]) -> float | None:
        """Return the seconds that stages are expected to take, None when nothing is known of one of them."""
        known = [self._seconds[name] for name in names if name in self._seconds]
        return None if None in known else sum(seconds for seconds in known if seconds is not None)

    def words(self) -> str:
        """The plan as a sentence, wrapped for the terminal."""
        from dpar_core.data.splits import counted
        from pipeline.state import all_fresh
        from stages.terminal import about, wrapped

        due, count = self.due, len(self.states)
        if not due:
            return wrapped(f"{counted(count, 'stage')}, {all_fresh(self.root)}")
        fresh = count - len(due)
        known = "" if not fresh else f"; {fresh} {'is' if fresh == 1 else 'are'} up to date"
        return wrapped(f"{counted(count, 'stage')}, {self._time(due, about)}{self._disk()}{known}")

    def _time(self, due: list[str], about: Callable[[float], str]) -> str:
        seconds = self.left(due)
        if seconds is not None:
            here = all(name in self._here for name in due)
            return f"about {about(seconds)} {'on this machine' if here else 'on two cores'}"
        from dpar_core.data.splits import counted

        unknown = [name for name in due if self._seconds[name] is None]
        if len(unknown) == len(due):
            return "of unknown duration at first"
        known = sum(self._seconds[name] or 0.0 for name in due)
        verb = "has" if len(unknown) == 1 else "have"
        return f"{about(known)} and the time of {counted(len(unknown), 'stage')} that {verb} not run here yet"

    def _disk(self) -> str:
        from pipeline.presets.use import preset_of
        from stages.terminal import size

        if total := sum(state.size for state in self.states):
            return f", {size(total)} of artifacts"
        return ", 0.5 GB with DVC's copy" if preset_of(self.root) == "demo" else ""


def expected_seconds(root: Path) -> dict[str, float]:
    """Return what each stage takes by the preset that params.yaml has the SIZES of; nothing when it is none in EXPECTED."""
    from pipeline.state import lookup, read_yaml

    if not (root / "params.yaml").exists():
        return {}
    own = read_yaml(root / "params.yaml")
    for preset, expected in EXPECTED.items():
        file = root / "params" / f"{preset}.yaml"
        like = read_yaml(file) if file.exists() else {}
        if all(lookup(own, size) == lookup(like, size) for size in SIZES):
            steps = {stage: lookup(own, key) / lookup(like, key) for stage, key in STEPS.items()}
            return {stage: seconds * steps.get(stage, 1) for stage, seconds in expected.items()}
    return {}


class Screen:
    """Where a run is shown: line by line; on a terminal a line of progress stands until the next line takes its place."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.live = stream, stream.isatty() and os.environ.get("TERM") != "dumb"
        self._open = False

    def line(self, text: str) -> None:
        """Show a line that stays."""
        print(f"{self._cleared()}{text}", file=self.stream, flush=True)

    def progress(self, text: str) -> None:
        """Show a line of progress."""
        if not self.live:
            self.line(text)
            return
        self.stream.write(f"{self._cleared()}{text}")
        self.stream.flush()
        self._open = True

    def aside(self, text: str) -> None:
        """Show a line on standard error."""
        from stages.terminal import note

        self.stream.write(self._cleared())
        self.stream.flush()
        note(text)

    def _cleared(self) -> str:
        before, self._open = "\r\033[K" if self._open else "", False
        return before


class Narrator:
    """Turns the lines that come out of `dvc repro` into a line when a stage begins and one when it ends."""

    def __init__(self, plan: RunPlan, screen: Screen, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan, self.screen, self.clock = plan, screen, clock
        self.waiting = list(plan.due)
        self.total, self.begun, self.ended = len(self.waiting), 0, 0
        self.stage, self.since = "", 0.0
        self.spent = self.planned = 0.0  # seconds of the stages that ran, and what they were expected to take

    def line(self, text: str) -> None:
        """Take one line of standard output."""
        if found := _RUNNING.match(text):
            self.finish()
            if found[1] != LOOK:
                self.begin(found[1])
        elif found := _CACHED.match(text):
            self.finish()
            self.begin(found[1])
            self.finish(note="from the cache")
        elif text.strip() and not _CHATTER.match(text):
            self._show(text)

    def progress(self, text: str) -> bool:
        """Take one line of standard error; whether it was one of progress."""
        from stages.terminal import columns, shortened

        found = _PROGRESS.fullmatch(text)
        if found is None:
            return False
        hours, minutes, seconds = map(int, found["left"].split(":"))
        left = self._left(3600 * hours + 60 * minutes + seconds)
        whole = "" if left is None else f", {left} in all"
        words = f"    {found['what']} {found['count']}, {found['left'].removeprefix('0:')} left"
        room = columns() - 1
        self.screen.progress(words + whole if len(words + whole) <= room else shortened(words, room))
        return True

    def _show(self, text: str) -> None:
        from stages.terminal import columns, wrapped

        self.screen.line(text if len(text) <= columns() else wrapped(text, rest="    "))

    def _left(self, of_this: float) -> str | None:
        """Return how long everything takes from now on, by how fast the stages before were; None when it is unknown."""
        from stages.terminal import about

        later = self.plan.left(self.waiting)
        pace = self.spent / self.planned if self.planned > 10 else 1.0
        return None if later is None else about(of_this + pace * later)

    def begin(self, stage: str) -> None:
        """Print that a stage begins, and how long everything takes from here, where that is known."""
        from stages.terminal import colour

        self.waiting = [name for name in self.waiting if name != stage]
        self.begun += 1
        self.total = max(self.total, self.begun + len(self.waiting))
        self.stage, self.since = stage, self.clock()
        pace = self.spent / self.planned if self.planned > 10 else 1.0
        own = self.plan.left([stage])
        left = None if own is None else self._left(pace * own)
        rest = "" if left is None else f"  (about {left} left in all)"
        self.screen.line(f"{colour(f'[{self.begun}/{self.total}] {stage}', 'bold')}{rest}")

    def finish(self, *, note: str = "") -> None:
        """Say what the stage that ran found out, and how long it took."""
        from pipeline.results import result_line
        from stages.terminal import duration, wrapped

        if not self.stage:
            return
        seconds, planned = self.clock() - self.since, self.plan.left([self.stage])
        if planned and not note:
            self.spent, self.planned = self.spent + seconds, self.planned + planned
        result = result_line(self.stage, self.plan.root) or "done"
        self.screen.line(wrapped(f"{result} ({note or duration(seconds)})", first="    ", rest="    "))
        self.stage, self.ended = "", self.ended + 1

    def stopped(self, how: str) -> str:
        """Return where a run stands that ended early, and how to continue."""
        from stages.terminal import wrapped

        where = f" in stage {self.stage}" if self.stage else ""
        return wrapped(
            f"{how}{where}: {self.ended} of {self.total} stages are done, and nothing of them is lost. "
            "`dpar-cli run` continues from here."
        )


def _follow(command: list[str], narrator: Narrator, *, verbose: bool) -> int:
    """Run DVC and let the narrator take its lines; return the exit status for the shell.

    Ctrl-C reaches DVC and the stage as well: they are waited for, so that what they have is safe.
    """
    from stages.terminal import columns

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": str(columns()),
        **({PROGRESS_SECONDS: "1"} if narrator.screen.live else {}),
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, errors="replace") as process:
        assert process.stdout is not None
        beside = threading.Thread(target=_pass_on, args=(process.stderr, narrator), daemon=True)
        beside.start()
        try:
            for line in process.stdout:
                narrator.line(line.rstrip("\n"))
                if verbose and _CHATTER.match(line):
                    narrator.screen.line(line.rstrip("\n"))
            code = process.wait()
            beside.join()
        except KeyboardInterrupt as stopped:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if isinstance(stopped, Terminated):  # SIGTERM reached us alone, and DVC would leave its stage running
                _terminate(process.pid)
            try:
                process.wait(LEAVING)
            except subprocess.TimeoutExpired:
                process.terminate()
            narrator.screen.aside(f"\n{narrator.stopped('stopped')}")
            return TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
    if code:
        narrator.screen.aside(narrator.stopped("failed"))
        return 1
    narrator.finish()
    return 0


def _pass_on(stream: TextIO, narrator: Narrator) -> None:
    """Show lines of progress among the others, and pass on to standard error whatever else a process says there."""
    with suppress(ValueError):  # the stream is closed where a run is stopped
        for line in stream:
            if not narrator.progress(line.rstrip("\n")) and not _LOCK_CHATTER.match(line):
                narrator.screen.aside(line.rstrip("\n"))


def _terminate(process: int) -> None:
    """Send SIGTERM to a process and all that it started."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for child in (*psutil.Process(process).children(recursive=True), psutil.Process(process)):
            with suppress(psutil.NoSuchProcess):
                child.terminate()


def _verdict(root: Path, due: list[str]) -> str:
    """Return what a finished run has to show. due: stages that are out of date, as only a part was asked for."""
    from dpar_core.data.splits import counted
    from pipeline.headline import read_headline, speeds
    from stages.artifacts import REPORT_PAGE
    from stages.terminal import colour, wrapped

    report, lines = root / REPORT_PAGE.path, [""]
    try:
        if "report" not in due and (found := read_headline(root)) is not None:
            lines += [wrapped(found["badge"]), colour(wrapped(found["headline"]), "bold")]
            lines += [wrapped(f"{one['title']}: {one['sentence']}", first="  ", rest="    ") for one in found["verdicts"]]
            saved = 100 * found["flops_saved"]
            lines.append(
                f"  {found['patches_per_image']:.1f} patches per {found['tokens']} tokens, {saved:.0f} % of the FLOPs saved"
            )
            for name, speed in speeds(found).items():
                words = speed["doubt"] or f"{speed['ratio']:.2f} times the baseline's"
                lines.append(wrapped(f"speed of {name}: {words}", first="  ", rest="    "))
            lines.append("")
    except (KeyError, TypeError):
        pass  # written by another version
    if due:
        lines.append(wrapped(f"{counted(len(due), 'stage')} still to run: dpar-cli run"))
    if "report" not in due and report.exists():
        lines.append(f"report          {report.resolve().as_uri()}")
    lines += ["numbers         dpar-cli status", "compare runs    dpar-cli ui"]
    return "\n".join([*lines, "your own image  dpar-cli patches IMAGE --out overlay.png"])


def status(
    graph: Annotated[bool, typer.Option("--graph", help="Show what each stage reads, instead of results.")] = False,
) -> None:
    """Show every stage: whether and why it is out of date, when it ran, how long it took, its result.

    Reads dvc.yaml, dvc.lock, params.yaml and the metrics under artifacts/; hashes no outputs (`dvc status` does). To bring
    stages up to date: `dpar-cli run`.
    """
    from pipeline.code import code_identity
    from pipeline.state import project_state

    root = project_folder()
    states = project_state(root)
    if graph:
        print("\n".join(graph_lines(states)))
    else:
        print("\n".join(status_lines(states, root, now=time.time(), code=code_identity())))


def status_lines(states: list[StageState], root: Path, *, now: float, code: dict[str, str]) -> list[str]:
    """Return the table of `dpar-cli status` for the terminal's width. code: the code that is here (see code_identity)."""
    from pipeline.results import result_line
    from pipeline.state import all_fresh
    from stages.terminal import about, colour, columns, wrapped

    marks = {"fresh": ("ok ", "green"), "stale": ("old", "yellow"), "never run": ("-  ", "dim")}
    wide, other = columns() >= 64, 0
    found = [f"{'':3} {'stage':15} {'age':>6} {'took':>6}  result, or why it has to run"] if wide else []
    for state in states:
        mark, shade = marks[state.state]
        if state.state == "fresh" and state.code not in ("", code["source"]):
            mark, other = "ok*", other + 1
        age = "" if state.finished is None else about(max(now - state.finished, 0))
        took = "" if state.seconds is None else about(state.seconds)
        words = result_line(state.name, root) if state.state == "fresh" else state.why or "never run"
        before = f"{mark} {state.name:15} {age:>6} {took:>6}  " if wide else f"{mark} {f'{state.name} {age}'.strip()}: "
        lines = wrapped(words or "done", first=before, rest=" " * 36)
        found.append(colour(mark, shade) + lines[len(mark) :])
    due = sum(state.state != "fresh" for state in states)
    found += ["", wrapped(all_fresh(root)) if not due else f"{due} of {len(states)} to run: dpar-cli run"]
    if any(state.uncached for state in states):
        words = "DVC's cache lacks outputs that are here: `dvc repro` would make them again, `dpar-cli run` puts them back"
        found.append(wrapped(words))
    if other:
        words = f"* made by different code ({code['version']}, {code['source'][:8]}); `dvc repro -sf STAGE` repeats one"
        found.append(wrapped(words, rest="  "))
    return found


def graph_lines(states: list[StageState]) -> list[str]:
    """Return what each stage reads directly, 80 columns wide; what others imply is left out."""
    from stages.terminal import wrapped

    needs = {state.name: state.needs for state in states}

    def reaches(name: str, goal: str) -> bool:
        return any(need == goal or reaches(need, goal) for need in needs[name])

    found = []
    for name, direct in needs.items():
        own = [need for need in direct if not any(reaches(other, need) for other in direct if other != need)]
        found.append(wrapped(", ".join(own) or "(nothing)", first=f"{name:15} <- ", rest=" " * 19))
    return found


def metrics() -> None:
    """Print the dozen numbers of the last run, one per line, with their meaning.

    Reads artifacts/metrics.json; a speed is absent where the machine was busy while it was measured. Other versions
    beside it: `dvc metrics diff`. Earlier runs: `dpar-cli runs`.
    """
    from pipeline.results import metrics_table

    print(metrics_table(project_folder()))


def doctor() -> None:
    """Check this machine and this project: everything that a run depends on, with a way out for what is wrong.

    Looks at Python, packages, git, CPU, GPU, precision, memory, disk, Ray, the MLflow store, params.yaml and every path
    in it. Changes nothing. Exit 1 when something stands in the way of a run. Next: `dpar-cli run`.
    """
    from pipeline.doctor import examine, lines
    from stages.terminal import wrapped

    checks = examine(project_folder())
    print("\n".join(lines(checks)))
    failed = sum(check.verdict == "fail" for check in checks)
    warned = sum(check.verdict == "warn" for check in checks)
    words = f"{len(checks)} checks, {failed} in the way of a run, {warned} {'warning' if warned == 1 else 'warnings'}"
    print(f"\n{wrapped(words)}")
    if failed:
        raise SystemExit(1)
