"""The candidates of a search: the ways to run its layouts, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.plan import Parallelism
from autopar.search.space import Layout, Scheduled, schedules, shardings
from costmodel.orders import OVERLAPPING_SCHEDULES

if TYPE_CHECKING:
    from autopar.search.planner import Planner


class Candidates:
    """All ways to run some layouts on a planner's cluster, within its pins."""

    def __init__(self, planner: Planner, layouts: tuple[Layout, ...]) -> None:
        self.planner = planner
        self.layouts = layouts
        self._num_shardings: dict[object, int] = {}
        self._numbers: dict[object, int] = {}

    def schedules(self, layout: Layout, *, overlapping: bool | None = None) -> Iterator[Scheduled]:
        """A layout with each of its schedules, or with those that hide communication, or the others."""
        for scheduled in schedules(layout, self.planner.degrees, self.planner.pins):
            if overlapping is None or overlapping is (scheduled.schedule in OVERLAPPING_SCHEDULES):
                yield scheduled

    def of(self, scheduled: Scheduled) -> Iterator[Parallelism]:
        """The ways to run a layout with a schedule."""
        planner = self.planner
        return shardings(scheduled, planner.cluster, planner.degrees, planner.pins)

    def fitting(self, scheduled: Scheduled) -> Iterator[Parallelism]:
        """Those for which memory may suffice."""
        return filter(self.planner.way_floors.way_may_fit, self.of(scheduled))

    def num_shardings(self, scheduled: Scheduled) -> int:
        """How many `of` are: as many for every microbatch size and schedule."""
        _, tp, cp, ep, pp, dp, _ = scheduled.layout
        key = tp, cp, ep, pp, dp
        if key not in self._num_shardings:
            self._num_shardings[key] = sum(1 for _ in self.of(scheduled))
        return self._num_shardings[key]

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
