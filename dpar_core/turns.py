"""Two programs timed in turns on one machine, so that whatever slows the machine for a while slows both of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

LEAST, MOST = 6, 40  # turns of each; six are the fewest whose extremes enclose the median with 95 % confidence
SHORTEST = 0.1  # seconds of a turn: shorter work is repeated within its turn
NARROW = 0.03  # width of the interval, as a share of the ratio, at which measuring ends early
WIDE, PATIENCE = 0.10, 3  # as long as the interval reaches further from the ratio, up to so many times as long is measured
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Turns:
    """Seconds per unit of work of two programs.

    first, second: (n,) seconds; first[i] and second[i] were measured one right after the other.
    Raises ValueError for fewer than two turns, for lists of different lengths and for times that are not positive.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.first) != len(self.second) or len(self.first) < 2:
            raise ValueError(f"turns must be two lists of one length, 2 or more; got {len(self.first)}, {len(self.second)}")
        if not all(seconds > 0 and math.isfinite(seconds) for seconds in (*self.first, *self.second)):
            raise ValueError("turns must take more than zero seconds each")

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the second the first was, turn by turn."""
        return [other / one for one, other in zip(self.first, self.second)]

    @property
    def ratio(self) -> float:
        """How many times as fast as the second the first is: the median over the turns."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the ratio, from order statistics: no distribution is assumed.

        Fewer than six turns cannot reach 95 %: then it is their whole range.
        """
        ordered = sorted(self.ratios)
        rank = median_rank(len(ordered))
        return ordered[rank], ordered[-1 - rank]

    @property
    def spread(self) -> float:
        """By how much the interval reaches from the ratio, as a share of it."""
        return max(abs(end / self.ratio - 1) for end in self.interval)

    @property
    def drift(self) -> tuple[float, float]:
        """By how much the pace of each program moved, as a share: the largest distance of the median of a third of the
        turns from the median of all of them."""
        return _drift(self.first), _drift(self.second)


def median_rank(count: int) -> int:
    """Return how many of `count` ordered values lie outside each end of the 95 % interval of their median."""
    rank, outside = 0, 0.5**count
    while True:
        outside += math.comb(count, rank + 1) * 0.5**count
        if 1 - 2 * outside < CONFIDENCE:
            return rank
        rank += 1


def _drift(seconds: tuple[float, ...]) -> float:
    middle, third = statistics.median(seconds), max(len(seconds) // 3, 1)
    parts = (seconds[:third], seconds[third:-third] or seconds, seconds[-third:])
    return max(abs(statistics.median(part) / middle - 1) for part in parts)


def take_turns(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    seconds: float,
    units: int = 1,
    most: int = MOST,
    wait: Callable[[], object] = lambda: None,
    progress: Callable[[float], object] = lambda spent: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Run two programs in turns and return the seconds per unit of work of each. units: of work in one call.

    Each is called once to warm up and once to see how often it has to be repeated for a turn of SHORTEST. Who goes first
    alternates. Ends after `seconds` (PATIENCE times as many where the interval is still WIDE, and not before LEAST turns),
    after `most` turns, or when the interval is NARROW.
    wait: returns when the device has finished what was asked of it.
    progress: called with the seconds of each pair of turns.
    """
    both = (first, second)

    def timed(program: Callable[[], object], repeats: int) -> float:
        started = clock()
        for _ in range(repeats):
            program()
        wait()
        return (clock() - started) / (repeats * units)

    for program in both:
        timed(program, 1)
    repeats = [max(math.ceil(SHORTEST / max(timed(program, 1) * units, 1e-6)), 1) for program in both]
    spent: tuple[list[float], list[float]] = ([], [])
    began = clock()
    while len(spent[0]) < max(min(most, MOST), LEAST):
        started = clock()
        for which in (0, 1) if len(spent[0]) % 2 == 0 else (1, 0):
            spent[which].append(timed(both[which], repeats[which]))
        progress(clock() - started)
        if len(spent[0]) >= LEAST:
            turns = Turns(tuple(spent[0]), tuple(spent[1]))
            low, high = turns.interval
            limit = seconds * (PATIENCE if turns.spread > WIDE else 1)
            if clock() - began >= limit or (len(spent[0]) >= 2 * LEAST and high - low <= NARROW * turns.ratio):
                break
    return Turns(tuple(spent[0]), tuple(spent[1]))
