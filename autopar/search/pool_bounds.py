"""What no cuts of a route through pools can undercut, and the cuts that come nearest.

The sums are those of each leg's own table (`autopar.search.stage_table`) in each way to shard it
(`autopar.search.pool_ways`), the cuts `autopar.search.pool_cuts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from autopar.search.effort import clocked, cut_size
from autopar.search.pool_cuts import LegTimes, RouteCut, best_cuts, seam_floors
from autopar.search.pool_legs import Legs
from autopar.search.pool_routes import SCHEDULE, Leg, Route
from autopar.search.pool_ways import Way, alike, fastest, leg_times, stage, useful_ways
from autopar.search.stage_times import StageTimes
from costmodel import peak_in_flight


class RouteCuts:
    """Cuts routes; what legs have in common is worked out once."""

    def __init__(self, legs: Legs) -> None:
        self.legs = legs
        self.effort = legs.effort
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
        for ways in product(*(alike(self._useful_ways(leg, price)) for leg in route.legs)):
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
            table, ways = self.legs.table(leg, price), self._useful_ways(leg, price)
            self._times[leg, price] = leg_times(table, ways, leg.layout.pp)
        return self._times[leg, price]

    def _stage_times(self, route: Route, number: int, price: int, ways: Sequence[Way]) -> LegTimes:
        """The same for some of the ways to shard it, with their stages."""
        leg = route.legs[number]
        flights = _flights(route, number)
        return replace(
            leg_times(self.legs.table(leg, price), ways, leg.layout.pp),
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
                self._best[key] = fastest([self._stages(leg, price, way, (flight,))[0] for way in ways])
        return [self._best[leg, price, flight if fitting else None] for flight in flights]

    def _stages(self, leg: Leg, price: int, way: Way, flights: Sequence[int]) -> list[StageTimes]:
        """The stages of a leg with so many microbatches in flight."""
        where = self.legs.planners[leg.pool].layer.where(self.legs.table(leg, price).chain.units)
        overlap = self.legs.evaluators[leg.pool].overlap
        known = {flight: stage(way, flight, overlap, where) for flight in set(flights)}
        return [known[flight] for flight in flights]

    @property
    def _overhead_s(self) -> float:
        return self.legs.evaluators[0].era.step_overhead_s

    def _useful_ways(self, leg: Leg, price: int) -> tuple[Way, ...]:
        """The ways to shard a leg but those that another is as good as in time and in memory."""
        if (leg, price) not in self._ways:
            machine = self.legs.planners[leg.pool].layer.machine
            offered = ((p, machine) for p in self.legs.ways(leg))
            self._ways[leg, price] = useful_ways(self.legs.table(leg, price), offered)
        return self._ways[leg, price]


def _flights(route: Route, number: int) -> tuple[int, ...]:
    """Microbatches in flight on the stages of a leg."""
    flights = peak_in_flight(SCHEDULE, route.num_stages, route.num_microbatches, 1)
    first = route.first_stage(number)
    return flights[first : first + route.legs[number].layout.pp]
