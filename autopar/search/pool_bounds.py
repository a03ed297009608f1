"""What no cuts of a route through pools can undercut, and the cuts that come nearest.

The sums are those of each leg's own table (`autopar.search.stages`), the cuts `autopar.search.pool_cuts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autopar.plan import Parallelism, ScheduleName
from autopar.search.pool_cuts import (
    LegTimes,
    RouteCut,
    StageTimes,
    best_cuts,
    seam_floors,
)
from autopar.search.pool_legs import Legs
from autopar.search.pool_routes import Leg, Route
from autopar.search.runs import AllRuns, Array
from autopar.search.stages import Machine, Once, RunSums, StageTable, relief_s
from costmodel import Overlap, peak_in_flight


class Way(NamedTuple):
    """A way to shard a leg: what its data axes and the optimizer add to each unit, the seconds in which each
    adds a microbatch's gradients to those before, and the bytes that model states leave for activations of
    each run of units."""

    number: int
    once: Once
    accumulation_s: Array
    room_bytes: Array


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

    def steps_s(self, way: Way, m: int, overlap: Overlap) -> Array:
        """What each unit takes in a step of m microbatches at least, in two rows: with all that moves hidden,
        and with synchronisation hidden by a whole backward; a stage takes the larger sum."""
        backward_s = self.unit_backward_s + way.accumulation_s
        gather_s, back_s, sync_s, optimizer_s = way.once
        hidden_s = overlap.contention * (m * (gather_s + back_s) + sync_s)
        least_s = m * (self.unit_forward_s + backward_s) + hidden_s + optimizer_s
        exposed_s = (1 - overlap.contention) * (sync_s - overlap.gradient_sync * backward_s)
        return np.stack([least_s, least_s + exposed_s])

    def stage(self, way: Way, flight: int, overlap: Overlap, excluded: NDArray[np.bool_]) -> StageTimes:
        """The stages with so many microbatches in flight, `excluded` runs left out."""
        sums = self.sums
        excess_bytes = np.where(excluded, 0.0, sums.saved_bytes - way.room_bytes / flight)
        again_s = relief_s(sums.segments, excess_bytes)
        possible = np.isfinite(again_s) & np.logical_not(excluded)
        backward_s = sums.backward_s + sums.runs.sums(way.accumulation_s) + np.where(possible, again_s, 0.0)
        gather_s, back_s, sync_s, optimizer_s = map(sums.runs.sums, way.once)
        units = sums.num_sharding_units
        forward_gather_s = _exposed(gather_s, overlap.parameter_gather * sums.forward_s, units)
        back_gather_s = _exposed(back_s, overlap.parameter_gather * backward_s, units)
        free_s = overlap.gradient_sync * backward_s - (back_s - back_gather_s)
        exposed_s = _exposed(sync_s, np.maximum(0.0, free_s), units)
        gathers_s = _costly(gather_s, forward_gather_s, overlap) + _costly(back_s, back_gather_s, overlap)
        microbatch_s = np.where(possible, sums.forward_s + backward_s + gathers_s, np.inf)
        forward_s = sums.forward_s + _costly(gather_s, forward_gather_s, overlap)
        once_s = _costly(sync_s, exposed_s, overlap) + optimizer_s
        return StageTimes(microbatch_s, forward_s, once_s, flight)


class RouteCuts:
    """Cuts routes; what legs have in common is worked out once."""

    def __init__(self, legs: Legs) -> None:
        self.legs = legs
        self._tables: dict[tuple[Leg, int], LegTable] = {}
        self._ways: dict[tuple[Leg, ScheduleName, int], tuple[Way, ...]] = {}

    def floor_s(self, route: Route, price: int) -> float:
        """No step takes less, whatever memory costs; infinite for too few units."""
        numbers = range(len(route.legs))
        times = [self._times(route, n, price, self._useful_ways(route, n, price)) for n in numbers]
        floors = seam_floors(times, route.num_microbatches, route.schedule)
        return floors[0][0] + self._overhead_s if floors else float("inf")

    def cut(self, route: Route, price: int, cutoff_s: float, *, fitting: bool = True) -> RouteCut | None:
        """The best cuts and the best way to shard each leg, with the bound of the relaxation: no others are
        below both that and the cutoff. Without `fitting` memory is no matter.

        None where nothing fits memory, or nothing is below the cutoff. Where memory matters, ways that shard
        gradients are looked at apart from those that do not: all stages add gradients up faster then.
        """
        best: RouteCut | None = None
        limit_s = cutoff_s - self._overhead_s
        useful = [self._useful_ways(route, number, price) for number in range(len(route.legs))]
        for ways in product(*(_alike(ways) if fitting else [ways] for ways in useful)):
            times = [
                self._times(route, number, price, mine, limit_s, fitting) for number, mine in enumerate(ways)
            ]
            found = best_cuts(times, route.num_microbatches, route.schedule, limit_s)
            if found is not None:
                limit_s = found.bound_s
                chosen = tuple(mine[way].number for mine, way in zip(ways, found.ways, strict=True))
                best = RouteCut(found.cuts, chosen, found.bound_s + self._overhead_s)
        return best

    def _times(
        self,
        route: Route,
        number: int,
        price: int,
        ways: Sequence[Way],
        limit_s: float | None = None,
        fitting: bool = True,
    ) -> LegTimes:
        """What units take on a leg, and with a limit the stages of these ways to shard it."""
        leg, m = route.legs[number], route.num_microbatches
        table, overlap = self._table(leg, price), self.legs.evaluators[leg.pool].overlap
        flights = peak_in_flight(route.schedule, route.num_stages, m, 1)[route.first_stage(number) :]
        flights = flights[: leg.layout.pp]
        stages: list[list[StageTimes]] = []
        if limit_s is not None:
            stages = [self._stages(leg, price, way, flights, m, limit_s, fitting) for way in ways]
        return LegTimes(
            forward_s=table.unit_forward_s,
            backward_s=table.unit_backward_s + np.min([way.accumulation_s for way in ways], axis=0),
            num_stages=leg.layout.pp,
            steps_s=np.stack([table.steps_s(way, m, overlap) for way in ways]),
            ways=stages,
            send_s=self.legs.sends_s(route, number, price),
            in_flight=max(flights),
        )

    @property
    def _overhead_s(self) -> float:
        return self.legs.evaluators[0].era.step_overhead_s

    def _table(self, leg: Leg, price: int) -> LegTable:
        if (leg, price) not in self._tables:
            table = self.legs.table(leg, price)
            self._tables[leg, price] = LegTable(table.chain, table.options)
        return self._tables[leg, price]

    def _useful_ways(self, route: Route, number: int, price: int) -> tuple[Way, ...]:
        """The ways to shard a leg but those that another is as good as in time and in memory."""
        leg, schedule = route.legs[number], route.schedule
        key = leg, schedule, price
        if key not in self._ways:
            table, evaluator = self._table(leg, price), self.legs.evaluators[leg.pool]
            device = evaluator.cluster.device
            memory_bytes = device.memory_bytes - device.efficiency.reserved_memory_bytes
            ways: list[Way] = []
            for index, p in enumerate(self.legs.ways(leg, schedule)):
                machine = Machine(evaluator.placed(p), evaluator.policy, evaluator.overlap, memory_bytes)
                way = table.way(index, p, machine)
                if not any(_is_as_good(other, way) for other in ways):
                    ways = [other for other in ways if not _is_as_good(way, other)] + [way]
            self._ways[key] = tuple(ways)
        return self._ways[key]

    def _stages(
        self, leg: Leg, price: int, way: Way, flights: Sequence[int], m: int, cutoff_s: float, fitting: bool
    ) -> list[StageTimes]:
        """The stages of a leg with so many microbatches in flight; a run of units that alone exceeds the
        cutoff is none."""
        table = self._table(leg, price)
        where = self.legs.planners[leg.pool].layer.where(table.chain.units)
        excluded = m * (table.sums.forward_s + table.sums.backward_s) >= cutoff_s
        if where is not None:
            excluded[: len(where)][~where] = True
        overlap = self.legs.evaluators[leg.pool].overlap
        if not fitting:
            free = way._replace(room_bytes=np.full_like(way.room_bytes, np.inf))
            times = table.stage(free, 1, overlap, excluded)
            return [times._replace(in_flight=flight) for flight in flights]
        known = {flight: table.stage(way, flight, overlap, excluded) for flight in set(flights)}
        return [known[flight] for flight in flights]


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


def _exposed(communication_s: Array, hiding_s: Array, units: Array) -> Array:
    found: Array = np.maximum(communication_s - hiding_s, communication_s / units)
    return found


def _costly(communication_s: Array, exposed_s: Array, overlap: Overlap) -> Array:
    return exposed_s + overlap.contention * (communication_s - exposed_s)
