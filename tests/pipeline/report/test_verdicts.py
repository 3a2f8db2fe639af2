"""Who wins is decided by intervals, and said in plain words."""

import numpy as np
import pytest

from pipeline.report.verdicts import Contest, Estimate, judge, judge_losses, judge_scores, listed, score_columns, together


def scores(fd=(20.0, 19.0, 21.0), is_=(3.0, 2.8, 3.2), precision=0.5, protocol="p1"):
    return {
        "eval/kid_demo": 0.1, "eval/recall": 0.2, "eval/precision": precision, "eval/is_demo": is_[0], "eval/fd_demo": fd[0],
        "intervals": {"eval/fd_demo": list(fd[1:]), "eval/is_demo": list(is_[1:])}, "protocol_id": protocol,
    }  # fmt: skip


def test_one_side_wins_only_when_the_intervals_do_not_overlap():
    low, high, between = Estimate(1.0, (0.5, 1.5)), Estimate(3.0, (2.5, 3.5)), Estimate(1.8, (1.2, 2.6))
    assert judge("fd", "lower", low, high).winner == "dpar"
    assert judge("fd", "lower", high, low).winner == "twin"
    assert judge("is", "higher", low, high).winner == "twin"
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
    assert row.dpar.interval[1] > row.twin.interval[0]
    assert row.winner == "dpar"
    assert judge_losses("loss", hard, hard + rng.normal(0.0, 0.2, 200)).winner is None
    assert judge_losses("loss", hard + 0.05, hard).winner == "twin"


def test_the_same_losses_give_the_same_verdict_every_time():
    one, other = np.random.default_rng(2).normal(3, 1, (2, 50))
    assert judge_losses("loss", one, other) == judge_losses("loss", one, other)


def test_scores_are_judged_in_the_order_of_the_table_and_others_left_out():
    assert score_columns(scores()) == ["eval/fd_demo", "eval/is_demo", "eval/precision", "eval/recall"]
    rows = judge_scores(scores(fd=(10.0, 9.0, 11.0)), scores(is_=(5.0, 4.8, 5.2)))
    assert [row.words for row in rows] == ["fd_demo", "is_demo", "precision", "recall"]
    assert [row.winner for row in rows] == ["dpar", "twin", None, None]


def test_scores_of_different_protocols_are_not_compared():
    with pytest.raises(ValueError, match="protocols p1 and p2 are not compared"):
        judge_scores(scores(), scores(protocol="p2"))


def test_the_title_says_who_wins():
    def contest(dpar, twin):
        return Contest("at equal steps", tuple(judge_scores(dpar, twin)))

    better, worse = scores(fd=(10.0, 9.0, 11.0)), scores()
    assert contest(better, worse).title == "DPAR wins at equal steps"
    assert contest(worse, better).title == "The twin wins at equal steps"
    assert contest(worse, worse).title == "No clear winner at equal steps"
    split = contest(better, scores(is_=(5.0, 4.8, 5.2)))
    assert split.title == "A split decision at equal steps"
    assert split.sentence == (
        "DPAR is better in fd_demo; the twin is better in is_demo; precision and recall have no interval and no vote."
    )


def test_a_lead_with_more_training_time_does_not_count_and_a_win_against_it_does():
    rows = tuple(judge_scores(scores(fd=(10.0, 9.0, 11.0)), scores(is_=(5.0, 4.8, 5.2))))
    unequal = Contest("at equal training time", rows, "dpar", "40 % more training time")
    assert unequal.title == "The twin wins at equal training time"
    assert [row.winner for row in unequal.rows] == [None, "twin", None, None]
    assert unequal.sentence == (
        "The twin is better in is_demo, though DPAR had 40 % more training time; that DPAR is ahead in fd_demo does not "
        "count, as it had 40 % more training time; precision and recall have no interval and no vote."
    )
    ahead = Contest("at equal training time", rows[:1], "dpar", "40 % more training time")
    assert ahead.title == "No clear winner at equal training time"


def test_both_verdicts_make_one_headline():
    better, worse = scores(fd=(10.0, 9.0, 11.0)), scores()

    def contest(dpar, twin, when):
        return Contest(when, tuple(judge_scores(dpar, twin)))

    first = contest(better, worse, "at equal steps")
    assert together(first, contest(better, worse, "at equal time")) == "DPAR wins at equal steps and at equal time."
    lost = contest(worse, better, "at equal time")
    assert together(first, lost) == "DPAR wins at equal steps; the twin wins at equal time."
    even, late = contest(worse, worse, "at equal steps"), contest(better, worse, "at equal time")
    assert together(even, late) == "No clear winner at equal steps; DPAR wins at equal time."


def test_lists_read_as_sentences():
    assert [listed(w) for w in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
