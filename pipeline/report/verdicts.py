"""Which model is better: two models compared quantity by quantity, and the sentence that the numbers carry.

There is a verdict only where a difference is distinguishable from chance: an interval that excludes zero, enough images
for the features, enough training, and, at equal training time, measured times that agree. Otherwise the reason is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpar_core.evaluation.protocol import Scores

Side = Literal["dpar", "baseline"]
NAMES: dict[Side, str] = {"dpar": "DPAR", "baseline": "the baseline"}
RESAMPLES, LEVEL = 2000, (2.5, 97.5)
FEWEST_STEPS = 100  # optimizer steps below which two models are still near their initial weights
FEWEST_IMAGES = 20  # of fewer a bootstrap's intervals are far too narrow: of two images every other one excludes zero


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % confidence interval, None where there is none."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """One quantity of both models.

    words: what it is.
    better: which direction is good.
    winner: None when there is none.
    why: what the verdict rests on, or why there is none.
    judged: whether a difference could have been distinguished from chance.
    difference: DPAR minus baseline, for quantities that are compared pair by pair.
    """

    words: str
    better: Literal["lower", "higher"]
    dpar: Estimate
    baseline: Estimate
    winner: Side | None
    why: str
    judged: bool = True
    difference: Estimate | None = None


@dataclass(frozen=True)
class Contest:
    """A comparison under one condition.

    when: the condition, as in "at equal steps".
    obstacles: why this comparison can have no verdict at all.
    """

    when: str
    rows: tuple[Comparison, ...]
    obstacles: tuple[str, ...] = ()

    @property
    def winner(self) -> Side | Literal["mixed"] | None:
        """Who is better in at least one quantity and worse in none; "mixed" when each is better in something."""
        if self.obstacles:
            return None
        sides = {row.winner for row in self.rows} - {None}
        return "mixed" if len(sides) == 2 else next(iter(sides), None)

    @property
    def judged(self) -> bool:
        """Whether there is a verdict, be it that no difference was shown."""
        return not self.obstacles and any(row.judged for row in self.rows)

    @property
    def verdict(self) -> str:
        """The verdict in a few words, without its condition."""
        if not self.judged:
            return "No verdict"
        return {
            "dpar": "DPAR is better",
            "baseline": "The baseline is better",
            "mixed": "Each model is better in something",
            None: "No clear difference",
        }[self.winner]

    @property
    def scope(self) -> str:
        """The condition, and in what the winner is better, unless it is better in all that was judged."""
        won = [row.words for row in self.rows if row.winner == self.winner]
        partly = self.winner in NAMES and len(won) < sum(row.judged for row in self.rows)
        return f"{self.when} ({', '.join(won)})" if partly else self.when

    @property
    def title(self) -> str:
        """The verdict with its condition."""
        return f"{self.verdict} {self.scope}"

    @property
    def sentence(self) -> str:
        """The verdict with what it rests on, or why there is none."""
        if self.obstacles:
            return capitalised("; ".join(self.obstacles)) + "."
        parts = []
        for side, name in NAMES.items():
            if won := [row.words for row in self.rows if row.winner == side]:
                parts.append(f"{name} is better in {listed(won)}")
        if even := [row.words for row in self.rows if row.judged and row.winner is None]:
            parts.append(f"{listed(even)} {'shows' if len(even) == 1 else 'show'} no clear difference")
        for why in dict.fromkeys(row.why for row in self.rows if not row.judged):
            unknown = [row.words for row in self.rows if not row.judged and row.why == why]
            parts.append(f"{listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not judged: {why}")
        return capitalised("; ".join(parts)) + "."


def together(one: Contest, other: Contest) -> str:
    """Return both verdicts as one sentence for the top of the page."""
    if one.verdict == other.verdict:
        return f"{one.title} and {other.scope}."
    title = other.title if other.title.startswith("DPAR") else other.title[0].lower() + other.title[1:]
    return f"{one.title}; {title}."


def listed(words: Sequence[str]) -> str:
    """Join words as in a sentence: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capitalised(sentence: str) -> str:
    """Return a sentence that begins with a capital, unless it begins with the name of a score."""
    return sentence if "_" in sentence.split(" ")[0] else sentence[:1].upper() + sentence[1:]


def too_little_training(*, steps: int, seen: int, images: int) -> tuple[str, ...]:
    """Return why models were trained too little to be compared; nothing when they were not.

    seen: images in all batches together.
    images: in the training set.
    """
    if steps < FEWEST_STEPS:
        return (f"{steps} optimizer steps are too few to compare trained models (at least {FEWEST_STEPS})",)
    if seen < images:
        return (f"training saw {seen:,} images, less than one epoch of {images:,}",)
    return ()


def nothing_learned(dpar: float, baseline: float, chance: float) -> tuple[str, ...]:
    """Return why two models that are both worse on held-out images than a uniform guess are not compared.

    dpar, baseline: validation losses in nats per token.
    chance: ln V, the loss of a uniform guess.
    """
    if min(dpar, baseline) < chance:
        return ()
    return (
        f"the validation losses of both models ({dpar:.2f} and {baseline:.2f} nats per token) are above the {chance:.2f} of "
        "a uniform guess: they memorised the training images, or learned nothing",
    )


def judge(
    words: str, better: Literal["lower", "higher"], dpar: Estimate, baseline: Estimate, *, doubt: str = ""
) -> Comparison:
    """Compare two independent estimates; one is better when the intervals do not overlap.

    doubt: why this quantity cannot be judged; empty when it can.
    """
    if not doubt and (dpar.interval is None or baseline.interval is None):
        doubt = "no interval"
    if doubt:
        return Comparison(words, better, dpar, baseline, None, doubt, judged=False)
    assert dpar.interval is not None and baseline.interval is not None
    below, above = dpar.interval[1] < baseline.interval[0], dpar.interval[0] > baseline.interval[1]
    if not below and not above:
        return Comparison(words, better, dpar, baseline, None, "intervals overlap")
    return Comparison(
        words, better, dpar, baseline, "dpar" if below == (better == "lower") else "baseline", "intervals apart"
    )


def judge_losses(words: str, dpar: np.ndarray, baseline: np.ndarray) -> Comparison:
    """Compare losses (n,) in nats per token of the same n images by a paired bootstrap of the mean difference.

    One side is better when the interval of the difference excludes zero. Fewer than FEWEST_IMAGES are not judged.
    """
    picks = np.random.default_rng(0).integers(0, len(dpar), (RESAMPLES, len(dpar)))

    def estimate(values: np.ndarray) -> Estimate:
        low, high = np.percentile(values[picks].mean(axis=1), LEVEL)
        return Estimate(float(values.mean()), (float(low), float(high)))

    difference = estimate(dpar - baseline)
    assert difference.interval is not None
    low, high = difference.interval
    winner: Side | None = "dpar" if high < 0 else "baseline" if low > 0 else None
    why, judged = f"difference {difference.value:+.3f} ({low:+.3f} to {high:+.3f}) nats, paired by image", True
    if len(dpar) < FEWEST_IMAGES:
        winner, judged = None, False
        why = f"{len(dpar)} validation images are too few (at least {FEWEST_IMAGES})"
    return Comparison(words, "lower", estimate(dpar), estimate(baseline), winner, why, judged, difference)


def score_name(key: str) -> str:
    """Return how a score is called in words: eval/fd_demo -> fd_demo, eval/is -> IS."""
    name = key.removeprefix("eval/")
    return {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID"}.get(name, name)


# In the order of a table. Others (sFID, KID) are shown, but are not compared.
JUDGED = ("eval/fid", "eval/fd_", "eval/is", "eval/precision", "eval/recall")
HIGHER_IS_BETTER = ("eval/is", "eval/precision", "eval/recall")


def score_columns(scores: Scores) -> list[str]:
    """Return the names of scores that are compared, in the order of a table: distance, IS, precision, recall."""
    return [key for start in JUDGED for key in scores.values if key.startswith(start)]


def too_few_images(scores: Scores) -> str:
    """Return why a score file has too few images for its features; an empty text when it has enough.

    A covariance of d features has full rank only with more than d images on either side.
    """
    protocol, features = scores.protocol, scores.feature_count
    if not features:
        return "the score file does not say how many features an image has: run `dvc repro -sf score_dpar score_llamagen`"
    counts = [protocol.images, protocol.reference_images or features + 1]
    if min(counts) > features:
        return ""
    return f"{min(counts):,} images are too few for {features:,} features (singular covariance)"


def judge_scores(dpar: Scores, baseline: Scores) -> list[Comparison]:
    """Compare distance, IS, precision and recall of two score files.

    Raises ValueError when they were made under different protocols.
    """
    if dpar.protocol.id != baseline.protocol.id:
        raise ValueError(
            f"scores of protocols {dpar.protocol.id} and {baseline.protocol.id} are not compared: run "
            "`dpar-cli run score_dpar score_llamagen`"
        )
    doubt = too_few_images(dpar) or too_few_images(baseline)

    return [
        judge(
            score_name(key),
            "higher" if key.startswith(HIGHER_IS_BETTER) else "lower",
            Estimate(dpar.values[key], dpar.intervals.get(key)),
            Estimate(baseline.values[key], baseline.intervals.get(key)),
            doubt=doubt,
        )
        for key in score_columns(dpar)
        if key in baseline.values
    ]
