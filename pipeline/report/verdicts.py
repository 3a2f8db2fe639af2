"""Who wins: two models set side by side, quantity by quantity, and the plain sentence that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Side = Literal["dpar", "twin"]
NAMES: dict[Side, str] = {"dpar": "DPAR", "twin": "the twin"}
RESAMPLES, LEVEL = 2000, (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval, None where nothing tells how far chance moves it."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """One quantity of both models. words: what it is; better: which direction is good; winner: None when there is none.

    why: what the verdict rests on. discounted: who is ahead, but had an advantage, and so has not won.
    """

    words: str
    better: Literal["lower", "higher"]
    dpar: Estimate
    twin: Estimate
    winner: Side | None
    why: str
    discounted: Side | None = None

    @property
    def judged(self) -> bool:
        """Whether a difference could have been told from chance."""
        return self.dpar.interval is not None and self.twin.interval is not None


@dataclass(frozen=True)
class Contest:
    """A comparison under one condition. winner: "split" when each wins something, None when nobody wins anything.

    handicap: words for what the other side of an unequal comparison had too much of ("28 % more training time"), and
    advantaged: who had it. What the advantaged side is ahead in does not count; what the other wins counts all the more.
    """

    when: str
    rows: tuple[Row, ...]
    advantaged: Side | None = None
    handicap: str = ""

    def __post_init__(self) -> None:
        rows = tuple(
            replace(row, winner=None, discounted=row.winner) if row.winner and row.winner == self.advantaged else row
            for row in self.rows
        )
        object.__setattr__(self, "rows", rows)

    @property
    def winner(self) -> Side | Literal["split"] | None:
        sides = {row.winner for row in self.rows} - {None}
        return "split" if len(sides) == 2 else next(iter(sides), None)

    @property
    def title(self) -> str:
        """The verdict in a few words."""
        return {
            "dpar": f"DPAR wins {self.when}", "twin": f"The twin wins {self.when}",
            "split": f"A split decision {self.when}", None: f"No clear winner {self.when}",
        }[self.winner]  # fmt: skip

    @property
    def sentence(self) -> str:
        """The verdict with what it rests on."""
        parts = []
        for side, name in NAMES.items():
            won = [row.words for row in self.rows if row.winner == side]
            if won:
                though = f", though {NAMES[self.advantaged]} had {self.handicap}" if self.advantaged else ""
                parts.append(f"{name} is better in {listed(won)}{though}")
        unfair = [row.words for row in self.rows if row.discounted]
        if unfair:
            leads = f"that {NAMES[self.advantaged]} is ahead in {listed(unfair)} does not count"
            parts.append(f"{leads}, as it had {self.handicap}")
        even = [row.words for row in self.rows if row.judged and row.winner is None and row.discounted is None]
        if even:
            parts.append(f"{listed(even)} {'shows' if len(even) == 1 else 'show'} no clear difference")
        unknown = [row.words for row in self.rows if not row.judged]
        if unknown:
            parts.append(f"{listed(unknown)} {'has' if len(unknown) == 1 else 'have'} no interval and no vote")
        sentence = "; ".join(parts) + "."
        return sentence[0].upper() + sentence[1:]


def together(one: Contest, other: Contest) -> str:
    """Return both verdicts as one sentence for the top of the page."""
    if one.winner == other.winner:
        return f"{one.title} and {other.when}."
    title = other.title if other.winner == "dpar" else other.title[0].lower() + other.title[1:]
    return f"{one.title}; {title}."


def listed(words: Sequence[str]) -> str:
    """Join words as in a sentence: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def judge(words: str, better: Literal["lower", "higher"], dpar: Estimate, twin: Estimate) -> Row:
    """Set two independent estimates side by side; one wins when the intervals do not overlap."""
    if dpar.interval is None or twin.interval is None:
        return Row(words, better, dpar, twin, None, "no interval")
    below, above = dpar.interval[1] < twin.interval[0], dpar.interval[0] > twin.interval[1]
    if not below and not above:
        return Row(words, better, dpar, twin, None, "intervals overlap")
    return Row(words, better, dpar, twin, "dpar" if below == (better == "lower") else "twin", "intervals apart")


def judge_losses(words: str, dpar: np.ndarray, twin: np.ndarray, *, seed: int = 0) -> Row:
    """Compare losses (n,) nats a token of the same n images: one side wins when 0 lies outside the interval of the
    mean difference (paired bootstrap)."""
    picks = np.random.default_rng(seed).integers(0, len(dpar), (RESAMPLES, len(dpar)))

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(values[picks].mean(axis=1), LEVEL)
        return float(low), float(high)

    estimates = [Estimate(float(values.mean()), interval(values)) for values in (dpar, twin)]
    low, high = interval(dpar - twin)
    winner: Side | None = "dpar" if high < 0 else "twin" if low > 0 else None
    return Row(words, "lower", *estimates, winner, f"difference {low:+.3f} to {high:+.3f}, image by image")


def score_name(key: str) -> str:
    """Return how a score is called in words: eval/fd_demo -> fd_demo, eval/is -> IS."""
    name = key.removeprefix("eval/")
    return {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID"}.get(name, name)


# In the order of a table. Others (sFID, KID) are told, but are not compared.
JUDGED = ("eval/fid", "eval/fd_", "eval/is", "eval/precision", "eval/recall")


def score_columns(scores: Mapping[str, Any]) -> list[str]:
    """Return the keys of a score file that are compared, in the order of a table: distance, IS, precision, recall."""
    return [key for start in JUDGED for key in scores if key.startswith(start)]


def higher_is_better(key: str) -> bool:
    """Tell whether a score is good when it is large."""
    return key.startswith(("eval/is", "eval/precision", "eval/recall"))


def judge_scores(dpar: Mapping[str, Any], twin: Mapping[str, Any]) -> list[Row]:
    """Compare distance, IS, precision and recall of two score files.

    Raises ValueError when they were made under different protocols.
    """
    if dpar["protocol_id"] != twin["protocol_id"]:
        raise ValueError(
            f"scores of protocols {dpar['protocol_id']} and {twin['protocol_id']} are not compared: run "
            "`dvc repro score_dpar score_llamagen`"
        )

    def estimate(scores: Mapping[str, Any], key: str) -> Estimate:
        ends = scores["intervals"].get(key)
        return Estimate(scores[key], None if ends is None else (ends[0], ends[1]))

    return [
        judge(score_name(key), "higher" if higher_is_better(key) else "lower", estimate(dpar, key), estimate(twin, key))
        for key in score_columns(dpar)
        if key in twin
    ]
