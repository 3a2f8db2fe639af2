"""Speeds that are shown, and those that are not: a ratio counts only where the machine held still while it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.artifacts import SAMPLING_SPEED, TRAINING_SPEED
from stages.shared.pace import Pace, read_pace

DRIFT = 0.20  # share by which the pace of a model may move between thirds of its turns


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the baseline DPAR works, measured in turns. promised: what the FLOPs allow."""

    what: str
    pace: Pace
    promised: float

    @property
    def ratio(self) -> float:
        return self.pace.turns.ratio

    @property
    def interval(self) -> tuple[float, float]:
        return self.pace.turns.interval

    @property
    def doubt(self) -> str:
        """Why no speed is shown; an empty text when it is."""
        drift = max(self.pace.turns.drift)
        if drift > DRIFT:
            who = "DPAR" if self.pace.turns.drift[0] == drift else "the baseline"
            return f"the machine was busy: the pace of {who} in {self.what} moved by {100 * drift:.0f} % between turns"
        low, high = self.interval
        if low > self.promised:
            return (
                f"the machine was busy: DPAR measured {self.ratio:.2f} times ({low:.2f} to {high:.2f}) as fast as the "
                f"baseline in {self.what}, more than the {self.promised:.2f} that FLOPs allow"
            )
        return ""

    @property
    def words(self) -> str:
        """The ratio as a sentence, or why there is none."""
        if self.doubt:
            return f"No speed of {self.what} is shown: {self.doubt}."
        low, high = self.interval
        verb = "faster" if low > 1 else "slower" if high < 1 else "not clearly faster or slower"
        return f"{self.ratio:.2f} times the baseline's speed in {self.what} ({low:.2f} to {high:.2f}): {verb}."


@dataclass(frozen=True)
class Speeds:
    """Both speeds of the report."""

    training: Speed
    sampling: Speed


def read_speeds(folder: Path, *, training_promise: float, sampling_promise: float) -> Speeds:
    """Read artifacts/speed. Raises FileNotFoundError or ValueError with the way out."""
    return Speeds(
        Speed("training", read_pace(folder / Path(TRAINING_SPEED.name).name), training_promise),
        Speed("sampling", read_pace(folder / Path(SAMPLING_SPEED.name).name), sampling_promise),
    )
