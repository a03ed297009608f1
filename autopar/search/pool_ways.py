"""The ways to shard a leg of a route over its data axes, and what its stages take in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from autopar.plan import Parallelism
from autopar.search.data_axes import least_accumulation_s
from autopar.search.pool_cuts import LegTimes
from autopar.search.run_sums import RunSums
from autopar.search.runs import Array
from autopar.search.stage_costs import Machine, Once, fitted_times, moved_once, room_bytes
from autopar.search.stage_table import StageTable
from autopar.search.stage_times import StageTimes
from autopar.search.stages import Where, legal
from costmodel import Overlap


class Way(NamedTuple):
    """A way to shard a leg: the seconds in which each gradient of a microbatch is added to those before, the
    sums of all runs of units with that, what the data axes and the optimizer add to each unit, and the bytes
    that model states leave each run for activations."""

    number: int
    accumulation_s: float
    sums: RunSums
    once: Once
    room_bytes: Array

    @property
    def unlimited(self) -> Way:
        """The same with memory without end."""
        return self._replace(room_bytes=np.full_like(self.room_bytes, np.inf))

    def is_as_good_as(self, other: Way) -> bool:
        """Whether it is nowhere slower and nowhere holds more."""
        is_as_fast = all(np.all(a <= b * (1 + 1e-12)) for a, b in zip(self.once, other.once, strict=True))
        adds_as_fast = self.accumulation_s <= other.accumulation_s
        return is_as_fast and adds_as_fast and bool(np.all(self.room_bytes >= other.room_bytes))


def useful_ways(table: StageTable, offered: Iterable[tuple[Parallelism, Machine]]) -> tuple[Way, ...]:
    """The ways to run the leg with these units, but those that another is as good as in time and memory."""
    ways: list[Way] = []
    for number, (p, machine) in enumerate(offered):
        accumulation_s = least_accumulation_s(p, machine.policy, machine.pricer)
        sums = table.all_runs.accumulating(accumulation_s)
        room = room_bytes(table, sums, p, machine)
        way = Way(number, accumulation_s, sums, moved_once(table, p, machine), room)
        if not any(other.is_as_good_as(way) for other in ways):
            ways = [other for other in ways if not way.is_as_good_as(other)] + [way]
    return tuple(ways)


def alike(ways: Iterable[Way]) -> list[list[Way]]:
    """The ways that add gradients up equally fast."""
    groups: dict[float, list[Way]] = {}
    for way in ways:
        groups.setdefault(way.accumulation_s, []).append(way)
    return list(groups.values())


def leg_times(table: StageTable, ways: Iterable[Way], num_stages: int) -> LegTimes:
    """What units take at least, run in any of these ways."""
    accumulation_s = min(way.accumulation_s for way in ways)
    backward_s = table.unit_backward_s + accumulation_s * np.sum(table.unit_elements, axis=0)
    return LegTimes.of(table.unit_forward_s, backward_s, num_stages)


def stage(way: Way, flight: int, overlap: Overlap, where: Where) -> StageTimes:
    """What all runs take as stages with so many microbatches in flight, where they may be stages."""
    times = fitted_times(way.sums, way.once, overlap, way.room_bytes / flight)
    return times._replace(microbatch_s=legal(times.microbatch_s, where))


def fastest(ways: Sequence[StageTimes]) -> StageTimes:
    """What no way undercuts: a longer forward makes a stage with as much to do only earlier."""
    return StageTimes(
        np.min([way.microbatch_s for way in ways], axis=0),
        np.max([way.forward_s for way in ways], axis=0),
        np.min([way.once_s for way in ways], axis=0),
    )
