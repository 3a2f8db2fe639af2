"""When, where and by which code the stages behind a report last ran on this machine, as the runner recorded it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.state import LastRun, read_last
from stages.artifacts import OUTPUTS

UNSEEN = ("sources", "report")  # one looks every time, the other is being made
_WORDS: dict[str, Callable[[LastRun], str]] = {
    "code": lambda run: f"dpar {run.code['version']} (sources {run.code['source'][:12]})" if run.code else "",
    "commit": lambda run: run.commit,
    "packages": lambda run: ", ".join(f"{package} {version}" for package, version in run.packages.items()),
    "machine": lambda run: run.machine,
}


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
        """Return the different values of a field in words, in the order of the stages; empty ones left out."""
        return list(dict.fromkeys(words for run in self.runs.values() if (words := _WORDS[field](run))))


def read_provenance(root: Path) -> Provenance:
    """Read what the runner recorded below root/work. root: the project's folder."""
    found = {name: read_last(root, name) for name in OUTPUTS if name not in UNSEEN}
    return Provenance({name: run for name, run in found.items() if run is not None})
