"""A verdict needs intervals that exclude zero, enough images and enough training; without them the reason is given."""

import numpy as np
import pytest

from dpar_core.evaluation.protocol import Interval, Protocol, Scores
from pipeline.report.verdicts import (
    Contest,
    Estimate,
    judge,
    judge_losses,
    judge_scores,
    listed,
    nothing_learned,
    score_columns,
    together,
    too_few_images,
    too_little_training,
)


def scores(fd=(20.0, 19.0, 21.0), is_=(3.0, 2.8, 3.2), precision=0.5, splits=10, images=450, reference=2250, features=64):
    values = {"kid_demo": 0.1, "recall": 0.2, "precision": precision, "is_demo": is_[0], "fd_demo": fd[0]}
    protocol = Protocol("demo", "f", "train", "r", reference, images, 32, 32, ("png",), 3, splits)
    intervals = {"eval/fd_demo": Interval(*fd[1:]), "eval/is_demo": Interval(*is_[1:])}
    return Scores({f"eval/{name}": value for name, value in values.items()}, intervals, protocol, {}, features)


def test_one_side_wins_only_when_the_intervals_do_not_overlap():
    low, high, between = Estimate(1.0, (0.5, 1.5)), Estimate(3.0, (2.5, 3.5)), Estimate(1.8, (1.2, 2.6))
    assert judge("fd", "lower", low, high).winner == "dpar"
    assert judge("fd", "lower", high, low).winner == "baseline"
    assert judge("is", "higher", low, high).winner == "baseline"
    assert judge("is", "higher", high, low).winner == "dpar"
    assert judge("fd", "lower", low, between).winner is judge("fd", "lower", between, high).winner is None


def test_a_value_without_interval_never_wins():
    row = judge("precision", "higher", Estimate(0.9), Estimate(0.1))
    assert row.winner is None and not row.judged


def test_losses_are_compared_image_by_image():
    rng = np.random.default_rng(1)
    hard = rng.normal(4.0, 1.0, 200)
    row = judge_losses("loss", hard, hard + rng.normal(0.05, 0.02, 200))
    # The images differ far more than the models do, so only pairs can tell the models apart.
    assert row.dpar.interval[1] > row.baseline.interval[0]
    assert row.winner == "dpar"
    assert judge_losses("loss", hard, hard + rng.normal(0.0, 0.2, 200)).winner is None
    assert judge_losses("loss", hard + 0.05, hard).winner == "baseline"


def test_losses_of_a_few_images_are_not_judged():
    row = judge_losses("loss", np.array([1.0, 2.0]), np.array([1.1, 2.4]))  # whose bootstrap is all below zero
    assert row.difference.interval[1] < 0
    assert row.winner is None and not row.judged
    assert row.why == "2 validation images are too few (at least 20)"


def test_the_same_losses_give_the_same_verdict_every_time():
    one, other = np.random.default_rng(2).normal(3, 1, (2, 50))
    assert judge_losses("loss", one, other) == judge_losses("loss", one, other)


def test_scores_are_judged_in_the_order_of_the_table_and_others_left_out():
    assert score_columns(scores()) == ["eval/fd_demo", "eval/is_demo", "eval/precision", "eval/recall"]
    rows = judge_scores(scores(fd=(10.0, 9.0, 11.0)), scores(is_=(5.0, 4.8, 5.2)))
    assert [row.words for row in rows] == ["fd_demo", "is_demo", "precision", "recall"]
    assert [row.winner for row in rows] == ["dpar", "baseline", None, None]


def test_scores_of_different_protocols_are_not_compared():
    ids = [scores().protocol.id, scores(splits=5).protocol.id]
    with pytest.raises(ValueError, match="protocols {} and {} are not compared".format(*ids)):
        judge_scores(scores(), scores(splits=5))


def contest(dpar, baseline, when="at equal steps", obstacles=()):
    return Contest(when, tuple(judge_scores(dpar, baseline)), obstacles)


def test_the_title_gives_the_verdict():
    better, worse = scores(fd=(10.0, 9.0, 11.0)), scores()
    assert contest(better, worse).title == "DPAR is better at equal steps (fd_demo)"
    assert contest(worse, better).title == "The baseline is better at equal steps (fd_demo)"
    assert contest(scores(fd=(10.0, 9.0, 11.0), is_=(9.0, 8.8, 9.2)), worse).title == "DPAR is better at equal steps"
    assert contest(worse, worse).title == "No clear difference at equal steps"
    split = contest(better, scores(is_=(5.0, 4.8, 5.2)))
    assert split.title == "Each model is better in something at equal steps"
    assert split.sentence == (
        "DPAR is better in fd_demo; the baseline is better in is_demo; precision and recall are not judged: no interval."
    )


def test_an_obstacle_leaves_no_verdict_and_is_the_sentence():
    blocked = contest(scores(fd=(10.0, 9.0, 11.0)), scores(), obstacles=("the machine was busy",))
    assert blocked.winner is None and not blocked.judged
    assert (blocked.title, blocked.sentence) == ("No verdict at equal steps", "The machine was busy.")


def test_fewer_images_than_features_judge_no_score():
    few = scores(fd=(10.0, 9.0, 11.0), images=64)
    assert too_few_images(few) == "64 images are too few for 64 features (singular covariance)"
    assert not too_few_images(scores(images=65)) and "does not say how many" in too_few_images(scores(features=0))
    rows = judge_scores(few, scores(images=64))
    assert [row.winner for row in rows] == [None] * 4 and not any(row.judged for row in rows)
    shown = Contest("at equal steps", tuple(rows))
    assert shown.title == "No verdict at equal steps"
    assert shown.sentence == (
        "fd_demo, is_demo, precision and recall are not judged: 64 images are too few for 64 features (singular covariance)."
    )


def test_a_reference_of_too_few_images_judges_no_score_either():
    assert too_few_images(scores(reference=30)) == "30 images are too few for 64 features (singular covariance)"


def test_too_little_training_is_no_ground_for_a_verdict():
    assert too_little_training(steps=12, seen=10**6, images=10) == (
        "12 optimizer steps are too few to compare trained models (at least 100)",
    )
    assert too_little_training(steps=100, seen=3200, images=4500) == (
        "training saw 3,200 images, less than one epoch of 4,500",
    )
    assert too_little_training(steps=480, seen=15360, images=2250) == ()


def test_models_that_are_both_worse_than_a_guess_are_not_compared():
    (why,) = nothing_learned(8.38, 6.65, 6.24)
    assert why.startswith("the validation losses of both models (8.38 and 6.65 nats per token) are above the 6.24 of a")
    assert nothing_learned(8.38, 6.2, 6.24) == nothing_learned(3.1, 3.5, 6.24) == ()


def test_both_verdicts_make_one_headline():
    better, worse = scores(fd=(10.0, 9.0, 11.0)), scores()
    first = contest(better, worse)
    same = contest(better, worse, "at equal time")
    assert together(first, same) == "DPAR is better at equal steps (fd_demo) and at equal time (fd_demo)."
    lost = contest(worse, better, "at equal time")
    headline = "DPAR is better at equal steps (fd_demo); the baseline is better at equal time (fd_demo)."
    assert together(first, lost) == headline
    even, late = contest(worse, worse), contest(better, worse, "at equal time")
    assert together(even, late) == "No clear difference at equal steps; DPAR is better at equal time (fd_demo)."
    blocked = contest(better, worse, "at equal time", ("the machine was busy",))
    assert together(first, blocked) == "DPAR is better at equal steps (fd_demo); no verdict at equal time."


def test_lists_read_as_sentences():
    assert [listed(w) for w in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
