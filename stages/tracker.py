"""What a stage may say while it works. `pipeline/tracking.py` writes it to MLflow; stages know nothing of that."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from stages.terminal import columns, print_fitted, shortened, size

PROGRESS_SECONDS = "DPAR_PROGRESS_SECONDS"  # variable of the environment: seconds between lines of progress, 10 when unset


class Progress(Protocol):
    """A bar on a terminal, a line now and then in a log."""

    def advance(self, amount: int = 1, **values: float) -> None:
        """Say that `amount` more units are done; `values` are shown behind the bar (as loss=2.31)."""


class Tracker(Protocol):
    """Where a stage sends its measurements and pictures. Calls come from the driver process only."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record values that the stage found out, beside those of params.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; with `step`, as a point of a curve."""

    def log_input(self, name: str, path: Path, digest: str) -> None:
        """Record a data set that the stage read, with the digest of its content."""

    def log_picture(self, path: Path) -> None:
        """Keep a picture."""

    def log_artifact(self, path: Path) -> None:
        """Keep a small file."""

    def progress(self, total: int, description: str, *, done: int = 0, unit: str = "it") -> AbstractContextManager[Progress]:
        """Open a context manager that yields a `Progress`; `done` units are there from an earlier, interrupted run."""


def rate_words(rate: float, unit: str) -> str:
    """Write a rate of units per second; below one as the seconds that a unit takes: `312.4 images/s`, `2.5 s/step`."""
    if unit == "bytes":
        return f"{size(rate)}/s"
    if rate >= 1 or rate <= 0:
        return f"{rate:.1f} {unit}/s"
    return f"{1 / rate:.1f} s/{unit.removesuffix('s') if unit != 's' else unit}"


class LineProgress:
    """Progress as one line every few seconds: `tokenize_images 1200/4500 images 26 % 312.4 images/s ETA 0:00:11`."""

    def __init__(self, total: int, description: str, *, done: int, unit: str, interval: float | None = None) -> None:
        interval = float(os.environ.get(PROGRESS_SECONDS, 10.0)) if interval is None else interval
        self.total, self.description, self.done, self.unit, self.interval = total, description, done, unit, interval
        self.first = done
        self.started = self.printed = time.monotonic()

    def advance(self, amount: int = 1, **values: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.printed >= self.interval or self.done >= self.total:
            self.printed = now
            rate = (self.done - self.first) / max(now - self.started, 1e-9)
            total = max(self.total, self.done)  # a total in seconds is a plan that slow work may exceed
            left = int((total - self.done) / rate) if rate > 0 else 0
            count = f" {self.done}/{total} {self.unit} {100 * self.done / max(total, 1):.0f} % "
            pace = "" if self.unit == "s" else f"{rate_words(rate, self.unit)} "  # seconds pass at one per second
            eta = f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            shown = " ".join(("", *(f"{name}={value:.4g}" for name, value in values.items())))
            ends = (f"{count}{pace}{eta}{shown}", f"{count}{pace}{eta}", f"{count}{eta}")
            end = next((one for one in ends if len(self.description) + len(one) <= columns()), ends[-1])
            print(f"{shortened(self.description, columns() - len(end))}{end}", file=sys.stderr, flush=True)


class NullTracker:
    """Drops everything, but remembers the last value of each metric (`.metrics`) for tests and small tools."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.inputs: dict[str, str] = {}
        self.pictures: list[Path] = []

    def log_params(self, params: Mapping[str, object]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.metrics.update(metrics)

    def log_input(self, name: str, path: Path, digest: str) -> None:
        self.inputs[name] = digest

    def log_picture(self, path: Path) -> None:
        self.pictures.append(path)

    def log_artifact(self, path: Path) -> None:
        pass

    @contextmanager
    def progress(self, total: int, description: str, *, done: int = 0, unit: str = "it") -> Iterator[Progress]:
        yield self._progress(total, description, done, unit)

    def _progress(self, total: int, description: str, done: int, unit: str) -> Progress:
        return _NoProgress()


class _NoProgress:
    def advance(self, amount: int = 1, **values: float) -> None:
        pass


class PrintTracker(NullTracker):
    """Prints progress to stderr and metrics to stdout."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        shown = " ".join(f"{name}={value:.6g}" for name, value in metrics.items())
        print_fitted(shown if step is None else f"step {step} {shown}")

    def _progress(self, total: int, description: str, done: int, unit: str) -> Progress:
        return LineProgress(total, description, done=done, unit=unit)
