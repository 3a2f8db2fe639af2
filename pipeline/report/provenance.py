"""When, where and by which code the stages behind a report last ran on this machine, as the runner recorded it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.state import read_last
from stages.artifacts import OUTPUTS

UNSEEN = ("sources", "report")  # one looks every time, the other is being made


@dataclass(frozen=True)
class LastRun:
    """A stage's last run.

    finished: seconds since 1970.
    seconds: it took.
    code: version and digest of the sources.
    """

    finished: float
    seconds: float
    code: str
    commit: str
    packages: str
    machine: str

    @property
    def when(self) -> str:
        """When it ended, in UTC."""
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.finished))


@dataclass(frozen=True)
class Provenance:
    """The last runs of the stages, by name; a stage that did not run on this machine is not among them."""

    runs: Mapping[str, LastRun]

    @property
    def seconds(self) -> float:
        """What the stages took together."""
        return sum(run.seconds for run in self.runs.values())

    @property
    def first(self) -> str:
        return min(run.when for run in self.runs.values())

    @property
    def last(self) -> str:
        return max(run.when for run in self.runs.values())

    def all(self, field: str) -> list[str]:
        """Return the different values of a field, in the order of the stages; empty ones left out."""
        return list(dict.fromkeys(value for run in self.runs.values() if (value := getattr(run, field))))


def read_provenance(root: Path) -> Provenance:
    """Read what the runner recorded below root/work. root: the project's folder."""
    found = {}
    for name in OUTPUTS:
        last: dict[str, Any] = {} if name in UNSEEN else read_last(root, name)
        if last:
            code, packages = last.get("code", {}), last.get("packages", {})
            found[name] = LastRun(
                last["finished"],
                last["seconds"],
                f"dpar {code['version']} (sources {code['source'][:12]})" if code else "",
                last.get("commit", ""),
                ", ".join(f"{package} {version}" for package, version in packages.items()),
                last.get("machine", ""),
            )
    return Provenance(found)
