"""The search over pools of different devices: routes, cheapest lower bound first, until the best is proven.

    route        one device's arithmetic, divided over all of each leg           `RouteFloors.device_s`
      ↓          the least that strategies on the tensor axis take               `RouteFloors.tensor_s`
      ↓          each leg's own program, messages at the seams                   `RouteCuts.floor_s`
      ↓          stages cut, as if memory were no matter                         `RouteCuts.least_s`
      ↓          the same, memory met with fractions of variants                 there too
      ↓          the same for each way to shard the legs                         `RouteCuts.cut`
    plan         whole variants, exact schedule and memory                       `Prices.solve`

As in `autopar.search.branch`, what comes first in the queue is looked at more closely, and the first in the
queue is the bound. Each pool by itself is a candidate too, with the whole search of `autopar.search.planner`:
a slow pool stays idle where that is faster.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from math import lcm
from typing import NamedTuple

from autopar.errors import PinConflictError, SearchTimeoutError
from autopar.search.linear_model import Size
from autopar.search.outcome import Solved
from autopar.search.planner import SearchResult
from autopar.search.pool_bounds import RouteCuts
from autopar.search.pool_cuts import RouteCut
from autopar.search.pool_floors import RouteFloors
from autopar.search.pool_legs import Legs
from autopar.search.pool_outcome import PoolsResult, best_by_mesh
from autopar.search.pool_prices import PricedRoute, Prices
from autopar.search.pool_routes import SCHEDULE, Route, routes
from autopar.search.programs import MEMORY_PRICES
from autopar.search.wording import duration

TOLERANCE = 1e-2
"""The gap at which a search is done."""

PROMISING = 0.95
"""A route's price is some percent above its bound: below this part of the best, the bound promises more."""

NEGLIGIBLE = 1e-3
"""What memory costs that is not worth making other programs: a part of the gap."""

Report = Callable[[str, int, int], None]
"""Told what was found so far, how many candidates are decided, and of how many."""


class RouteNode(NamedTuple):
    """A route with the price of memory of its programs, how closely it was looked at (`depth`, the steps
    above), and its cuts with the cutoff at which they were made."""

    route: Route
    price: int = 0
    depth: int = 0
    cut: RouteCut | None = None
    cutoff_s: float = float("inf")


class PoolSearch:
    """One search through `legs`, within the pins of their planners."""

    def __init__(self, legs: Legs, time_limit_s: float | None = None, report: Report | None = None) -> None:
        self.legs = legs
        self.planners = legs.planners
        self.cuts = RouteCuts(legs)
        self.prices = Prices(legs)
        self.deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self.report = report or (lambda best, done, total: None)
        self.routes = tuple(routes(self.planners))
        sizes = (leg.layout.microbatch_size for route in self.routes for leg in route.legs)
        self.floors = RouteFloors(legs, lcm(*sizes))
        self.best: PricedRoute | None = None
        self.alone: tuple[int, SearchResult] | None = None
        self.most_work: int | None = None
        self.solved: list[PricedRoute] = []
        self._conflicts: list[str] = []
        self._tried_alone: dict[int, SearchResult] = {}
        self._fate: dict[Route | int, str] = {}
        self._queue: list[tuple[float, int, RouteNode]] = []
        self._arrivals = self._num_first = 0
        self._gave_up: str | None = None  # why a pool by itself was searched without a plan
        self._smaller_made: set[RouteNode] = set()
        self._untried_s: dict[int, float] = {}  # floors of the pools that were not searched by themselves

    @property
    def num_candidates(self) -> int:
        """Routes, and pools by themselves."""
        return len(self.routes) + len(self.planners)

    @property
    def work(self) -> int:
        """How much was looked at, whatever the machine's load; the search stops at `most_work`."""
        return self._arrivals - self._num_first + sum(found.work for found in self._tried_alone.values())

    @property
    def best_s(self) -> float:
        """Seconds of the best so far."""
        route_s = float("inf") if self.best is None else self.best.step_s
        return min(route_s, self._alone_s)

    @property
    def _alone_s(self) -> float:
        return float("inf") if self._found_alone is None else self._found_alone.evaluated.step_s

    @property
    def _found_alone(self) -> Solved | None:
        return None if self.alone is None else self.alone[1].best

    def run(self) -> PoolsResult:
        """Search until the best is proven, or time or the user says so.

        Raises SearchTimeoutError when there is no plan by then, and PinConflictError when the pins leave no
        candidate.
        """
        try:
            stopped = self._run()
        except KeyboardInterrupt:
            stopped = "interrupted"
        if stopped is not None and self.best_s == float("inf"):
            raise SearchTimeoutError(
                f"no plan yet when the search was stopped ({stopped}): {self.num_candidates} candidates, "
                "none priced; allow more time, or pin some settings"
            )
        if len(self._conflicts) == self.num_candidates:
            raise PinConflictError(
                f"no pipeline goes through the pools with the pins, in which pp counts the stages on all of "
                f"them and the schedule is {SCHEDULE}; nor does one pool alone: {self._conflicts[0]}"
            )
        self.legs.effort.solved("candidates", Size(self.num_candidates, 1, self.num_candidates))
        return self._result(stopped)

    def _result(self, stopped: str | None) -> PoolsResult:
        bounds_s = [self._open_s, *(found.bound_s for found in self._tried_alone.values())]
        bounds_s += map(self._final_bound_s, self.solved)
        fates = Counter(self._fate.values())
        num_solved = fates.pop("solved", 0)
        fates[stopped or "time floor"] += self.num_candidates - len(self._fate)
        is_alone = self._alone_s <= self.best_s
        others = (each for each in best_by_mesh(self.solved) if is_alone or each is not self.best)
        return PoolsResult(
            best=None if is_alone else self.best,
            alone=self.alone if is_alone else None,
            runners_up=tuple(islice(others, self.planners[0].num_runners_up)),
            bound_s=min(self.best_s, *bounds_s),
            num_candidates=self.num_candidates,
            num_solved=num_solved,
            pruned={"memory floor": 0, "time floor": 0, "out of memory": 0, **fates},
            tried_alone=self._tried_alone,
            stopped=stopped,
        )

    def _run(self) -> str | None:
        """Go through the queue; what stopped it, if not the proof."""
        self._untried_s = {pool: self.floors.alone_s(planner) for pool, planner in enumerate(self.planners)}
        for route in self.routes:
            if self.floors.may_fit(route):
                self._push(self.floors.device_s(route), RouteNode(route))
            else:
                self._fate[route] = "memory floor"
        self._num_first = self._arrivals
        while self._queue and self._queue[0][0] < self._enough_s and not self._is_over():
            floor_s, _, node = self._queue[0]
            found = list(self._expand(floor_s, node))
            heapq.heappop(self._queue)
            for entry in found:
                self._push(*entry)
            self._tell()
        # A pool by itself has to beat what goes through all of them: the better that is, the less to search.
        for pool, floor_s in sorted(self._untried_s.items(), key=lambda each: each[1]):
            if floor_s < self._enough_s and (self.best_s == float("inf") or not self._is_over()):
                self._search_alone(pool)
                self._tell()
            if self._stopped_alone == "interrupted":
                break
        if self._stopped_alone is None and self._open_s < self._enough_s:
            return self._is_over()
        return self._stopped_alone

    def _is_over(self) -> str | None:
        """What stops the search before its proof, if anything does."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "time limit"
        return "work limit" if self.most_work is not None and self.work > self.most_work else None

    @property
    def _stopped_alone(self) -> str | None:
        """What stopped the search of a pool by itself, if anything did."""
        stops = (found.stopped for found in self._tried_alone.values() if found.stopped)
        return self._gave_up or next(stops, None)

    def _tell(self) -> None:
        num_left = len(self._queue) + len(self._untried_s)
        self.report(self._so_far(), self.num_candidates - num_left, self.num_candidates)

    @property
    def _open_s(self) -> float:
        """The floor of what was not looked at to the end."""
        floors_s = [entry[0] for entry in self._queue[:1]]
        return min([*floors_s, *self._untried_s.values()], default=float("inf"))

    @property
    def _enough_s(self) -> float:
        """What takes no less need not be looked at."""
        return self.best_s * (1 - TOLERANCE)

    def _push(self, floor_s: float, node: RouteNode) -> None:
        heapq.heappush(self._queue, (floor_s, self._arrivals, node))
        self._arrivals += 1

    def _expand(self, floor_s: float, node: RouteNode) -> Iterator[tuple[float, RouteNode]]:
        """What a node turns into, each with its floor."""
        match node:
            case RouteNode(route, _, 0):
                yield max(floor_s, self.floors.tensor_s(route)), node._replace(depth=1)
            case RouteNode(route, price, 1):
                yield max(floor_s, self.cuts.floor_s(route, price)), node._replace(depth=2)
            case RouteNode(route, price, 2):
                least_s = self.cuts.least_s(route, price, self.best_s, fitting=False)
                if least_s < float("inf"):
                    yield max(floor_s, least_s), node._replace(depth=3)
            case RouteNode(route, price, 3):
                least_s = self.cuts.least_s(route, price, self.best_s)
                if least_s < float("inf"):
                    yield max(floor_s, least_s), node._replace(depth=4)
                else:
                    self._fate.setdefault(route, "out of memory")
                if least_s > floor_s * (1 + NEGLIGIBLE):
                    yield from self._smaller(floor_s, node)
            case RouteNode(_, _, _, cut, cutoff_s):
                if cut is None or cutoff_s > self.best_s:  # the nearer the cutoff, the tighter the bound
                    yield from self._cut(floor_s, node)
                else:
                    yield from self._solve(floor_s, node, cut)

    def _cut(self, floor_s: float, node: RouteNode) -> Iterator[tuple[float, RouteNode]]:
        """Cut a route; price it at once where that may well give a better cutoff."""
        cut = self.cuts.cut(node.route, node.price, self.best_s)
        if cut is not None:
            known = node._replace(cut=cut, cutoff_s=self.best_s)
            if node.cut is None and cut.bound_s < PROMISING * self.best_s:
                self._note(self.prices.solve(node.route, node.price, cut))
            yield max(floor_s, cut.bound_s), known
        else:  # what is over the cutoff may be so for want of memory
            yield from self._without_memory(node)

    def _solve(self, floor_s: float, node: RouteNode, cut: RouteCut) -> Iterator[tuple[float, RouteNode]]:
        """Price a route; where memory binds, smaller programs may do better."""
        priced = self.prices.solve(node.route, node.price, cut)
        if priced.fits and priced.step_s < self.best_s * 1.03:
            priced = self.prices.polished(priced)
        self._note(priced)
        if priced.fits:
            self.solved.append(priced)
        else:
            self._fate.setdefault(node.route, "out of memory")
        bases = (self.legs.table(leg, node.price).base for leg in node.route.legs)
        if any(leg.choices != base for leg, base in zip(priced.legs, bases, strict=True)):
            yield from self._without_memory(node)

    def _note(self, priced: PricedRoute) -> None:
        if priced.fits:
            self._fate[priced.route] = "solved"
            if self.best is None or priced.rank < self.best.rank:
                self.best = priced

    def _without_memory(self, node: RouteNode) -> Iterator[tuple[float, RouteNode]]:
        """Smaller programs of a route, unless it is over the cutoff whatever memory there is."""
        least_s = self.cuts.least_s(node.route, node.price, self.best_s, fitting=False)
        if least_s < float("inf"):
            yield from self._smaller(least_s, node)

    def _smaller(self, floor_s: float, node: RouteNode) -> Iterator[tuple[float, RouteNode]]:
        """The same route with programs of the next price of memory, once: they take no less than these would
        if memory were no matter, which is the floor."""
        smaller = RouteNode(node.route, node.price + 1, depth=1)
        has_others = smaller.price < len(MEMORY_PRICES) and any(leg.layout.tp > 1 for leg in node.route.legs)
        if has_others and smaller not in self._smaller_made:
            self._smaller_made.add(smaller)
            yield floor_s, smaller

    def _search_alone(self, pool: int) -> None:
        """Search one pool for what is better than the best so far."""
        planner = self.planners[pool]
        planner.deadline = self.deadline
        through = None if self.best is None else self.best.solved(0)
        known = [each for each in (self._found_alone, through) if each is not None]
        try:
            best = min(known, key=lambda each: each.evaluated.step_s, default=None)
            left = None if self.most_work is None else self.most_work - self.work
            found = planner.search(best, TOLERANCE, left)
        except PinConflictError as error:
            self._fate[pool] = "pins"
            del self._untried_s[pool]
            self._conflicts.append(str(error))
            return
        except SearchTimeoutError:  # its floor stays open
            self._gave_up = self._is_over() or "interrupted"
            return
        del self._untried_s[pool]
        self._tried_alone[pool] = found
        self._fate[pool] = "solved" if found.num_solved else found.stopped or "time floor"
        if found.best is not None and found.best.evaluated.step_s < self._alone_s:
            self.alone = pool, found

    def _final_bound_s(self, priced: PricedRoute) -> float:
        """What a route takes at least: what was known when it was priced, or is with the final cutoff."""
        if priced.bound_s >= self.best_s * (1 - TOLERANCE):
            return priced.bound_s
        cut = self.cuts.cut(priced.route, priced.course.memory_price, self.best_s)
        return self.best_s if cut is None else max(priced.bound_s, cut.bound_s)

    def _so_far(self) -> str:
        return f"search: {'no plan yet' if self.best_s == float('inf') else duration(self.best_s)}"
