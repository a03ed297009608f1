"""What no cuts of a route through pools can undercut, and the cuts that come nearest.

The sums are those of each leg's own table (`autopar.search.stages`), the cuts `autopar.search.pool_cuts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from autopar.plan import Parallelism
from autopar.search.effort import clocked, cut_size
from autopar.search.pool_cuts import LegTimes, RouteCut, best_cuts, seam_floors
from autopar.search.pool_legs import Legs
from autopar.search.pool_routes import SCHEDULE, Leg, Route
from autopar.search.runs import AllRuns, Array
from autopar.search.stage_times import StageTimes
from autopar.search.stages import Machine, Once, RunSums, StageTable, Where, relief_s
from costmodel import Overlap, peak_in_flight


class Way(NamedTuple):
    """A way to shard a leg: what its data axes and the optimizer add to each unit, the seconds in which each
    adds a microbatch's gradients to those before, and the bytes that model states leave for activations of
    each run of units."""

    number: int
    once: Once
    accumulation_s: Array
    room_bytes: Array

    @property
    def unlimited(self) -> Way:
        """The same with memory without end."""
        return self._replace(room_bytes=np.full_like(self.room_bytes, np.inf))


class LegTable(StageTable):
    """The stages that a leg can be cut into."""

    @cached_property
    def sums(self) -> RunSums:
        """The sums over all runs of units."""
        return RunSums(self, AllRuns(self.num_units))

    def way(self, number: int, p: Parallelism, machine: Machine) -> Way:
        """What a way to shard the leg moves and leaves free."""
        held_bytes = self._held_bytes(self.sums, p, machine.policy)
        room_bytes = (machine.memory_bytes - held_bytes) / self._wasteful
        return Way(number, self._once(p, machine), self._accumulation_s(p, machine), room_bytes)

    def _accumulation_s(self, p: Parallelism, machine: Machine) -> Array:
        """As `autopar.search.evaluate` counts it."""
        elements = np.sum(self.unit_elements, axis=0)
        if self.chain.era.fused_gradient_accumulation or p.num_microbatches == 1:
            return np.zeros_like(elements)
        per_element = machine.policy.parameter_bytes + 2 * machine.policy.gradient_bytes
        rate = machine.pricer.work_s(0, 1e12, torch.float32) / 1e12
        held: Array = rate * per_element * elements / (p.dp_shard if p.zero_stage >= 2 else 1)
        return held

    def times(self, ways: Sequence[Way], num_stages: int) -> LegTimes:
        """What units take at least, run in any of these ways."""
        accumulation_s = np.min([way.accumulation_s for way in ways], axis=0)
        return LegTimes.of(self.unit_forward_s, self.unit_backward_s + accumulation_s, num_stages)

    def stage(self, way: Way, flight: int, overlap: Overlap, where: Where) -> StageTimes:
        """The stages with so many microbatches in flight."""
        sums = self.sums
        more_s = relief_s(sums.segments, sums.saved_bytes - way.room_bytes / flight)
        more_s += sums.runs.sums(way.accumulation_s)
        if where is not None:
            more_s[~where] = np.inf
        return self._times(sums, way.once, overlap, more_s)


class RouteCuts:
    """Cuts routes; what legs have in common is worked out once."""

    def __init__(self, legs: Legs) -> None:
        self.legs = legs
        self.effort = legs.effort
        self._tables: dict[tuple[Leg, int], LegTable] = {}
        self._ways: dict[tuple[Leg, int], tuple[Way, ...]] = {}
        self._times: dict[tuple[Leg, int], LegTimes] = {}
        self._best: dict[tuple[Leg, int, int | None], StageTimes] = {}

    def floor_s(self, route: Route, price: int) -> float:
        """No step takes less, whatever memory costs; infinite for too few units."""
        times = [
            replace(self._leg_times(leg, price), send_s=self.legs.sends_s(route, number, price))
            for number, leg in enumerate(route.legs)
        ]
        floors_s, _ = seam_floors(times, route.num_microbatches)
        return float(floors_s.min(initial=np.inf)) + self._overhead_s

    @clocked("stages")
    def least_s(self, route: Route, price: int, cutoff_s: float, *, fitting: bool = True) -> float:
        """No step takes less, were each stage run in the way that suits it best; infinite for nothing below
        the cutoff. Without `fitting` memory is no matter."""
        times = [
            replace(
                self._leg_times(leg, price),
                send_s=self.legs.sends_s(route, number, price),
                in_flight=_flights(route, number),
                ways=[self._best_stages(route, number, price, fitting)],
            )
            for number, leg in enumerate(route.legs)
        ]
        found = self._cut(times, route, cutoff_s - self._overhead_s)
        return float("inf") if found is None else found.bound_s + self._overhead_s

    @clocked("stages")
    def cut(self, route: Route, price: int, cutoff_s: float) -> RouteCut | None:
        """The best cuts and the best way to shard each leg, with the bound of the relaxation: no others are
        below both that and the cutoff.

        None where nothing fits memory, or nothing is below the cutoff. Ways that shard gradients are looked
        at apart from those that do not: all stages add gradients up faster then.
        """
        best: RouteCut | None = None
        limit_s = cutoff_s - self._overhead_s
        for ways in product(*(_alike(self._useful_ways(leg, price)) for leg in route.legs)):
            times = [self._stage_times(route, number, price, mine) for number, mine in enumerate(ways)]
            found = self._cut(times, route, limit_s)
            if found is not None:
                limit_s = found.bound_s
                chosen = tuple(mine[way].number for mine, way in zip(ways, found.ways, strict=True))
                best = RouteCut(found.cuts, chosen, found.bound_s + self._overhead_s)
        return best

    def _cut(self, times: Sequence[LegTimes], route: Route, cutoff_s: float) -> RouteCut | None:
        self.effort.solved("stages", cut_size(len(times[0].send_s), route.num_stages))
        return best_cuts(times, route.num_microbatches, cutoff_s)

    def _leg_times(self, leg: Leg, price: int) -> LegTimes:
        """What units take on a leg, however it is sharded."""
        if (leg, price) not in self._times:
            table, ways = self._table(leg, price), self._useful_ways(leg, price)
            self._times[leg, price] = table.times(ways, leg.layout.pp)
        return self._times[leg, price]

    def _stage_times(self, route: Route, number: int, price: int, ways: Sequence[Way]) -> LegTimes:
        """The same for some of the ways to shard it, with their stages."""
        leg = route.legs[number]
        flights = _flights(route, number)
        return replace(
            self._table(leg, price).times(ways, leg.layout.pp),
            send_s=self.legs.sends_s(route, number, price),
            in_flight=flights,
            ways=[self._stages(leg, price, way, flights) for way in ways],
        )

    def _best_stages(self, route: Route, number: int, price: int, fitting: bool) -> list[StageTimes]:
        """The stages of a leg, each in the way that is best for it."""
        leg, flights = route.legs[number], _flights(route, number)
        for flight in set(flights):
            key = (leg, price, flight if fitting else None)
            if key not in self._best:
                ways = [way if fitting else way.unlimited for way in self._useful_ways(leg, price)]
                self._best[key] = _fastest([self._stages(leg, price, way, (flight,))[0] for way in ways])
        return [self._best[leg, price, flight if fitting else None] for flight in flights]

    def _stages(self, leg: Leg, price: int, way: Way, flights: Sequence[int]) -> list[StageTimes]:
        """The stages of a leg with so many microbatches in flight."""
        table = self._table(leg, price)
        where = self.legs.planners[leg.pool].layer.where(table.chain.units)
        overlap = self.legs.evaluators[leg.pool].overlap
        known = {flight: table.stage(way, flight, overlap, where) for flight in set(flights)}
        return [known[flight] for flight in flights]

    @property
    def _overhead_s(self) -> float:
        return self.legs.evaluators[0].era.step_overhead_s

    def _table(self, leg: Leg, price: int) -> LegTable:
        if (leg, price) not in self._tables:
            table = self.legs.table(leg, price)
            self._tables[leg, price] = LegTable(table.chain, table.options)
        return self._tables[leg, price]

    def _useful_ways(self, leg: Leg, price: int) -> tuple[Way, ...]:
        """The ways to shard a leg but those that another is as good as in time and in memory."""
        if (leg, price) not in self._ways:
            table, evaluator = self._table(leg, price), self.legs.evaluators[leg.pool]
            device = evaluator.cluster.device
            memory_bytes = device.memory_bytes - device.efficiency.reserved_memory_bytes
            ways: list[Way] = []
            for index, p in enumerate(self.legs.ways(leg)):
                machine = Machine(evaluator.placed(p), evaluator.policy, evaluator.overlap, memory_bytes)
                way = table.way(index, p, machine)
                if not any(_is_as_good(other, way) for other in ways):
                    ways = [other for other in ways if not _is_as_good(way, other)] + [way]
            self._ways[leg, price] = tuple(ways)
        return self._ways[leg, price]


def _flights(route: Route, number: int) -> tuple[int, ...]:
    """Microbatches in flight on the stages of a leg."""
    flights = peak_in_flight(SCHEDULE, route.num_stages, route.num_microbatches, 1)
    first = route.first_stage(number)
    return flights[first : first + route.legs[number].layout.pp]


def _fastest(ways: Sequence[StageTimes]) -> StageTimes:
    """What no way undercuts: a longer forward makes a stage with as much to do only earlier."""
    return StageTimes(
        np.min([way.microbatch_s for way in ways], axis=0),
        np.max([way.forward_s for way in ways], axis=0),
        np.min([way.once_s for way in ways], axis=0),
    )


def _is_as_good(one: Way, other: Way) -> bool:
    """Whether a way is nowhere slower and nowhere holds more than another."""
    pairs = zip((*one.once, one.accumulation_s), (*other.once, other.accumulation_s), strict=True)
    is_as_fast = all(np.all(a <= b * (1 + 1e-12)) for a, b in pairs)
    return is_as_fast and bool(np.all(one.room_bytes >= other.room_bytes))


def _alike(ways: Sequence[Way]) -> list[list[Way]]:
    """The ways that add gradients up equally fast."""
    groups: dict[float, list[Way]] = {}
    for way in ways:
        groups.setdefault(round(float(way.accumulation_s.sum()), 9), []).append(way)
    return list(groups.values())
