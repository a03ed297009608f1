"""Where a sequence repeats itself: runs of instances of one period, as are layers of one kind, or of several
in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

MIN_INSTANCES = 5
"""A run of fewer is not worth shortening: up to four of its instances stay."""

MAX_PERIOD = 8
"""Elements of an instance at most: as many as the longest patterns of layers in use have."""


class Repeat(NamedTuple):
    """`number` instances of `period` elements each, the first of which begins at `start`."""

    start: int
    period: int
    number: int

    @property
    def stop(self) -> int:
        """The first element after it."""
        return self.start + self.period * self.number


def periodic(length: int, number_of: Callable[[int, int], int]) -> Iterator[Repeat]:
    """The runs of a sequence, first come first served, each of the period that leaves out most elements, and
    of these the shortest.

    `number_of` tells how many instances of a period, the second argument, are alike from an element on.
    """
    start = 0
    while start < length:
        best: Repeat | None = None
        for period in range(1, MAX_PERIOD + 1):
            most_left_out = length - start - (MIN_INSTANCES - 1) * period
            if best and most_left_out <= _left_out(best.period, best.number):
                break  # and longer periods leave out less
            number = number_of(start, period)
            if number >= MIN_INSTANCES and (
                not best or _left_out(period, number) > _left_out(best.period, best.number)
            ):
                best = Repeat(start, period, number)
        if best:
            yield best
        start = best.stop if best else start + 1


def _left_out(period: int, number: int) -> int:
    """How many elements of a run need not be looked at."""
    return (number - MIN_INSTANCES + 1) * period
