"""What is up to date: dvc.yaml and params.yaml held against dvc.lock, in a fraction of a second and without hashing outputs.

`dvc status` reads every byte; this compares what DVC recorded (params, commands, digests of what each stage read and
wrote) with what is there now (params, existence and sizes of outputs). A file edited without a change of its size is
what only `dvc status` finds, and files outside the project are what only stage sources looks at.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpar_core.files import write_json
from pipeline.dvc_cache import cache_folder, lacks
from stages.terminal import nearest

LAST = "last.json"  # work/STAGE/last.json: when a stage last ended here, and how long it took


@dataclass(frozen=True)
class LastRun:
    """A stage's last run on this machine, as the runner records it.

    finished: seconds since 1970.
    seconds: it took.
    code: `version` and digest of the `source` (see `code_identity`).
    packages: version by name.
    """

    finished: float
    seconds: float
    code: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    machine: str = ""

    @property
    def when(self) -> str:
        """When it ended, in UTC."""
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.finished))


@dataclass(frozen=True)
class StageState:
    """One stage of dvc.yaml.

    needs: stages whose outputs it reads.
    why: what is not as DVC recorded it; empty for a fresh stage.
    finished: seconds since 1970.
    seconds: its last run took; both None when it has not run on this machine.
    size: bytes of its outputs, as recorded.
    changes: whether values of params are what differs, so that its last run says little about how long the next takes.
    code: digest of the sources that ran it last here, empty when not known.
    uncached: whether it is fresh and DVC's cache lacks outputs of it, so that `dvc repro` would run it again.
    """

    name: str
    needs: tuple[str, ...]
    state: Literal["fresh", "stale", "never run"]
    why: str
    finished: float | None
    seconds: float | None
    size: int
    changes: bool = False
    code: str = ""
    uncached: bool = False


def project_state(root: Path) -> list[StageState]:
    """Return the state of all stages, each after what it needs.

    Raises ValueError when a file is not readable YAML, or a stage stands before one that it needs.
    """
    stages = read_stages(root)
    lock = read_lock(root)
    params = read_yaml(root / "params.yaml") if (root / "params.yaml").exists() else {}
    made = {out: name for name, stage in stages.items() for out in outputs_of(stage)}
    digests = {one["path"]: one.get("md5") for stage in lock.values() for one in stage["outs"]}
    states: dict[str, StageState] = {}
    cache = cache_folder(root)
    for name in stages:
        needs = needs_of(stages[name], made, name)
        if behind := [need for need in needs if need not in states]:
            raise ValueError(f"dvc.yaml: stage {name} stands before {behind[0]}, whose output it reads: move it behind that")
        last = read_last(root, name)
        recorded = lock.get(name)
        why = "" if recorded is None else _why(root, stages[name], recorded, params, digests)
        if recorded is not None and not why:
            late = [need for need in needs if states[need].state != "fresh"]
            # Of a folder of several stages' outputs no digest is known here; whether they ran again has to do.
            folders = [dep for dep in paths_of(stages[name].get("deps")) if dep not in made and not (root / dep).is_file()]
            loose = needs_of({"deps": folders}, made, name)
            newer = [need for need in loose if last and (states[need].finished or 0.0) > last.finished]
            why = f"{late[0]} has to run first" if late else f"{newer[0]} has run since" if newer else ""
        state: Literal["fresh", "stale", "never run"] = "never run" if recorded is None else "stale" if why else "fresh"
        total = sum(int(one.get("size") or 0) for one in (recorded or {"outs": []})["outs"])
        finished, seconds = (last.finished, last.seconds) if last else (None, None)
        code = last.code.get("source", "") if last else ""
        uncached = recorded is not None and state == "fresh" and lacks(cache, stages[name], recorded)
        states[name] = StageState(
            name, needs, state, why, finished, seconds, total, changes=" -> " in why, code=code, uncached=uncached
        )
    return list(states.values())


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ValueError in a sentence."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe").load(path.read_text("utf-8"))
    except YAMLError as error:
        from stages.params import yaml_fault

        raise ValueError(f"{path} is not YAML: {yaml_fault(error)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping")
    return content


def read_stages(root: Path) -> dict[str, dict[str, Any]]:
    """Return the stages of dvc.yaml. Raises ValueError in a sentence."""
    try:
        found = read_yaml(root / "dvc.yaml").get("stages")
        if not isinstance(found, dict) or not found:
            raise ValueError(f"{root / 'dvc.yaml'} has no stages")
    except ValueError as error:
        raise ValueError(f"{error}; take it from git (`git restore dvc.yaml`)") from None
    return found


def read_lock(root: Path) -> dict[str, dict[str, Any]]:
    """Return what DVC recorded of each stage; nothing where it has recorded nothing yet. Raises ValueError in a sentence.

    DVC writes the file in place, so that a kill or a power cut at that moment leaves a part of it.
    """
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    way_out = "take it from git (`git restore dvc.lock`) or remove it: stages then start from what work/ has of them"
    try:
        found = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from None
    try:
        return {name: _recorded(stage) for name, stage in (found.get("stages") or {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is cut off or damaged; {way_out}") from None


def _recorded(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DVC recorded of a stage, with empty lists for what it has not. Raises what damage gives."""
    params = dict((stage.get("params") or {}).get("params.yaml") or {})
    kept = {
        kind: [{**one, "path": Path(one["path"]).as_posix()} for one in stage.get(kind) or []] for kind in ("deps", "outs")
    }
    return {**stage, **kept, "params": {"params.yaml": params}}


def write_last(root: Path, stage: str, run: LastRun) -> None:
    """Record a stage's last run here."""
    write_json(root / "work" / stage / LAST, asdict(run))


def read_last(root: Path, stage: str) -> LastRun | None:
    """Return what was recorded of a stage's last run here, None when there is nothing, or it cannot be read."""
    try:
        found = json.loads((root / "work" / stage / LAST).read_text("utf-8"))
        return LastRun(**found | {name: float(found[name]) for name in ("finished", "seconds")})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def paths_of(entries: Any) -> list[str]:
    """Return the paths of a list of dvc.yaml, whose entries are paths or paths with settings."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries or []]


def outputs_of(stage: Mapping[str, Any]) -> list[str]:
    """Return everything that a stage of dvc.yaml writes."""
    return [path for kind in ("outs", "metrics", "plots") for path in paths_of(stage.get(kind))]


def needs_of(stage: Mapping[str, Any], made: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return the stages that write what a stage reads. made: path -> stage."""
    found = [
        maker
        for path, maker in made.items()
        for dep in paths_of(stage.get("deps"))
        if maker != name and (path == dep or path.startswith(f"{dep}/") or dep.startswith(f"{path}/"))
    ]
    return tuple(dict.fromkeys(found))


def _why(root: Path, stage: Any, recorded: Any, params: dict[str, Any], digests: dict[str, Any]) -> str:
    """Return what is not as recorded, in a few words; an empty text when all is."""
    if recorded.get("cmd") != stage.get("cmd"):
        return "its command changed"
    before = recorded["params"]["params.yaml"]
    changes = [
        change for key in paths_of(stage.get("params")) for change in changed(key, before.get(key), lookup(params, key))
    ]
    if changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        return f"{changes[0]}{more}"
    for one in recorded.get("outs", []):
        path = root / one["path"]
        if not path.exists():
            return f"{one['path']} is missing"
        if path.is_file() and one.get("size") is not None and path.stat().st_size != one["size"]:
            return f"{one['path']} was changed"
    read = {one["path"]: one.get("md5") for one in recorded.get("deps", [])}
    for path, digest in read.items():
        known = digests[path] if path in digests else _digest_of_file(root / path)
        if known is not None and known != digest:
            return f"{path} is another than it read"
    if set(read) != set(paths_of(stage.get("deps"))):
        return "it reads other files now"
    written = {one["path"] for one in recorded.get("outs", [])}
    return "" if written == set(outputs_of(stage)) else "it writes other files now"


def _digest_of_file(path: Path) -> str | None:
    """Return DVC's digest of a file inside an output folder, which is a small one; None for a folder."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None


def all_fresh(root: Path) -> str:
    """Return what can be said where every stage is fresh. Files outside the project are looked at by stage sources alone."""
    params = read_yaml(root / "params.yaml") if (root / "params.yaml").exists() else {}
    named = [] if lookup(params, "data.source") in (None, "builtin") else ["data.train", "data.validation"]
    named += [name for name in ("tokenizer.weights", "score.features_file") if lookup(params, name) is not None]
    if lookup(params, "score.reference") not in (None, "train", "validation"):
        named.append("score.reference")
    if not named:
        return "all up to date"
    return f"all up to date, unless files changed that {', '.join(named)} stand for: `dpar-cli run` looks"


def lookup(params: Any, key: str) -> Any:
    """Return the value of a dotted key of params.yaml, None when it is not there."""
    for part in key.split("."):
        params = params.get(part) if isinstance(params, dict) else None
    return params


def changed(key: str, before: Any, now: Any) -> list[str]:
    """Return what differs between two values of params, as `train.steps 480 -> 8` each."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [one for name in names for one in changed(f"{key}.{name}", before.get(name), now.get(name))]
    return [] if before == now else [f"{key} {_value(before)} -> {_value(now)}"]


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def with_needs(states: list[StageState], targets: list[str]) -> list[StageState]:
    """Return the stages that bringing `targets` up to date involves; all of them when none is named.

    Raises ValueError for a stage that dvc.yaml does not have.
    """
    by_name = {state.name: state for state in states}
    for target in targets:
        if target not in by_name:
            raise ValueError(f"there is no stage {target!r}: {nearest(target, list(by_name), 'dpar-cli status')}")
    wanted = set(targets or by_name)
    for state in reversed(states):
        if state.name in wanted:
            wanted |= set(state.needs)
    return [state for state in states if state.name in wanted]
