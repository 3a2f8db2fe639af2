"""Runs one stage of dvc.yaml: params checked, inputs there, one run at a time, results tracked."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpar_core.data.fingerprint import signature
from dpar_core.data.splits import first_few
from dpar_core.files import digest_of, read_record, write_record
from dpar_core.system import cpus
from pipeline.code import code_identity, commit_of, packages_used
from pipeline.idle import idle_values
from pipeline.state import LAST, LastRun, write_last
from pipeline.tracking.outbox import lives
from pipeline.tracking.tracker import open_tracker, pass_identity
from stages import artifacts
from stages.artifacts import artifact_digest, maker_of
from stages.params import Compute, Section, dotted, load_params, plain, precision_lines, section_of, select, settled
from stages.shared.pace import machine_words
from stages.terminal import nearest, note, print_fitted
from stages.workers.lock import locked
from stages.workers.tasks import remove_leftovers

READING = "reading.json"  # in a work folder while its stage is at work: which files it reads
_WATCH_SECONDS = 1.0  # between looks whether DVC is still there


@dataclass(frozen=True)
class StageSpec:
    """Where a stage's code is, and which file stands for each field of its Inputs and Outputs.

    kind: what stands before the names of these two classes, where a module has several.
    """

    module: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    run: str
    kind: str


def _stage(name: str, module: str, run: str = "run", *, kind: str = "") -> StageSpec:
    inputs = {field: one.path for field, one in artifacts.INPUTS[name].items()}
    outputs = {field: one.path for field, one in artifacts.OUTPUTS[name].items()}
    return StageSpec(module, inputs, outputs, run, kind)


STAGES: dict[str, StageSpec] = {
    "sources": _stage("sources", "stages.sources"),
    "data": _stage("data", "stages.data"),
    "tokenizer": _stage("tokenizer", "stages.tokenizer"),
    "features": _stage("features", "stages.features"),
    "tokenize_images": _stage("tokenize_images", "stages.tokenize_images"),
    "entropy_model": _stage("entropy_model", "stages.entropy_model"),
    "entropies": _stage("entropies", "stages.entropies"),
    "patch_maps": _stage("patch_maps", "stages.patch_maps"),
    "train_dpar": _stage("train_dpar", "stages.train", "run_dpar", kind="DPAR"),
    "train_llamagen": _stage("train_llamagen", "stages.train", "run_llamagen", kind="LlamaGen"),
    "time_training": _stage("time_training", "stages.time_training"),
    "time_sampling": _stage("time_sampling", "stages.time_sampling"),
    "sample_dpar": _stage("sample_dpar", "stages.sample", "run_dpar", kind="DPAR"),
    "sample_llamagen": _stage("sample_llamagen", "stages.sample", "run_llamagen", kind="LlamaGen"),
    "score_dpar": _stage("score_dpar", "stages.score", "run_dpar"),
    "score_llamagen": _stage("score_llamagen", "stages.score", "run_llamagen", kind="Baseline"),
    "report": _stage("report", "pipeline.report.page"),
}


class StageError(ValueError):
    """A stage cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedStage:
    """A stage with its code imported."""

    spec: StageSpec
    run: Any
    params: type
    inputs: type
    outputs: type
    identity: Callable[[Any], dict[str, Any]]  # what of its params decides its outputs, as plain data

    def bind(self, root: Path) -> tuple[Any, Any]:
        """Return its Inputs and Outputs with paths below `root`."""
        inputs = self.inputs(**{name: root / path for name, path in self.spec.inputs.items()})
        return inputs, self.outputs(**{name: root / path for name, path in self.spec.outputs.items()})


def load_stage(name: str) -> LoadedStage:
    """Import a stage. Raises StageError for an unknown name."""
    if name not in STAGES:
        raise StageError(f"there is no stage {name!r}: {nearest(name, list(STAGES), 'dpar-cli status')}")
    spec = STAGES[name]
    module = importlib.import_module(spec.module)
    names = (spec.run, "Params", f"{spec.kind}Inputs", f"{spec.kind}Outputs")
    run, params, inputs, outputs = (getattr(module, name) for name in names)
    return LoadedStage(spec, run, params, inputs, outputs, getattr(module, "identity", plain))


def run_stage(name: str, *, root: Path, params_file: Path) -> None:
    """Run a stage as dvc does. Raises ParamsError, StageError, or what the stage says is wrong."""

    def wait(holder: str) -> None:
        note(f"stage {name} is running already in process {holder}; waiting for it")

    asked = load_params(params_file)
    stage = load_stage(name)
    if name == "sources":  # a look on every run: no network, no tracking, nothing that takes time to import
        inputs, outputs = stage.bind(root)
        work = root / "work" / name
        with locked(work / ".lock", busy=wait):
            remove_leftovers(work, *vars(outputs).values())
            stage.run(select(asked, stage.params), inputs, outputs, None, device="cpu", work=work)
        return
    device = device_of(asked.compute)
    params = settled(asked, device)
    chosen: Any = select(params, stage.params)
    inputs, outputs = stage.bind(root)
    # One work folder for one set of params and inputs: a rerun after a crash continues, changed params start afresh.
    seen = _signatures(inputs)
    decides, read = stage.identity(chosen), _digests(name, inputs, root)
    made_by = {"stage": name, "params": decides, "inputs": read}
    work = root / "work" / name / digest_of(made_by)
    set_threads(params.compute)
    machine = machine_words(device)  # before the stage, which may set threads of its own
    if name != "report":
        _print_precisions(select(asked, stage.params), device)
        sections = {section.partition(".")[0] for section in params_of(stage)}
        for one in idle_values(asked, root):
            if one.section in sections:
                print_fitted(one.found)

    _end_with_dvc(root)
    with locked(work.parent / ".lock", busy=wait):
        _begin(name, work, seen)
        for field in dataclasses.fields(outputs):
            home = getattr(outputs, field.name).parent
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=home):  # now, not when days of work are to be put there
                pass
        remove_leftovers(work, work.parent / LAST, *vars(outputs).values())
        started = time.time()
        try:
            with open_tracker(name, params, chosen, root=root) as tracker:
                stage.run(chosen, inputs, outputs, tracker, device=device, work=work)
                # DVC records what it finds after a stage, not what the stage began with.
                now = stage.identity(select(settled(load_params(params_file), device), stage.params))
                _refuse_edited(
                    name, dotted(decides), dotted(now), params_file.name, "; with the former values it takes seconds"
                )
                _refuse_edited(name, read, _digests(name, inputs, root), "what it reads")
        finally:
            if _are_as_before(name, inputs, root, seen, read):
                (work / READING).unlink(missing_ok=True)
            elif work.exists():  # what is there was made from the former or the present inputs, and nobody knows of which
                _set_aside(work, f"what stage {name} reads was replaced while it ran")
        ended = time.time()
        last = LastRun(ended, max(ended - started, 0.0), code_identity(), commit_of(root), packages_used(), machine)
        write_last(root, name, last)
        for old in work.parent.iterdir():
            if old.is_dir() and old != work:
                shutil.rmtree(old)


def _begin(name: str, work: Path, seen: Mapping[str, str]) -> None:
    """Make the work folder, without what a killed run left that may have read other inputs than those of its name.

    seen: signatures of the files that the stage reads. They stay in the folder until the stage has ended.
    """
    note_file = work / READING
    if note_file.exists():
        try:
            left = read_record(note_file, way_out="it is made again")
            # In a copy of the project all times of change are new; that the contents are the same is in the folder's name.
            same = left["files"] == seen or left["folder"] != work.stat().st_ino
        except (ValueError, KeyError):
            same = False  # cut off by what ended that run
        if not same:
            _set_aside(work, f"what stage {name} reads was replaced since a run of it was killed")
    work.mkdir(parents=True, exist_ok=True)
    write_record(note_file, {"files": dict(seen), "folder": work.stat().st_ino})


def _set_aside(work: Path, reason: str) -> None:
    """Rename a work folder, so that nothing is made from what it holds; the stage's next end removes it."""
    kept = next(path for number in itertools.count(1) if not (path := work.with_name(f"{work.name}-{number}")).exists())
    work.rename(kept)
    (kept / READING).unlink(missing_ok=True)
    note(f"{reason}: what is in {kept} is not used, and removed when the stage has ended")


def _signatures(inputs: Any) -> dict[str, str]:
    """Return size and times (`fingerprint.signature`) of every file that a stage reads of the project, by input and name.

    Without device and inode, whose numbers may be others after a restart of the machine: a long run goes on all the same.
    """
    found = {}
    for field in dataclasses.fields(inputs):
        path: Path = getattr(inputs, field.name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            with suppress(OSError):  # a missing input is named by `_digests`
                found[f"{field.name}/{file.relative_to(path)}"] = " ".join(signature(file.stat()).split()[2:])
    return found


def _are_as_before(name: str, inputs: Any, root: Path, seen: Mapping[str, str], read: Mapping[str, str]) -> bool:
    """Return whether what a stage reads is what it was when the stage began."""
    try:
        return _signatures(inputs) == seen or _digests(name, inputs, root) == read
    except (StageError, OSError, ValueError):
        return False


def _refuse_edited(name: str, before: Mapping[str, Any], now: Mapping[str, Any], what: str, way_out: str = "") -> None:
    """Raise StageError where params or inputs of a stage are not those that it began with."""
    edited = [f"{key} {before.get(key)} -> {now.get(key)}" for key in (*before, *now) if before.get(key) != now.get(key)]
    if edited:
        raise StageError(
            f"{what} changed while stage {name} ran ({first_few(dict.fromkeys(edited))}), so its result is not "
            f"recorded: run `dpar-cli run`{way_out}"
        )


def _end_with_dvc(root: Path) -> None:
    """Let this process stop, as on SIGTERM, once the `dvc repro` that started it, or the `dpar-cli run` above it, is gone.

    Nobody would take its result.
    """
    import psutil

    dvc = pass_identity(root)[2]
    if dvc.pid == os.getpid():
        return
    watched = {"dvc repro": dvc}
    with suppress(psutil.Error):  # of another user, or gone
        above = dvc.parent()
        if above is not None and any(Path(word).name == "dpar-cli" for word in above.cmdline()):
            watched["dpar-cli run"] = above

    def watch() -> None:
        while not (gone := [name for name, process in watched.items() if not lives(process)]):
            time.sleep(_WATCH_SECONDS)
        with suppress(OSError):  # nobody reads the pipe any more
            note(f"{gone[0]} (process {watched[gone[0]].pid}) is gone: its stage stops as well")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="dvc", daemon=True).start()


def _print_precisions(params: Any, device: str) -> None:
    """Print what `auto` means on this device, and a warning for bfloat16 that it emulates."""
    for field in dataclasses.fields(params):
        section = getattr(params, field.name)
        if isinstance(section, Section):
            for line in precision_lines(section_of(field), section, device):
                print_fitted(line)


def _digests(name: str, inputs: Any, root: Path) -> dict[str, str]:
    """Return the digest of each input of a stage. Raises StageError for one that is missing."""
    digests = {}
    for field in dataclasses.fields(inputs):
        path = getattr(inputs, field.name)
        if not path.exists():
            maker = maker_of(path, root)
            run = f"`dpar-cli run {maker}`" if maker else "`dpar-cli run`"
            raise StageError(f"stage {name} reads {path}, which is missing: run {run} first")
        digests[field.name] = artifact_digest(path)
    return digests


def device_of(compute: Compute) -> str:
    """Return "cpu" or "cuda" for compute.device. Raises StageError when there is none such here."""
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise StageError("compute.device is cuda, but no CUDA device is visible here: set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if compute.device == "auto" else compute.device


def set_threads(compute: Compute) -> None:
    """Give this process the CPU threads of compute.threads."""
    import torch

    torch.set_num_threads(compute.threads or cpus())


def params_of(stage: LoadedStage) -> list[str]:
    """Return the sections of params.yaml that a stage depends on, as dvc.yaml lists them."""
    return [section_of(field) for field in dataclasses.fields(stage.params)]
