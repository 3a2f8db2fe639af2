"""Programs timed in turns: the ratio, its interval and the drift of the pace, on a clock that the test moves."""

import math

import numpy as np
import pytest

from dpar_core.turns import LEAST, PATIENCE, WIDE, Turns, median_rank, take_turns


class Clock:
    """A clock that programs move on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def program(self, seconds):
        def run():
            self.now += seconds() if callable(seconds) else seconds

        return run


def measured(first, second, *, clock, **settings) -> Turns:
    return take_turns(clock.program(first), clock.program(second), clock=clock, seconds=60.0, **settings)


def test_the_ratio_says_how_many_times_as_fast_the_first_is():
    turns = measured(0.5, 0.7, clock=Clock())
    assert turns.ratio == pytest.approx(1.4) and turns.interval == pytest.approx((1.4, 1.4))
    assert turns.drift == pytest.approx((0.0, 0.0), abs=1e-9)


def test_short_work_is_repeated_and_counted_once_per_unit():
    turns = measured(0.002, 0.004, clock=Clock(), units=4)
    assert turns.first[0] == pytest.approx(0.0005) and turns.ratio == pytest.approx(2.0)


def test_what_slows_the_machine_slows_both_and_leaves_the_ratio():
    clock = Clock()

    def slowing(seconds):
        return lambda: seconds * (1 + clock.now / 40)

    turns = measured(slowing(1.0), slowing(1.3), clock=clock)
    assert turns.ratio == pytest.approx(1.3, rel=0.03)
    assert min(turns.drift) > 0.2


def test_measuring_ends_when_its_time_is_up_but_not_before_it_means_something():
    random = np.random.default_rng(0)
    clock = Clock()
    turns = take_turns(
        clock.program(lambda: random.uniform(5, 15)), clock.program(lambda: random.uniform(5, 15)), clock=clock, seconds=1.0
    )
    assert len(turns.first) == LEAST


@pytest.mark.parametrize("noise, fewest, most", [(0.001, 6, 10), (0.3, 20, 40)])
def test_a_ratio_that_is_known_too_roughly_is_measured_for_longer(noise, fewest, most):
    random, clock = np.random.default_rng(0), Clock()
    programs = [clock.program(lambda: random.lognormal(0.0, noise)) for _ in range(2)]
    turns = take_turns(*programs, clock=clock, seconds=16.0, most=1000)
    assert fewest <= len(turns.first) <= most
    assert turns.spread <= WIDE or clock.now > PATIENCE * 16


@pytest.mark.parametrize("most, turns", [(2, LEAST), (9, 9)])
def test_no_more_turns_are_taken_than_asked_for_but_enough_to_mean_something(most, turns):
    random, clock = np.random.default_rng(0), Clock()
    programs = [clock.program(lambda: random.uniform(0.1, 0.3)) for _ in range(2)]
    assert len(take_turns(*programs, clock=clock, seconds=1e9, most=most).first) == turns


def test_the_interval_holds_the_median_in_95_of_100_experiments():
    random = np.random.default_rng(1)
    for count in (6, 12, 25):
        held = 0
        for _ in range(2000):
            ratios = random.lognormal(0.3, 0.2, count)
            low, high = Turns(tuple([1.0] * count), tuple(ratios)).interval
            held += low <= math.exp(0.3) <= high
        assert held / 2000 > 0.94
    assert [median_rank(count) for count in (2, 6, 9, 12, 20)] == [0, 0, 1, 2, 5]


@pytest.mark.parametrize(
    "turns", [((1.0, 2.0), (1.0,)), ((1.0,), (1.0,)), ((1.0, 0.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, math.nan))]
)
def test_turns_that_mean_nothing_are_refused(turns):
    with pytest.raises(ValueError, match="turns must"):
        Turns(*turns)
