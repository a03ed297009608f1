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
        found = (Repeat(start, period, number_of(start, period)) for period in range(1, MAX_PERIOD + 1))
        long = [repeat for repeat in found if repeat.number >= MIN_INSTANCES]
        if not long:
            start += 1
            continue
        best = max(long, key=lambda repeat: (repeat.number - MIN_INSTANCES + 1) * repeat.period)
        yield best
        start = best.stop
