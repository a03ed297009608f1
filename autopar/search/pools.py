"""The search over pools of different devices: routes, cheapest lower bound first, until the best is proven.

    route        one device's arithmetic, divided over the devices of each leg      `Floors.device_sample_s`
      ↓          strategies of the tensor axes at their true prices                 `Floors.tensor_sample_s`
      ↓          each leg's own program, seams between units                        `RouteCuts.floor_s`
      ↓          stages cut, ways to shard, at first as if memory were no matter    `RouteCuts.cut`
      ↓          the same, memory met with fractions of variants                    `RouteCuts.cut`
    plan         whole variants, exact schedule and memory                          `Prices.solve`

As in `autopar.search.branch`, what comes first in the queue is looked at more closely, and the first in the
queue is the bound. Routes through one pool alone are among the candidates: a slow pool stays idle where that
is faster.

A leg of p stages on which a whole microbatch takes c seconds does not take its part x of the model in less
than x c / κ, with κ as in `autopar.search.pool_cuts`; if what comes after it takes r for all of the model,
both together take

    min over x of max(x c / κ, x c + (1 - x) r) = (c / κ) r / (c / κ - c + r)    or r, where that is less.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from autopar.errors import PinConflictError, SearchTimeoutError
from autopar.search.floors import Floors
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.pool_bounds import RouteCuts
from autopar.search.pool_cuts import RouteCut
from autopar.search.pool_legs import Legs
from autopar.search.pool_prices import PricedRoute, Prices
from autopar.search.pool_routes import Leg, Route, routes
from autopar.search.programs import MEMORY_PRICES
from autopar.search.space import parallelism
from autopar.search.stages import state_bytes
from costmodel import OptimizerPolicy, Software
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES
from graphs import Capture
from hardware_db import Pools

TOLERANCE = 1e-2
"""The gap at which a search is done."""

PROMISING = 0.95
"""A route's price is some percent above its bound: below this part of the best, the bound promises more."""

NUM_RUNNERS_UP = 4

Report = Callable[[str, int, int], None]
"""Told the best so far, how many candidates are decided, and of how many."""


class Node(NamedTuple):
    """A route, how closely it was looked at (`depth`), the price of memory of its programs, and its cuts with
    the cutoff at which they were made."""

    route: Route
    depth: int = 0
    price: int = 0
    cut: RouteCut | None = None
    cutoff_s: float = float("inf")


@dataclass(frozen=True)
class PoolsResult:
    """What the search found; `best` is None where nothing fits. `runners_up` are the best routes with other
    pools, degrees or order; `pruned` counts candidates by why they were dropped."""

    best: PricedRoute | None
    runners_up: tuple[PricedRoute, ...]
    bound_s: float
    num_candidates: int
    num_solved: int
    pruned: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None


def plan_pools(
    capture: Capture,
    pools: Pools,
    policy: OptimizerPolicy,
    era: Software | None = None,
    *,
    global_batch: int,
    pins: Pins | None = None,
    time_limit_s: float | None = None,
    report: Report | None = None,
    shorten: bool = True,
) -> tuple[PoolsResult, Legs]:
    """The best route of a pipeline through pools, and the legs that it was made of.

    Arguments as for `autopar.search.planner.Planner`. Raises PinConflictError when the pins leave no route,
    and SearchTimeoutError when the time limit passes before there is any.
    """
    planners = [
        Planner(capture, cluster, policy, era, global_batch=global_batch, pins=pins, shorten=shorten)
        for cluster in pools.pools
    ]
    legs = Legs(planners, pools)
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    search = PoolSearch(legs, global_batch, pins or Pins(), deadline, report)
    return search.run(), legs


class PoolSearch:
    """One search."""

    def __init__(
        self,
        legs: Legs,
        global_batch: int,
        pins: Pins,
        deadline: float | None = None,
        report: Report | None = None,
    ) -> None:
        self.legs = legs
        self.cuts = RouteCuts(legs)
        self.prices = Prices(legs)
        self.deadline = deadline
        self.report = report or (lambda best, done, total: None)
        self.routes = tuple(routes(legs.planners, global_batch, pins))
        if not self.routes:
            raise PinConflictError(self._why_empty(global_batch, pins))
        self._made: dict[tuple[int, tuple[int, ...]], dict[int, float]] = defaultdict(dict)
        self._shares: dict[tuple[int, int, int], float] = {}
        self._capacity: dict[Leg, float] = {}
        self._possible = [route for route in self.routes if self._may_fit(route)]
        sizes = (leg.layout.microbatch_size for route in self._possible for leg in route.legs)
        self._largest = max(sizes, default=1)
        self._floors = [
            Floors(planner.programs, self._largest, planner.layer.table) for planner in legs.planners
        ]
        self.best: PricedRoute | None = None
        self.solved: list[PricedRoute] = []
        num_impossible = len(self.routes) - len(self._possible)
        self.pruned = {"memory floor": num_impossible, "time floor": 0, "out of memory": 0}
        self._queue: list[tuple[float, int, Node]] = []
        self._arrivals = 0

    @property
    def best_s(self) -> float:
        """Seconds of the best route so far."""
        return float("inf") if self.best is None else self.best.step_s

    def run(self) -> PoolsResult:
        """Search until the best is proven, or time or the user says so."""
        stopped = None
        try:
            stopped = self._run()
        except KeyboardInterrupt:
            stopped = "interrupted"
        if self.best is None and stopped is not None:
            raise SearchTimeoutError(
                f"no plan yet when the search was stopped ({stopped}): {len(self.routes)} routes, none "
                "priced; allow more time, or pin some settings"
            )
        reason = stopped or "time floor"
        self.pruned[reason] = self.pruned.get(reason, 0) + len(self._queue)
        left = (entry[0] for entry in self._queue[:1])
        others = (each for each in self._best_by_mesh() if each is not self.best)
        return PoolsResult(
            best=self.best,
            runners_up=tuple(islice(others, NUM_RUNNERS_UP)),
            bound_s=min(self.best_s, *map(self._final_bound_s, self.solved), *left),
            num_candidates=len(self.routes),
            num_solved=len(self.solved),
            pruned=self.pruned,
            stopped=stopped,
        )

    def _run(self) -> str | None:
        """Go through the queue; what stopped it, if not the proof."""
        for route in self._possible:
            self._push(self._floor_s(route, self._device_s), Node(route))
        while self._queue and self._queue[0][0] < self.best_s * (1 - TOLERANCE):
            if self.deadline is not None and time.monotonic() > self.deadline:
                return "time limit"
            floor_s, _, node = self._queue[0]
            found = list(self._expand(floor_s, node))
            heapq.heappop(self._queue)
            for entry in found:
                self._push(*entry)
            self.report(self._so_far(), len(self.routes) - len(self._queue), len(self.routes))
        return None

    def _final_bound_s(self, priced: PricedRoute) -> float:
        """What a route takes at least: what was known when it was priced, or is with the final cutoff."""
        if priced.bound_s >= self.best_s * (1 - TOLERANCE):
            return priced.bound_s
        cut = self.cuts.cut(priced.route, priced.price, self.best_s)
        return self.best_s if cut is None else max(priced.bound_s, cut.bound_s)

    def _push(self, floor_s: float, node: Node) -> None:
        heapq.heappush(self._queue, (floor_s, self._arrivals, node))
        self._arrivals += 1

    def _expand(self, floor_s: float, node: Node) -> Iterator[tuple[float, Node]]:
        """What a node turns into, each with its floor."""
        route = node.route
        if node.cut is not None and node.cutoff_s > self.best_s:
            yield from self._cut(floor_s, node)  # the nearer the cutoff, the tighter the bound
        elif node.cut is not None:
            yield from self._solve(node, node.cut)
        elif node.depth == 0:
            yield max(floor_s, self._floor_s(route, self._tensor_s)), Node(route, 1)
        elif node.depth == 1:
            known_s = self._floor_s(route, self._tensor_s)
            if known_s > floor_s * (1 + 1e-9):  # by what was made since
                yield known_s, node
            else:
                yield max(floor_s, self._route_floor_s(route, 0)), Node(route, 2)
        elif node.depth == 2:
            cut = self.cuts.cut(route, node.price, self.best_s, fitting=False)
            if cut is None:
                self.pruned["time floor"] += 1
            else:
                yield max(floor_s, cut.bound_s), node._replace(depth=3)
        else:
            yield from self._cut(floor_s, node)

    def _cut(self, floor_s: float, node: Node) -> Iterator[tuple[float, Node]]:
        """Cut a route; price it at once where that may well give a better cutoff."""
        cut = self.cuts.cut(node.route, node.price, self.best_s)
        if cut is None:
            self.pruned["out of memory" if self.best is None else "time floor"] += 1
            yield from self._smaller(node)
            return
        known = node._replace(cut=cut, cutoff_s=self.best_s)
        if node.cut is None and cut.bound_s < PROMISING * self.best_s:
            self._note(self.prices.solve(node.route, node.price, cut))
        yield max(floor_s, cut.bound_s), known

    def _solve(self, node: Node, cut: RouteCut) -> Iterator[tuple[float, Node]]:
        """Price a route; where memory binds, smaller programs may do better."""
        priced = self.prices.solve(node.route, node.price, cut)
        if priced.fits and priced.step_s < self.best_s * 1.03:
            priced = self.prices.polished(priced)
        self._note(priced)
        if not priced.fits:
            self.pruned["out of memory"] += 1
            yield from self._smaller(node)
            return
        self.solved.append(priced)
        bases = (self.legs.table(leg, node.price).base for leg in node.route.legs)
        if any(leg.choices != base for leg, base in zip(priced.legs, bases, strict=True)):
            yield from self._smaller(node)

    def _note(self, priced: PricedRoute) -> None:
        if priced.fits and (self.best is None or priced.rank < self.best.rank):
            self.best = priced

    def _smaller(self, node: Node) -> Iterator[tuple[float, Node]]:
        """The same route with programs of the next price of memory."""
        price = node.price + 1
        if price < len(MEMORY_PRICES) and any(leg.layout.tp > 1 for leg in node.route.legs):
            floor_s = self._route_floor_s(node.route, price)
            if floor_s < self.best_s:
                yield floor_s, Node(node.route, 2, price)

    # --- floors ---------------------------------------------------------------------------------------------

    def _may_fit(self, route: Route) -> bool:
        """Whether the model's blocks fit at all, sharded as far as that goes and all computed again."""
        return sum(map(self._most_blocks, route.legs)) >= len(self.legs.planners[0].capture.graph.blocks)

    def _most_blocks(self, leg: Leg) -> float:
        """No more blocks fit the devices of a leg."""
        if leg not in self._capacity:
            planner, layout = self.legs.planners[leg.pool], leg.layout
            offload = planner.pins.offload or "none"
            sharded = parallelism(dp_shard=layout.dp, zero_stage=3, cp=layout.cp, offload=offload)
            per_element = state_bytes(sharded, planner.policy, layout.dp * layout.cp)
            state = per_element * planner.bounds.block_parameters / (layout.tp * layout.ep)
            samples = layout.microbatch_size / (layout.tp * layout.cp)
            device = planner.cluster.device
            room = device.memory_bytes - device.efficiency.reserved_memory_bytes
            held = state + samples * planner.bounds.block_saved_bytes["full"]
            self._capacity[leg] = layout.pp * room / held if held else float("inf")
        return self._capacity[leg]

    def _floor_s(self, route: Route, microbatch_s: Callable[[Leg], float]) -> float:
        seconds = [microbatch_s(leg) for leg in route.legs]
        return pipeline_floor_s(route, seconds, list(map(self._least_share, route.legs)))

    def _least_share(self, leg: Leg) -> float:
        """The part of a microbatch that a leg has at least, whose stages have a unit each."""
        key = leg.pool, leg.layout.ep, leg.layout.pp
        if key not in self._shares:
            table = self._floors[leg.pool].device(self._largest, leg.layout.ep)
            before = np.cumsum([0.0, *(table.unit_forward_s + table.unit_backward_s)])
            num_stages = leg.layout.pp
            self._shares[key] = float((before[num_stages:] - before[:-num_stages]).min() / before[-1])
        return self._shares[key]

    def _device_s(self, leg: Leg) -> float:
        """A microbatch of a leg, one device's arithmetic divided over all. Half the batch takes at least half
        as long, so the largest microbatch stands for all of them."""
        layout = leg.layout
        largest_s = self._floors[leg.pool].device_s(self._largest, layout.ep)
        return layout.microbatch_size / self._largest * largest_s / (layout.tp * layout.cp)

    def _tensor_s(self, leg: Leg) -> float:
        """The same with the strategies of the tensor axis; or by a program of a larger microbatch, where one
        was made."""
        layout = leg.layout
        largest_s = self._floors[leg.pool].tensor_s(self._largest, layout.tp, layout.ep) / layout.cp
        made = self._made[leg.pool, layout[1:4]]
        sample_s = [largest_s / self._largest]
        sample_s += [seconds for size, seconds in made.items() if size >= layout.microbatch_size]
        return layout.microbatch_size * max(sample_s)

    def _route_floor_s(self, route: Route, price: int) -> float:
        for leg in route.legs:
            size = leg.layout.microbatch_size
            microbatch_s = self.legs.table(leg, 0).microbatch_s
            self._made[leg.pool, leg.layout[1:4]][size] = microbatch_s / size
        return self.cuts.floor_s(route, price)

    # --- what to say ----------------------------------------------------------------------------------------

    def _best_by_mesh(self) -> Iterable[PricedRoute]:
        """The best of every combination of pools and degrees."""
        found: dict[tuple[object, ...], PricedRoute] = {}
        for priced in sorted(self.solved, key=lambda each: each.rank):
            found.setdefault(tuple((leg.pool, leg.layout[1:6]) for leg in priced.route.legs), priced)
        return found.values()

    def _so_far(self) -> str:
        return "no plan yet" if self.best is None else f"{self.best_s:.3g} s"

    def _why_empty(self, global_batch: int, pins: Pins) -> str:
        sizes = ", ".join(f"{pool.num_devices} of {pool.id}" for pool in self.legs.pools.pools)
        return (
            f"no pipeline goes through any of the pools ({sizes}) with a global batch of {global_batch} and "
            f"{pins}: on each, the product of tp, cp, dp and its number of stages must be its number of "
            "devices, and dp must divide the samples of a microbatch"
        )


def pipeline_floor_s(route: Route, microbatches_s: Sequence[float], shares: Sequence[float]) -> float:
    """No pipeline takes less on whose legs a microbatch takes so long if all units were on one, and that have
    these shares of the units at least."""
    m = route.num_microbatches
    splits_backward = route.schedule in SPLIT_BACKWARD_SCHEDULES
    rest_s, least_s, path_s = float("inf"), 0.0, 0.0
    for leg, seconds, share in reversed(list(zip(route.legs, microbatches_s, shares, strict=True))):
        pace = leg.layout.pp / m if splits_backward else 1 - (1 - 1 / m) ** leg.layout.pp
        alone_s = seconds / pace
        least_s = max(least_s, share * alone_s)
        path_s += share * seconds
        if rest_s < float("inf"):
            both_s = alone_s * rest_s / (alone_s + rest_s - (0.0 if splits_backward else seconds))
            rest_s = min(rest_s, both_s)
        else:
            rest_s = alone_s
    return max(rest_s, least_s, 0.0 if splits_backward else path_s)
