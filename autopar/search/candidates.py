"""The candidates of a search: the ways to run its layouts, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING

from autopar.plan import Parallelism
from autopar.search.bounds import States
from autopar.search.space import Layout, Scheduled, schedules, shardings
from costmodel.orders import OVERLAPPING_SCHEDULES

if TYPE_CHECKING:
    from autopar.search.planner import Planner


class Candidates:
    """All ways to run some layouts on a planner's cluster, within its pins."""

    def __init__(self, planner: Planner, layouts: tuple[Layout, ...]) -> None:
        self.planner = planner
        self.layouts = layouts
        self._ways: dict[object, tuple[Parallelism, ...]] = {}
        self._states: dict[object, States] = {}
        self._numbers: dict[object, int] = {}

    def schedules(self, layout: Layout, *, overlapping: bool | None = None) -> Iterator[Scheduled]:
        """A layout with each of its schedules, or with those that hide communication, or the others."""
        for scheduled in schedules(layout, self.planner.degrees, self.planner.pins):
            if overlapping is None or overlapping is (scheduled.schedule in OVERLAPPING_SCHEDULES):
                yield scheduled

    def of(self, scheduled: Scheduled) -> Iterator[Parallelism]:
        """The ways to run a layout with a schedule."""
        return _scheduled(self._sharded(scheduled), scheduled)

    def fitting(self, scheduled: Scheduled) -> Iterator[Parallelism]:
        """Those for which memory may suffice."""
        ways, key = self._sharded(scheduled), _degrees(scheduled.layout)
        if key not in self._states:
            self._states[key] = self.planner.bounds.states(ways)
        fits = self.planner.way_floors.ways_may_fit(scheduled, self._states[key])
        return _scheduled(compress(ways, fits), scheduled)

    def num_shardings(self, scheduled: Scheduled) -> int:
        """How many `of` are."""
        return len(self._sharded(scheduled))

    def _sharded(self, scheduled: Scheduled) -> tuple[Parallelism, ...]:
        """The ways to shard the data axes under these degrees; microbatches and schedule do not matter."""
        key = _degrees(scheduled.layout)
        if key not in self._ways:
            planner = self.planner
            self._ways[key] = tuple(shardings(scheduled, planner.cluster, planner.degrees, planner.pins))
        return self._ways[key]

    def number(self, layout: Layout, *, overlapping: bool | None = None) -> int:
        """How many ways there are to run a layout, or with a schedule that hides communication, or not."""
        key = (*layout[1:], overlapping)  # as many for every microbatch size
        if key not in self._numbers:
            found = self.schedules(layout, overlapping=overlapping)
            self._numbers[key] = sum(map(self.num_shardings, found))
        return self._numbers[key]

    @cached_property
    def total(self) -> int:
        """How many there are of all layouts."""
        return sum(map(self.number, self.layouts))


def _degrees(layout: Layout) -> tuple[int, ...]:
    """A layout but for its microbatches."""
    return layout.tp, layout.cp, layout.ep, layout.pp, layout.dp


def _scheduled(ways: Iterable[Parallelism], scheduled: Scheduled) -> Iterator[Parallelism]:
    """Ways with other microbatches and another schedule."""
    settings = scheduled.settings
    return (way.model_copy(update=settings) for way in ways)
