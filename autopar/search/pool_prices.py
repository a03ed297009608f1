"""What a route through pools costs exactly: its stages, messages and memory, as `autopar.search.evaluate` and
`costmodel.step` count them.

Where stages hold too much, their units keep less, one rank at a time, until all fit. Cuts that the relaxation
chose are then moved by single units as long as the step gets shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.local_programs import Program
from autopar.search.outcome import Solved
from autopar.search.polish import handed_on
from autopar.search.pool_cuts import RouteCut
from autopar.search.pool_legs import Legs
from autopar.search.pool_routes import SCHEDULE, Route
from autopar.search.variants import RankUnits
from costmodel import Ledger, StageWork, StepCost, peak_in_flight, step_cost

NUM_REPAIRS = 6
"""How often what does not fit yet is taken off again."""


@dataclass(frozen=True)
class Course:
    """A route with all that is decided before its price: the price of memory of its programs, the units with
    which its stages begin, 0 first, the parallelism of each leg, and the messages between legs."""

    route: Route
    memory_price: int
    cuts: tuple[int, ...]
    ways: tuple[Parallelism, ...]
    crossings_s: tuple[float, ...]


@dataclass(frozen=True)
class PricedLeg:
    """A leg with its price: the pool's number, its parallelism, of which `pp` are the leg's own stages, its
    program, what each unit of the whole chain keeps, and work and ledger of its stages."""

    pool: int
    parallelism: Parallelism
    program: Program
    choices: tuple[str, ...]
    stages: tuple[StageWork, ...]
    ledgers: tuple[Ledger, ...]
    memory_bytes: float

    @property
    def excess_bytes(self) -> float:
        """By how much the fullest device exceeds its memory; at most 0 where all fit."""
        return max(ledger.total_bytes for ledger in self.ledgers) - self.memory_bytes


@dataclass(frozen=True)
class PricedRoute:
    """A route with its price.

    `link_s` is the least that a link takes which carries every microbatch. With other cuts, other ways to
    shard, or other things computed again, the route takes no less than `bound_s`.
    """

    course: Course
    legs: tuple[PricedLeg, ...]
    step: StepCost
    link_s: float
    bound_s: float = 0.0

    @property
    def route(self) -> Route:
        """The route that was priced."""
        return self.course.route

    @property
    def cuts(self) -> tuple[int, ...]:
        """The units with which its stages begin, 0 first."""
        return self.course.cuts

    @property
    def step_s(self) -> float:
        """Seconds of a step: those of the slowest rank, or of the slowest link."""
        return max(self.step.total_s, self.link_s)

    @property
    def fits(self) -> bool:
        """Whether every device has memory enough."""
        return all(leg.excess_bytes <= 0 for leg in self.legs)

    def solved(self, number: int) -> Solved:
        """The route as a candidate of one cluster, seen from one of its legs; units of other legs keep
        everything."""
        leg, first = self.legs[number], self.route.first_stage(number)
        ends = (*self.cuts, len(leg.choices))
        own = range(ends[first], ends[first + leg.parallelism.pp])
        names = tuple(name if unit in own else "none" for unit, name in enumerate(leg.choices))
        evaluated = Evaluated(
            leg.parallelism, leg.program.chain, self.cuts, names, leg.stages,
            replace(self.step, total_s=self.step_s), leg.ledgers, leg.memory_bytes,
        )  # fmt: skip
        return Solved(evaluated, leg.program, self.bound_s)

    @property
    def rank(self) -> tuple[object, ...]:
        """The order of routes: those that fit by time, the others by excess; fewer legs, then fewer stages
        break ties."""
        excess_bytes = max(leg.excess_bytes for leg in self.legs)
        return not self.fits, self.step_s if self.fits else excess_bytes, len(self.legs), len(self.cuts)


class Prices:
    """Prices routes."""

    def __init__(self, legs: Legs) -> None:
        self.legs = legs

    def solve(self, route: Route, price: int, cut: RouteCut) -> PricedRoute:
        """The route with these cuts and ways, and what memory makes it compute again; where nothing fits,
        what comes nearest."""
        ways = tuple(self.legs.ways(leg)[way] for leg, way in zip(route.legs, cut.ways, strict=True))
        return replace(self._with_cuts(route, price, cut.cuts, ways), bound_s=cut.bound_s)

    def polished(self, priced: PricedRoute) -> PricedRoute:
        """The route with its cuts moved by single units as long as that helps."""
        route, price, ways = priced.route, priced.course.memory_price, priced.course.ways
        while priced.fits:
            near = (self._with_cuts(route, price, cuts, ways) for cuts in self._near(priced))
            best = min(near, key=lambda one: one.rank, default=priced)
            if not best.fits or best.step_s >= priced.step_s * (1 - 1e-9):
                break
            priced = replace(best, bound_s=priced.bound_s)
        return priced

    def _near(self, priced: PricedRoute) -> Iterator[tuple[int, ...]]:
        """The cuts that differ in one unit, which another of two neighbouring stages takes."""
        planner, units = self.legs.planners[0], priced.legs[0].program.chain.units
        where = planner.layer.where(units)
        for giver in range(len(priced.cuts)):
            yield from handed_on(priced.cuts, len(units), giver, where, [giver - 1, giver + 1])

    def finished(self, priced: PricedRoute) -> PricedRoute:
        """The same at full depth: with the names and numbers that a plan is made of."""
        planners = self.legs.planners
        programs = [planners[leg.pool].programs.depths.finished(leg.program) for leg in priced.legs]
        again = self._price(priced.course, programs, [leg.choices for leg in priced.legs])
        return replace(again, bound_s=priced.bound_s)

    def _with_cuts(
        self, route: Route, price: int, cuts: tuple[int, ...], ways: tuple[Parallelism, ...]
    ) -> PricedRoute:
        crossings_s = tuple(
            float(self.legs.sends_s(route, number, price)[cuts[route.first_stage(number)]])
            for number in range(1, len(route.legs))
        )
        programs = [self.legs.program(leg, price) for leg in route.legs]
        bases = [self.legs.table(leg, price).base for leg in route.legs]
        return self._fitting(self._price(Course(route, price, cuts, ways, crossings_s), programs, bases))

    def _price(
        self, course: Course, programs: Sequence[Program], choices: Sequence[tuple[str, ...]]
    ) -> PricedRoute:
        """The course with these programs, whose units keep what `choices` say."""
        route = course.route
        legs: list[PricedLeg] = []
        sends_s: list[float] = []
        for number, (p, program, names) in enumerate(zip(course.ways, programs, choices, strict=True)):
            pool, first = route.legs[number].pool, route.first_stage(number)
            evaluator = self.legs.evaluators[pool]
            stages, ledgers, messages_s = evaluator.leg(program.chain, p, course.cuts, first, names)
            sends_s += [*course.crossings_s[number - 1 : number], *messages_s]
            memory_bytes = evaluator.cluster.device.memory_bytes
            legs.append(PricedLeg(pool, p, program, names, stages, ledgers, memory_bytes))
        works = [work for leg in legs for work in leg.stages]
        evaluator = self.legs.evaluators[0]
        step = step_cost(
            works, route.num_microbatches, SCHEDULE, 1, sends_s, evaluator.overlap,
            blocking_sends=evaluator.era.blocking_sends, overhead_s=evaluator.era.step_overhead_s,
        )  # fmt: skip
        path_s = sum(work.forward_s + work.backward_s for work in works) + 2 * sum(sends_s)
        link_s = path_s + (route.num_microbatches - 1) * max(course.crossings_s)
        return PricedRoute(course, tuple(legs), step, link_s)

    def _fitting(self, priced: PricedRoute) -> PricedRoute:
        """The same cuts with variants that fit; the last tried where none do."""
        for _ in range(NUM_REPAIRS):
            if priced.fits:
                break
            choices = [self._relieved(priced, number) for number in range(len(priced.legs))]
            if choices == [leg.choices for leg in priced.legs]:
                break
            priced = self._price(priced.course, [leg.program for leg in priced.legs], choices)
        return priced

    def _relieved(self, priced: PricedRoute, number: int) -> tuple[str, ...]:
        """What units of a leg keep so that its full stages hold less."""
        leg, first = priced.legs[number], priced.route.first_stage(number)
        flights = peak_in_flight(SCHEDULE, len(priced.cuts), priced.route.num_microbatches, 1)
        runs = pairwise((*priced.cuts, len(leg.choices)))
        # There is but one moment, and only differences count.
        stages = [
            RankUnits(dict.fromkeys(range(*run), (flight,)), (0.0,))
            for run, flight in zip(runs, flights, strict=True)
        ]
        layer = self.legs.planners[leg.pool].layer
        held_per_byte = layer.table(leg.program).held_per_byte
        excess = ((ledger.total_bytes - leg.memory_bytes) / held_per_byte for ledger in leg.ledgers)
        own = stages[first : first + leg.parallelism.pp]
        return layer.variants(leg.program).relieved(leg.choices, own, excess)
