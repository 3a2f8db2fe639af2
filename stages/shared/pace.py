"""What the stages that time the two models share: the file that they write and the report reads."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from dpar_core.files import read_record, write_record
from dpar_core.turns import Turns

SECONDS = 12.0  # of turns, start-up and warm-up left out


@dataclass(frozen=True)
class Pace:
    """How fast DPAR (first) and the baseline (second) work.

    unit: what a turn's seconds are for: "step" (an optimizer step) or "image".
    images: how many images a step or a batch has.
    machine: what they ran on, in words.
    parts: model -> part of it -> seconds per image of sampling; empty where parts were not timed.
    """

    unit: str
    images: int
    turns: Turns
    machine: str = ""
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Median seconds per unit, by model."""
        return {"dpar": statistics.median(self.turns.first), "llamagen": statistics.median(self.turns.second)}

    @property
    def images_per_s(self) -> dict[str, float]:
        """Images per second at the median pace, by model."""
        per_unit = self.images if self.unit == "step" else 1
        return {name: per_unit / seconds for name, seconds in self.seconds.items()}


def wait_for_helpers(*, longest: float = 30.0, busy: float = 0.2, look: float = 0.5) -> None:
    """Wait until the processes that this one started rest, so that they do not slow what is timed.

    The one that delivers to MLflow imports it for some seconds at the start of a stage that runs by itself; in a pipeline
    run the first stage started it. Goes on after `longest` seconds in any case: the drift of the turns then shows it.
    busy: share of a core below which a process rests.
    """
    helpers = psutil.Process().children(recursive=True)
    until = time.monotonic() + longest
    for helper in helpers:
        with suppress(psutil.Error):  # it has ended
            while helper.cpu_percent(look) > 100 * busy and time.monotonic() < until:
                pass


def machine_words(device: str) -> str:
    """Return what this machine is, in words: processor or GPU, cores, torch and Python."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"


def _processor() -> str:
    """Return the name of the processor; Linux alone keeps a readable one in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_pace(path: Path, pace: Pace, **more: Any) -> None:
    """Write what was measured, with the turns themselves, so that a reader can judge them."""
    turns = pace.turns
    write_record(
        path,
        {
            "unit": pace.unit,
            "images": pace.images,
            "images_per_s": pace.images_per_s,
            "machine": pace.machine,
            "parts": {name: list(of.items()) for name, of in pace.parts.items()},  # a list keeps its order
            "ratio": turns.ratio,
            "interval": list(turns.interval),
            "drift": list(turns.drift),
            "turns": {"dpar": list(turns.first), "llamagen": list(turns.second)},
            **more,
        },
    )


def read_pace(path: Path) -> Pace:
    """Read what write_pace wrote. Raises FileNotFoundError or ValueError with the way out."""
    stage = f"time_{path.stem}"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `dpar-cli run {stage}`")
    found = read_record(path, way_out=f"run `dvc repro -sf {stage}`")
    try:
        turns = Turns(tuple(found["turns"]["dpar"]), tuple(found["turns"]["llamagen"]))
        parts = {name: dict(of) for name, of in found.get("parts", {}).items()}
        return Pace(found["unit"], int(found["images"]), turns, found.get("machine", ""), parts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `dvc repro -sf {stage}`") from None
