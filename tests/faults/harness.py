"""One fault after the other: what each did, and whether all is as it should be afterwards.

After a fault and one rerun: the undisturbed bytes, nothing half-written under a final name at any time, no leftovers, no
process that goes on, a sentence about what happened, and no traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.faults.injection import SIGNALS
from tests.faults.nodes import LOST_SECONDS, Nodes
from tests.faults.plan import Fault
from tests.faults.processes import ORPHAN_SECONDS, Ended, leaving, run_dvc, run_stage, wait_for_orphans
from tests.faults.project import World, contents, hurry, timed, walk, whole_record

SENTENCE_NEEDED = (1, 70, 130, 143)


@dataclass
class Outcome:
    """What a fault did. effect: in one word; said: its last words; problems: what is not as it should be."""

    index: int
    kind: str
    stage: str
    what: str
    effect: str = ""
    said: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    whole: str = ""


class Harness:
    """Applies faults to copies of the undisturbed project in a folder."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self._nodes_there: Nodes | None = None

    def close(self) -> None:
        """End what was started for several faults."""
        if self._nodes_there is not None:
            self._nodes_there.close()

    def apply(self, fault: Fault) -> Outcome:
        """Let a fault happen, run the stage again, and look at everything."""
        began = time.monotonic()
        outcome = Outcome(fault.index, fault.kind, fault.stage, fault.what)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        apply: Callable[[Fault, Outcome], None] = getattr(self, f"_{fault.kind.replace(' ', '_')}", self._injected)
        apply(fault, outcome)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _injected(self, fault: Fault, outcome: Outcome) -> None:
        root = self.world.copy(self.folder, fault.stage)
        self._judge(fault, outcome, run_stage(fault.stage, root, fault.injection, prepare=hurry))
        self._again(fault, outcome)

    def _moment(self, fault: Fault, outcome: Outcome) -> None:
        root, how = self.world.copy(self.folder, fault.stage), fault.details
        moment = 0.15 + how["share"] * self.world.seconds[fault.stage]
        timers: list[threading.Timer] = []

        def during(process: psutil.Process) -> None:
            def send() -> None:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
                    target = process if how["whom"] == "stage" else process.children()[-1]
                    os.kill(target.pid, SIGNALS[how["signal"]])

            timers.append(threading.Timer(moment, send))
            timers[0].start()

        ended = run_stage(fault.stage, root, prepare=hurry, during=during)
        timers[0].cancel()
        timers[0].join()
        self._judge(fault, outcome, ended)
        self._again(fault, outcome)

    def _input(self, fault: Fault, outcome: Outcome) -> None:
        root = self.world.copy(self.folder, fault.stage)
        path = root / "artifacts" / fault.details["path"]
        before, times = path.read_bytes(), path.stat()
        harm(path, fault)
        ended = run_stage(fault.stage, root, prepare=hurry)
        self._judge(fault, outcome, ended, allowed=(0, 1))
        if ended.status == 1 and not any(name in ended.said for name in (path.name, path.parent.name)):
            outcome.problems.append(f"the sentence does not name {path.name}")
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        self._again(fault, outcome)

    def _output(self, fault: Fault, outcome: Outcome) -> None:
        root = self.world.copy(self.folder, fault.stage, outputs=True)
        harm(root / "artifacts" / fault.details["path"], fault)
        self._again(fault, outcome)

    def _work(self, fault: Fault, outcome: Outcome) -> None:
        root = self.world.copy(self.folder, fault.stage)
        self._judge(fault, outcome, run_stage(fault.stage, root, fault.injection, prepare=hurry))
        work = root / "work" / fault.stage
        files = sorted(path for path in walk(work) if not path.endswith("lock"))
        if not files:
            outcome.effect = "nothing was there yet"
        else:
            path = files[int(fault.chance * len(files))]
            outcome.what += f": {path}"
            harm(work / path, fault)
        self._again(fault, outcome)

    def _clock(self, fault: Fault, outcome: Outcome) -> None:
        root = self.world.copy(self.folder, fault.stage)
        self._judge(fault, outcome, run_stage(fault.stage, root, fault.injection, prepare=hurry), allowed=(0,))
        self._again(fault, outcome)

    def _mlflow(self, fault: Fault, outcome: Outcome) -> None:
        from tests.helpers import mlflow_stores

        root, how = self.world.copy(self.folder, fault.stage), fault.details["how"]
        environment = {"FAULTS_MLFLOW": "1"}
        with contextlib.ExitStack() as stack:
            if how == "closed port":
                environment["MLFLOW_TRACKING_URI"] = mlflow_stores.closed_port()
            elif how == "silent server":
                environment["MLFLOW_TRACKING_URI"] = stack.enter_context(mlflow_stores.silent_server())
            elif how == "failing server":
                environment["MLFLOW_TRACKING_URI"] = stack.enter_context(mlflow_stores.failing_server())
            else:
                (root / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(200))
            during = partial(_kill_child, fault.chance) if how == "killed outbox" else None
            ended = run_stage(fault.stage, root, environment=environment, prepare=_impatient, during=during)
        self._judge(fault, outcome, ended, allowed=(0,))
        if "MLflow" not in ended.said:
            outcome.problems.append("not a word about MLflow")
        if not list((root / "work" / "tracking").glob("*/events.jsonl")):
            outcome.problems.append("the journal that MLflow does not have is gone")
        self._again(fault, outcome)

    def _store(self, fault: Fault, outcome: Outcome) -> None:
        bucket = f"faulty://{self.folder}/bucket"
        section = "entropy_model" if fault.stage == "entropy_model" else "train"
        training = {"storage": bucket}
        if section == "entropy_model":
            from tests.faults.project import params

            training = {"train": params(self.world.root / "images")["entropy_model"]["train"] | training}
        root = self.world.copy(self.folder, fault.stage, **{section: training})
        (root / "bucket").mkdir()
        self._judge(fault, outcome, run_stage(fault.stage, root, prepare=partial(_faulty, fault.details)))
        self._again(fault, outcome, prepare=partial(_faulty, {}))

    def _ray(self, fault: Fault, outcome: Outcome) -> None:
        root = self.world.copy(self.folder, fault.stage, tokenize_images={"workers": 2})
        ended = run_stage(fault.stage, root, prepare=hurry, during=partial(_kill_of_ray, fault.details["whom"]))
        self._judge(fault, outcome, ended)
        self._again(fault, outcome)

    def _nodes(self, fault: Fault, outcome: Outcome) -> None:
        nodes = self._nodes_there = self._nodes_there or Nodes()
        root = self.world.copy(self.folder, fault.stage, tokenize_images={"workers": 2})
        how = {"environment": nodes.environment, "prepare": partial(_on_a_node, nodes)}
        ended = run_stage(fault.stage, root, during=partial(_strike, nodes, fault.details), patience=300, **how)
        self._judge(fault, outcome, ended)
        until = time.monotonic() + ORPHAN_SECONDS
        reached = ["head"] if fault.details["seconds"] is None else ["head", "node"]  # who is cut off hears of no end
        while (busy := [one for which in reached for one in nodes.at_work(which)]) and time.monotonic() < until:
            time.sleep(0.2)
        if busy:
            outcome.problems.append(f"still at work on the cluster: {', '.join(busy)}")
        nodes.whole(lost=fault.details["seconds"] is None)
        self._again(fault, outcome, **how)

    def _surroundings(self, fault: Fault, outcome: Outcome) -> None:
        how = fault.details
        there = Harness(self.world, self.folder / how["folder"])
        root = self.world.copy(there.folder, fault.stage)
        environment = {"TZ": how["zone"], "TMPDIR": str(self.folder), **_locale(how["locale"], self.world.root / "locales")}
        if how["home"] == "missing":
            environment["HOME"] = str(root / "params.yaml" / "below a file")
        ended = run_stage(fault.stage, root, environment=environment, prepare=partial(_elsewhere, how))
        there._judge(fault, outcome, ended, allowed=(0,))
        allowed = 0o777 & ~how["umask"]
        for path in _all(root / "artifacts"):
            mode = (root / "artifacts" / path).stat().st_mode & 0o777
            if mode & ~allowed and path in self.world.outputs(fault.stage):
                outcome.problems.append(f"{path} has rights {mode:03o} under umask {how['umask']:03o}")

    def _beside(self, fault: Fault, outcome: Outcome) -> None:
        if fault.details["how"].startswith("four"):
            return self._fresh_store(outcome)
        if fault.details["how"].startswith("the report"):
            return self._report_while_training(fault, outcome)
        root, both = self.world.copy(self.folder, fault.stage), []

        def second(_: psutil.Process) -> None:
            both.append(run_stage(fault.stage, root, prepare=hurry))

        both.append(run_stage(fault.stage, root, prepare=hurry, during=second))
        for ended in both:
            self._judge(fault, outcome, ended, allowed=(0,))
        if fault.stage != "sources" and not any("is running already in process" in one.said for one in both):
            outcome.problems.append("not a word about the wait")
        self._again(fault, outcome)

    def _report_while_training(self, fault: Fault, outcome: Outcome) -> None:
        self.world.copy(self.folder, "train_dpar")
        shutil.rmtree(self.folder / "artifacts")
        shutil.copytree(self.world.whole / "artifacts", self.folder / "artifacts")
        reports: list[Ended] = []

        def report(_: psutil.Process) -> None:
            time.sleep(fault.chance * self.world.seconds["train_dpar"])
            reports.append(run_stage("report", self.folder, prepare=hurry))

        ended = run_stage("train_dpar", self.folder, prepare=hurry, during=report)
        self._judge(replace(fault, stage="train_dpar"), outcome, ended, allowed=(0,))
        # Its page shows the seconds of training, of before or of now; a mixture of both is refused in a sentence.
        said = reports[0].said
        if reports[0].status not in (0, 1) or "Traceback (most recent call last)" in said:
            outcome.problems.append(f"the report ended with status {reports[0].status}: {said[-500:]}")

    def _fresh_store(self, outcome: Outcome) -> None:
        from pipeline.tracking.store import connect

        root = (
            self.folder / f"of fault {outcome.index}"
        )  # MLflow keeps connections by address, which forked processes inherit
        root.mkdir(parents=True)
        children = []
        for number in range(4):
            if not (child := os.fork()):
                with leaving():
                    _write_to_store(root, f"run {number}")
            children.append(child)
        status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        outcome.effect = "finished"
        if status != [0] * 4:
            outcome.problems.append(f"they ended with status {status}")
        client, experiment = connect(root)
        found = {run.info.run_name: run for run in client.search_runs([experiment])}
        for name in (f"run {number}" for number in range(4)):
            rows = client.get_metric_history(found[name].info.run_id, "loss") if name in found else []
            if [row.value for row in rows] != [0.0, 1.0, 2.0] or found[name].info.status != "FINISHED":
                outcome.problems.append(f"{name}: {rows}")

    def _dvc(self, fault: Fault, outcome: Outcome) -> None:
        root, how = self.world.copy(self.folder, fault.stage), fault.details
        (root / ".git").rmdir()
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n")
        others: list[Ended] = []

        def during(process: psutil.Process) -> None:
            lock = root / "work" / fault.stage / ".lock"
            while not lock.exists() and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
            time.sleep(how["share"] * self.world.seconds[fault.stage])
            signal_name, _, whom = how["how"].partition(" to ")
            if signal_name not in SIGNALS:
                others.append(run_dvc(fault.stage, root))
            elif whom == "all":
                os.killpg(process.pid, SIGNALS[signal_name])
            else:
                process.send_signal(SIGNALS[signal_name])

        ended = run_dvc(fault.stage, root, during)
        self._judge(fault, outcome, ended, allowed=(0, 1, 255, -15, -9))
        for other in others:
            self._judge(fault, outcome, other, allowed=(0, 1, 255))
        again = run_dvc(fault.stage, root)
        self._judge(fault, outcome, again, allowed=(0,))

    def _judge(self, fault: Fault, outcome: Outcome, ended: Ended, *, allowed: tuple[int, ...] = ()) -> None:
        """Look at a run that was disturbed."""
        lines = [line for line in ended.said.splitlines() if line.strip() and "DPAR_DEBUG=1 shows" not in line]
        outcome.whole = ended.said[-2000:]
        outcome.said = lines[-1][:300] if lines else ""
        outcome.effect = outcome.effect or {0: "finished", 1: "said why", 130: "stopped", 143: "stopped", -9: "killed"}.get(
            ended.status if ended.status is not None else 99, f"status {ended.status}"
        )
        if ended.status is None:
            outcome.problems.append("it hung")
        elif ended.status not in (allowed or (0, 1, 130, 143, -9)):
            outcome.problems.append(f"ended with status {ended.status}: {ended.said[-500:]}")
        if ended.status in SENTENCE_NEEDED and not lines:
            outcome.problems.append(f"ended with status {ended.status} without a word")
        self._look(fault, outcome, ended, "disturbed", complete=ended.status == 0)

    def _again(
        self,
        fault: Fault,
        outcome: Outcome,
        *,
        prepare: Callable[[], None] = hurry,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Run the stage once more, undisturbed, and look at everything."""
        ended = run_stage(fault.stage, self.folder, environment=environment, prepare=prepare)
        if ended.status != 0:
            outcome.problems.append(f"the rerun ended with status {ended.status}: {ended.said[-500:]}")
        self._look(fault, outcome, ended, "rerun", complete=True)
        outcome.effect = outcome.effect or "made again"
        for place in ("artifacts", "work"):
            left = [path for path in _all(self.folder / place) if path.endswith((".tmp", ".old"))]
            if left:
                outcome.problems.append(f"left behind in {place}: {', '.join(left[:3])}")

    def _look(self, fault: Fault, outcome: Outcome, ended: Ended, which: str, *, complete: bool) -> None:
        if "Traceback (most recent call last)" in ended.said:
            outcome.problems.append(f"{which}: a traceback: {ended.said[-1500:]}")
        if left := wait_for_orphans():
            outcome.problems.append(f"{which}: still running after {ORPHAN_SECONDS:g} s: {'; '.join(left)}")
        if (outside := self.folder / "connections").exists():
            outcome.problems.append(f"{which}: a connection beyond this machine: {outside.read_text()[:300]}")
        found = contents(self.folder / "artifacts")
        expected = self.world.outputs(fault.stage)
        for path in expected if complete else expected.keys() & found.keys():
            if path not in found:
                outcome.problems.append(f"{which}: {path} is missing")
            elif not (whole_record(found[path]) if timed(path) else found[path] == expected[path]):
                outcome.problems.append(f"{which}: {path} is not what it is undisturbed")
        strange = [path for path in found if path not in self.world.files and not _hidden(path)]
        if strange:
            outcome.problems.append(f"{which}: files nobody asked for: {', '.join(strange[:3])}")


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _all(folder: Path) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield os.path.relpath(os.path.join(where, name), folder)


def harm(path: Path, fault: Fault) -> None:
    """Damage a file as a fault says; its time stays where that was asked for."""
    times, content = path.stat(), bytearray(path.read_bytes())
    damage, dice = fault.details["damage"], random.Random(fault.chance)
    if damage == "removed":
        path.unlink()
        return
    if damage == "emptied" or not content:
        content = bytearray()
    elif damage == "cut short":
        del content[dice.randrange(len(content)) :]
    else:
        place = dice.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    if fault.details.get("keep_time"):
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _write_to_store(root: Path, name: str) -> None:
    """Write a run of three rows into the store of a project, which others make at the same time."""
    from pipeline.tracking.journal import Journal
    from pipeline.tracking.outbox import SENT, Outbox, journal_folder

    os.chdir(root)
    journal = Journal(journal_folder(root), name)
    journal.write("run", name, {"name": name, "tags": {}, "parent": None, "once": False})
    for step in range(3):
        journal.write("metrics", name, {"values": {"loss": float(step)}, "step": step})
    journal.write("end", name, {"status": "FINISHED"})
    (journal.folder / SENT).touch()
    Outbox(root, print).deliver(journal.folder)


def _locale(name: str, folder: Path) -> dict[str, str]:
    """Return the variables that choose a locale, which is made in a folder first where this system does not have it."""
    if name.startswith("C"):
        return {"LC_ALL": name}
    territory, _, charset = name.partition(".")
    if not (folder / name).exists():
        folder.mkdir(exist_ok=True)
        try:
            subprocess.run(
                ["localedef", "-i", territory, "-f", charset, str(folder / name)], capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"locale {name} cannot be made here, C.UTF-8 takes its place: {error}", flush=True)
            return {"LC_ALL": "C.UTF-8"}
    return {"LC_ALL": name, "LOCPATH": str(folder)}


def _elsewhere(how: dict[str, Any]) -> None:
    """Make this process one of another machine, as far as that goes."""
    import locale
    import tempfile

    from dpar_core import files

    hurry()
    time.tzset()
    tempfile.tempdir = None
    locale.setlocale(locale.LC_ALL, "")
    os.umask(how["umask"])
    files._UMASK = how["umask"]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: how["cores"]])


def _impatient() -> None:
    from pipeline.tracking import outbox, tracker

    hurry()
    tracker.CLOSE_SECONDS, outbox.PATIENCE, outbox.LEAVE_SECONDS = 6.0, 1.0, 8.0


def _faulty(details: dict[str, Any]) -> None:
    from tests.faults.store import Faulty, register

    hurry()
    register()
    if details:
        Faulty.error, Faulty.at, Faulty.lasting = details["error"], details["call"], details["lasting"]


def _strike(nodes: Nodes, how: dict[str, Any], process: psutil.Process) -> None:
    """Take the node away at a moment of its worker's life, and give it back while the stage runs if asked for."""
    until = time.monotonic() + 90
    while not nodes.at_work("node") and time.monotonic() < until and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    time.sleep(4 * how["share"])
    nodes.kill() if how["how"].startswith("kill") else nodes.cut()
    if how["seconds"] is not None:
        time.sleep(how["seconds"])
        nodes.whole(lost=how["seconds"] > LOST_SECONDS)


def _on_a_node(nodes: Nodes) -> None:
    hurry()
    nodes.enter()


def _kill_child(chance: float, process: psutil.Process) -> None:
    time.sleep(0.2 + chance)
    for child in process.children():
        child.send_signal(signal.SIGKILL)


def _kill_of_ray(whom: str, process: psutil.Process) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = " ".join(child.cmdline())
                if f"/{whom}" in words.split(" ")[0] or (whom in ("worker", "driver") and words.startswith("ray::Actor")):
                    (process if whom == "driver" else child).kill()
                    return
        if process.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)


def as_json(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome))
