"""Which fault is the i-th: a function of seed and i alone, given how many changes each stage makes undisturbed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from pipeline.runner import STAGES
from tests.faults.injection import Injection
from tests.faults.project import World
from tests.faults.shares import APART, SHARES, TRAINING

DAY = 86400.0
DAMAGES = ("flipped bit", "cut short", "emptied", "removed")
STORE_ERRORS = ("EIO", "ConnectionError", "TimeoutError", "PermissionError")
# Of another machine: what no result may depend on. Folders: spaces, umlauts, what addresses and shells escape.
ZONES, UMASKS = ("Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati"), (0o077, 0o022, 0o002)
FOLDERS = ("a b%20ü#?", "x'y&$(z)", "ä" * 60, "two\nlines")
LOCALES = ("C", "C.UTF-8", "de_DE.UTF-8", "de_DE.ISO-8859-1")  # the last two, made where they are not there: a decimal comma
OF_DVC = ("int to all", "int to dvc", "term to dvc", "kill to dvc", "a second dvc repro")
OF_NODES = ("kill -9 of a node", "a cut of the cable")
CHEAP = ("data", "tokenize_images", "patch_maps", "score_dpar")
MLFLOW = ("closed port", "silent server", "failing server", "damaged database", "killed outbox")


@dataclass(frozen=True)
class Fault:
    """One fault. what: of its kind, in words; chance: for choices that depend on what is there when it happens."""

    index: int
    kind: str
    stage: str
    what: str
    injection: Injection = field(default_factory=Injection)
    details: dict[str, Any] = field(default_factory=dict)
    chance: float = 0.0

    def words(self) -> str:
        return f"{self.index:4} {self.stage:15} {self.kind:10} {self.what}"


def fault(world: World, seed: int, index: int, *, kinds: tuple[str, ...] = tuple(SHARES)) -> Fault:
    """Return a fault."""
    dice = random.Random(f"{seed}-{index}")
    kind = dice.choices(kinds, [(SHARES | APART)[kind] for kind in kinds])[0]
    stages = [stage for stage in STAGES if stage in world.counts]
    if kind in ("child", "store"):
        stage = dice.choice(TRAINING)
    elif kind in ("ray", "nodes"):
        stage = "tokenize_images"
    elif kind == "mlflow":
        stage = dice.choice([stage for stage in ("data", "patch_maps", "score_dpar") if stage in stages])
    elif kind == "dvc":
        stage = dice.choice([stage for stage in CHEAP if stage in stages])
    elif kind == "input":
        stage = dice.choice([stage for stage in stages if world.inputs(stage)])
    else:
        stage = dice.choice(stages)
    what, injection, details = _chosen(world, kind, stage, dice)
    return Fault(index, kind, stage, what, injection, details, dice.random())


def _chosen(world: World, kind: str, stage: str, dice: random.Random) -> tuple[str, Injection, dict[str, Any]]:
    where = "child" if kind == "child" else "stage"
    changes = max(world.counts[stage].get(where, 1), 1)
    at = dice.randrange(changes)
    place = f"at change {at} of {changes}" + (" of the child" if where == "child" else "")
    if kind == "kill":
        return f"kill -9 {place}", Injection("kill", where, at), {}
    if kind == "stop":
        name = dice.choice(["term", "int"])
        return f"SIG{name.upper()} {place}", Injection(name, where, at), {}
    if kind == "disk":
        name, lasting = dice.choice(["ENOSPC", "EIO", "EROFS"]), dice.random() < 0.5
        return f"{name} {place}{', lasting' if lasting else ''}", Injection(name, where, at, lasting=lasting), {}
    if kind == "child":
        name = dice.choice(["kill", "term", "int", "ENOSPC", "EIO", "EROFS"])
        lasting = name.startswith("E") and dice.random() < 0.5
        return f"{name} {place}{', lasting' if lasting else ''}", Injection(name, where, at, lasting=lasting), {}
    if kind == "file limit":
        largest = int(dice.random() ** 2 * max(map(len, world.outputs(stage).values())))
        where = dice.choice(["stage", "child"]) if stage in TRAINING else "stage"
        return f"no file over {largest} bytes", Injection(where=where, largest=largest), {}
    if kind == "moment":
        name = dice.choice(["kill", "term", "int"])
        whom = dice.choice(["stage", "child"]) if stage in TRAINING else "stage"
        share = dice.random()
        return (
            f"{name} to the {whom} at {share:.0%} of its time",
            Injection(),
            {"signal": name, "whom": whom, "share": share},
        )
    if kind == "input":
        path, damage = dice.choice(world.inputs(stage)), dice.choice(DAMAGES)
        keep = dice.random() < 0.5
        return f"{path}: {damage}", Injection(), {"path": path, "damage": damage, "keep_time": keep}
    if kind == "output":
        path, damage = dice.choice(list(world.outputs(stage))), dice.choice(DAMAGES)
        return f"{path}: {damage}", Injection(), {"path": path, "damage": damage, "keep_time": False}
    if kind == "work":
        damage = dice.choice(DAMAGES)
        return f"kill -9 {place}, then a file of work/ {damage}", Injection("kill", where, at), {"damage": damage}
    if kind == "clock":
        seconds = dice.choice([-3650 * DAY, -DAY, -1.0, 3600.0, DAY, 3650 * DAY])
        return f"the clock jumps by {seconds:g} s {place}", Injection("clock", where, at, seconds=seconds), {}
    if kind == "mlflow":
        how = dice.choice(MLFLOW)
        return how, Injection(), {"how": how}
    if kind == "store":
        error, call, lasting = dice.choice(STORE_ERRORS), dice.randrange(60), dice.random() < 0.5
        what = f"{error} at call {call} of the object store{', lasting' if lasting else ''}"
        return what, Injection(), {"error": error, "call": call, "lasting": lasting}
    if kind == "surroundings":
        found = {"zone": dice.choice(ZONES), "umask": dice.choice(UMASKS), "folder": dice.choice(FOLDERS)}
        found |= {"locale": dice.choice(LOCALES), "cores": dice.choice([1, 2]), "home": dice.choice(["missing", "there"])}
        words = f"in {found['zone']}, umask {found['umask']:03o}, {found['cores']} cores, locale {found['locale']}, "
        return f"{words}home {found['home']}, folder {found['folder']!r}", Injection(), found
    if kind == "beside":
        hows = ["the same stage twice at once"] * 3 + ["four processes write to a fresh store"]
        hows += ["the report while a model trains"] if "report" in world.counts else []
        return (how := dice.choice(hows)), Injection(), {"how": how}
    if kind == "dvc":
        how, share = dice.choice(OF_DVC), dice.random()
        return f"{how} at {share:.0%} of the stage's time", Injection(), {"how": how, "share": share}
    if kind == "nodes":
        how, seconds, share = dice.choice(OF_NODES), dice.choice([0.5, 8.0, None]), dice.random()
        words = f"{how}, which comes back {f'after {seconds:g} s' if seconds else 'for the rerun'}"
        return words, Injection(), {"how": how, "seconds": seconds, "share": share}
    whom = dice.choice(["worker", "raylet", "gcs_server", "driver"])
    return f"kill -9 of Ray's {whom}", Injection(), {"whom": whom}
