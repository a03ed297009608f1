"""The candidates of a search: the ways to run its layouts, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.plan import Parallelism
from autopar.search.space import Layout, ways
from costmodel.orders import OVERLAPPING_SCHEDULES

if TYPE_CHECKING:
    from autopar.search.planner import Planner


class Candidates:
    """All ways to run some layouts on a planner's cluster, within its pins."""

    def __init__(self, planner: Planner, layouts: tuple[Layout, ...]) -> None:
        self.planner = planner
        self.layouts = layouts
        self._numbers: dict[object, int] = {}

    def of(self, layout: Layout, *, overlapping: bool | None = None) -> Iterator[Parallelism]:
        """The ways to run a layout, or those whose schedule hides communication, or the others."""
        for p in ways(layout, self.planner.cluster, self.planner.degrees, self.planner.pins):
            if overlapping is None or overlapping is (p.schedule in OVERLAPPING_SCHEDULES):
                yield p

    def fitting(self, layout: Layout, *, overlapping: bool) -> Iterator[Parallelism]:
        """Those for which memory may suffice."""
        return filter(self.planner.way_floors.way_may_fit, self.of(layout, overlapping=overlapping))

    def number(self, layout: Layout, *, overlapping: bool | None = None) -> int:
        """How many `of` are."""
        key = (*layout[1:], overlapping)  # as many for every microbatch size
        if key not in self._numbers:
            self._numbers[key] = sum(1 for _ in self.of(layout, overlapping=overlapping))
        return self._numbers[key]

    @cached_property
    def total(self) -> int:
        """How many there are of all layouts."""
        return sum(map(self.number, self.layouts))
