"""What the report says in short, for machines: artifacts/report/headline.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from stages.artifacts import HEADLINE


class Value(TypedDict):
    """A measured value and the ends of its 95 % interval, None where there is none."""

    value: float
    interval: list[float] | None


class Row(TypedDict):
    """One quantity of both models; further entries are those of `verdicts.Comparison`."""

    words: str
    dpar: Value
    baseline: Value


class Verdict(TypedDict):
    """What came of one `verdicts.Contest`."""

    when: str
    winner: str | None
    title: str
    sentence: str
    judged: bool
    rows: list[Row]


class Ratio(TypedDict):
    """How many times as fast as the baseline DPAR was: None where `doubt` says why, and what FLOPs allow."""

    ratio: float | None
    interval: list[float] | None
    doubt: str
    flops_allow: float


class Headline(TypedDict):
    """The figures at the top of the page. equal_time: the fields of `facts.EqualTime`."""

    badge: str
    headline: str
    seeds: int
    verdicts: list[Verdict]
    tokens: int
    patches_per_image: float
    flops_saved: float
    flop_ratio: float
    training_speed: Ratio
    sampling_speed: Ratio
    equal_time: dict[str, Any]


def speeds(headline: Headline) -> dict[str, Ratio]:
    """Return both speeds by what was timed: training and sampling."""
    return {"training": headline["training_speed"], "sampling": headline["sampling_speed"]}


def read_headline(root: Path) -> Headline | None:
    """Return what the report says in short, None when there is none. root: the project's folder."""
    try:
        found: Headline = json.loads((root / HEADLINE.path).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found
