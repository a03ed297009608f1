"""Sums over runs of a chain's units: over all runs [i, j) at once, or over those that given cuts make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Runs(Protocol):
    """A set of runs; every method returns one number for each of them."""

    def sums(self, values: Sequence[float] | Array) -> Array:
        """The sum of a run's values."""
        ...

    def largest(self, values: Sequence[float] | Array) -> Array:
        """The largest of a run's values."""
        ...

    def last(self, values: Sequence[float] | Array) -> Array:
        """The value of a run's last unit."""
        ...

    def before(self, values: Sequence[float] | Array) -> Array:
        """The sum of the values of all units before a run."""
        ...


class AllRuns:
    """Entry (i, j) is the run [i, j) of `num_units` units; what is not above the diagonal means nothing."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units

    def sums(self, values: Sequence[float] | Array) -> Array:
        prefix = _prefix(values)
        found: Array = np.subtract.outer(-prefix, -prefix)
        return found

    def largest(self, values: Sequence[float] | Array) -> Array:
        table = np.zeros((self.num_units + 1, self.num_units + 1))
        for i in range(self.num_units):
            table[i, i + 1 :] = np.maximum.accumulate(np.asarray(values[i:], dtype=np.float64))
        return table

    def last(self, values: Sequence[float] | Array) -> Array:
        return np.concatenate([[0.0], np.asarray(values, dtype=np.float64)])

    def before(self, values: Sequence[float] | Array) -> Array:
        return _prefix(values)[:, None]


class GivenRuns:
    """The runs that begin at `cuts`, 0 first."""

    def __init__(self, cuts: Sequence[int], num_units: int) -> None:
        self.starts = np.array(cuts)
        self.stops = np.array([*cuts[1:], num_units])

    def sums(self, values: Sequence[float] | Array) -> Array:
        found: Array = np.add.reduceat(np.asarray(values, dtype=np.float64), self.starts)
        return found

    def largest(self, values: Sequence[float] | Array) -> Array:
        found: Array = np.maximum.reduceat(np.asarray(values, dtype=np.float64), self.starts)
        return found

    def last(self, values: Sequence[float] | Array) -> Array:
        found: Array = np.asarray(values, dtype=np.float64)[self.stops - 1]
        return found

    def before(self, values: Sequence[float] | Array) -> Array:
        found: Array = _prefix(values)[self.starts]
        return found


class RankRuns:
    """What is on each pipeline rank of several stages, of which `ranks` tells the rank; the first of them
    comes first."""

    def __init__(self, cuts: Sequence[int], ranks: Sequence[int], num_units: int) -> None:
        self.stages = GivenRuns(cuts, num_units)
        self.ranks = np.array(ranks)
        self.num_ranks = max(ranks) + 1

    def sums(self, values: Sequence[float] | Array) -> Array:
        return np.bincount(self.ranks, self.stages.sums(values)).astype(np.float64)

    def largest(self, values: Sequence[float] | Array) -> Array:
        return self._largest(self.stages.largest(values))

    def last(self, values: Sequence[float] | Array) -> Array:
        """The largest of those of its stages."""
        return self._largest(self.stages.last(values))

    def before(self, values: Sequence[float] | Array) -> Array:
        """The sum of the values before its first stage."""
        return self.stages.before(values)[: self.num_ranks]

    def _largest(self, values: Array) -> Array:
        found = np.zeros(self.num_ranks)
        np.maximum.at(found, self.ranks, values)
        return found


def _prefix(values: Sequence[float] | Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])
