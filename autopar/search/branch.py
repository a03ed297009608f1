"""The outer layer: layouts and ways to run them, cheapest lower bound first, until the best is proven.

Everything that may still win stands in one queue, ordered by the least it can cost. What comes first is
looked at more closely, which raises its floor, splits it, or prices it:

    layout         arithmetic of one device, divided over all              `WayFloors.quick_layout_s`
      ↓            strategies of the tensor axis at their true prices      `WayFloors.layout_s`
    schedule       the same and its bubble                                 `WayFloors.scheduled_s`
      ↓            one device's kernels and memory, on the busiest rank    `WayFloors.busiest_s`
    way            the same, bandwidth of its data axes                    `WayFloors.way_s`
      ↓            one device's kernels and memory, divided and cut        `WayFloors.close_s`
      ↓            one rank's kernels, their memory and messages           `Programs.program`
    program        stages cut with fractions of what may be recomputed     `StageLayer.draft`
      ↓
    plan           whole variants, exact schedule and memory               `StageLayer.solve`

When the first in the queue costs no less than the best plan, nothing can beat that. Stopped before, by time
or by hand, the first in the queue is the bound. So that there is a plan by then, now and then the likeliest
way that memory allows is priced out of turn (`autopar.search.likely`), and after the proof some more, to be
runners-up. Ties are broken by order of arrival: the same input takes the same way through the space whatever
the machine's load.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.plan import Parallelism
from autopar.search.candidates import Candidates
from autopar.search.likely import LikelyWays
from autopar.search.local_programs import Program
from autopar.search.nodes import (
    LayoutNode,
    MixedNode,
    Node,
    OpenNode,
    ScheduledNode,
    SmallerNode,
    WayNode,
)
from autopar.search.other_programs import NEGLIGIBLE, OtherPrograms
from autopar.search.outcome import Outcome, Solved
from autopar.search.space import Layout, Scheduled

if TYPE_CHECKING:
    from autopar.search.planner import Planner


DIVES_EVERY = 1.03
"""By how much the work grows from one dive to the next: so their number grows like its logarithm."""

FIRST_LOOK = 64.0
"""The work after which the search first looks ahead for better ways."""

LOOKS_EVERY = 1.5
"""By how much it grows from one time to the next."""

PROGRAMS_EVERY = 3
"""The programs after which it looks ahead again anyway: they are most of the work of large models."""

MOST_DIVES = 3
"""How often a dive is repeated that hit upon something that does not fit."""

MORE_WORK = 1.1
"""The work that runners-up may take with the search itself, in times of that."""

MORE_CUTS = 64
"""The programs that are made, and the times that one is cut into stages, after which no further node is
looked at for them: what looks at large models cost, and the same whatever is forgotten and made again."""

MOST_RESCUES = 32
"""How many ways are tried where a search was stopped before it had a plan."""

REPORT_EVERY = 256
"""Arrivals in the queue between two reports of progress."""


@dataclass(frozen=True)
class Progress:
    """How far a search is: candidates decided of all, what it looks at, the best so far and its gap."""

    num_decided: int
    num_candidates: int
    looking_at: str
    best: Solved | None
    gap: float


class BranchAndBound:
    """One search. `tolerance` is the gap that is good enough."""

    def __init__(
        self,
        planner: Planner,
        layouts: tuple[Layout, ...],
        tolerance: float,
        report: Callable[[Progress], None],
        deadline: float | None,
    ) -> None:
        self.planner = planner
        self.floors = planner.way_floors
        self.candidates = Candidates(planner, layouts)
        self.tolerance = tolerance
        self.report = report
        self.deadline = deadline
        self.outcome = Outcome()
        self.likely = LikelyWays(planner, self.candidates, self.outcome)
        self.others = OtherPrograms(planner, self.outcome)
        self.stopped: str | None = None
        self.most_work: int | None = None
        self._queue: list[tuple[float, int, Node]] = []
        self._arrivals = 0
        self._next_dive = 0.0
        self._num_programs = 0  # made since the search last looked ahead
        self._next_look = FIRST_LOOK
        self._reported = 0

    @property
    def num_candidates(self) -> int:
        """All ways to run all layouts."""
        return self.candidates.total

    @property
    def work(self) -> int:
        """How much was looked at, whatever the machine's load; a search stops at `most_work`."""
        return self._arrivals

    @property
    def floor_s(self) -> float:
        """Nothing that was not solved takes less."""
        return self._queue[0][0] if self._queue else float("inf")

    @property
    def _num_cuts(self) -> int:
        """The programs that were made, and the times that one was cut into stages."""
        return self.planner.effort.num_problems("local programs", "stages")

    @property
    def _enough_s(self) -> float:
        """What is bounded by this need not be looked at any closer."""
        return self.outcome.best_s * (1 - self.tolerance)

    @property
    def bound_s(self) -> float:
        """No candidate takes less."""
        return min(self.outcome.best_s, self.floor_s, self.outcome.floor_s)

    def run(self, num_runners_up: int = 0) -> Outcome:
        """Search until the best is proven, and price some more meshes beside what was found, or until time or
        the user says so."""
        incumbent = self.outcome.best
        try:
            self._run()
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        if self.stopped is not None and self.outcome.best is None:
            with suppress(KeyboardInterrupt):
                self._rescue()
        if self.stopped is None and self.outcome.best is not incumbent:
            with suppress(KeyboardInterrupt):  # the proof stands
                self._price_more(num_runners_up)
        self._count_left()
        self._report(None, always=True)
        return self.outcome

    def _run(self) -> None:
        for layout in self.candidates.layouts:
            if self.floors.may_fit(layout):
                self._push(self.floors.quick_layout_s(layout), LayoutNode(layout))
            else:
                self.outcome.prune("memory floor", self.candidates.number(layout))
        for _, _, node in self._queue:
            if isinstance(node, LayoutNode) and not self._is_late():
                self.likely.add(node.layout)
        while self._queue and self.floor_s < self._enough_s:
            if self._is_late():
                self.stopped = "time limit"
                return
            if self.most_work is not None and self.work > self.most_work:
                self.stopped = "work limit"
                return
            self._step()
            if self._arrivals >= self._next_look or self._num_programs >= PROGRAMS_EVERY:
                self._next_look = max(self._next_look, LOOKS_EVERY * self._arrivals)
                self._num_programs = 0
                self.likely.look_ahead(self._is_late)
                self._dive()
            elif self._arrivals >= self._next_dive:
                self._dive()

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _step(self) -> None:
        """Look at the first in the queue."""
        floor_s, _, node = self._queue[0]
        best = self.outcome.best
        found = list(self._expand(floor_s, node))
        heapq.heappop(self._queue)
        for entry in found:
            self._push(*entry)
        self._report(node, always=self.outcome.best is not best)

    def _push(self, floor_s: float, node: Node) -> None:
        heapq.heappush(self._queue, (floor_s, self._arrivals, node))
        self._arrivals += 1

    def _dive(self) -> None:
        """Price the likeliest ways, until one fits; they stay in the queue."""
        for _ in range(MOST_DIVES):
            solved = self.likely.price(self.outcome.best_s)
            if solved is not None:
                self._next_dive = DIVES_EVERY * self._arrivals
            if solved is None or solved.evaluated.fits:
                return

    def _rescue(self) -> None:
        """Find any plan: of the likeliest, or the first in the queue, whichever memory allows."""
        for _ in range(MOST_RESCUES):
            self.likely.look_ahead(lambda: self.likely.has_drafts)
            if not self.likely.has_drafts:
                break
            self.likely.price()
            if self.outcome.best is not None:
                return
        for _, _, node in heapq.nsmallest(MOST_RESCUES, self._queue):
            if isinstance(node, OpenNode):
                p = min(self._ways_of(node), key=self.floors.likely_s, default=None)
            else:
                p = node.p
            if p is not None:
                self.outcome.offer(p, self.planner.solve(p))
            if self.outcome.best is not None:
                return

    def _ways_of(self, node: OpenNode) -> Iterator[Parallelism]:
        if isinstance(node, ScheduledNode):
            yield from self.candidates.of(node.scheduled)
        else:
            for scheduled in self.candidates.schedules(node.layout, overlapping=node.overlapping):
                yield from self.candidates.of(scheduled)

    def _price_more(self, number: int) -> None:
        """Price more meshes until there are so many beside the best: as they come out of the queue, while
        that is little more work, and then the likeliest."""
        most_work, most_cuts = MORE_WORK * self.work, self._num_cuts + MORE_CUTS
        while self._queue and self.outcome.num_meshes <= number:
            if self.work >= most_work or self._num_cuts >= most_cuts:
                break
            self._step()
        for _ in range(MOST_DIVES * number):
            if self.outcome.num_meshes > number or self.likely.price() is None:
                return

    def _expand(self, floor_s: float, node: Node) -> Iterator[tuple[float, Node]]:
        """What a node turns into, each with its floor."""
        match node:
            case LayoutNode(layout, None):
                for overlapping in (False, True):
                    close_s = max(floor_s, self.floors.layout_s(layout, overlapping=overlapping))
                    yield close_s, LayoutNode(layout, overlapping)
            case LayoutNode(layout, overlapping):
                for scheduled in self.candidates.schedules(layout, overlapping=overlapping):
                    yield from self._bounded(
                        floor_s, ScheduledNode(scheduled), self.floors.scheduled_s(scheduled)
                    )
            case ScheduledNode():
                yield from self._closer(floor_s, node)
            case WayNode(p, None, False) if not self.planner.programs.has_fastest(p):
                close_s = self.floors.close_s(p)
                if close_s < float("inf"):
                    yield max(floor_s, close_s), node._replace(is_close=True)
                else:
                    self.outcome.decide(p, "out of memory")
            case WayNode(p, None):
                self._num_programs += not self.planner.programs.has_fastest(p)
                program = self.planner.programs.program(p)
                yield max(floor_s, self.floors.way_s(p, program)), WayNode(p, program)
            case WayNode(p, Program() as program, False):
                close_s = self.floors.stages_s(p, program, self._enough_s)
                if close_s < float("inf"):
                    yield max(floor_s, close_s), node._replace(is_close=True)
                else:
                    self.outcome.decide(p, "out of memory")
            case WayNode(_, _, True, None):
                yield from self._draft(floor_s, node)
            case WayNode(p, program, True, draft, False):
                assert program is not None, "it has a draft"
                assert draft is not None, "all others were matched"
                tight = self.planner.layer.tightened(program, p, draft, self._enough_s)
                yield max(floor_s, tight.bound_s), node._replace(draft=tight, is_tight=True)
            case WayNode():
                yield from self._solve(floor_s, node)
            case SmallerNode():
                yield from self.others.closer(floor_s, node, self._enough_s)
            case MixedNode():
                self.others.solve_mixed(node)

    def _closer(self, floor_s: float, node: ScheduledNode) -> Iterator[tuple[float, Node]]:
        """A closer look at a schedule; or its ways, once there is no other."""
        scheduled, program, is_close = node
        p = self.floors.freest(scheduled)
        if program is None and self.planner.programs.has_fastest(p):
            program = self.planner.programs.program(p)
            step_s = self.floors.scheduled_s(scheduled, program)
            yield from self._bounded(floor_s, ScheduledNode(scheduled, program), step_s)
        elif is_close:
            yield from self._open(floor_s, scheduled, program)
        else:
            step_s = self.floors.busiest_s(scheduled, program)
            yield from self._bounded(floor_s, node._replace(is_close=True), step_s)

    def _bounded(self, floor_s: float, node: ScheduledNode, step_s: float) -> Iterator[tuple[float, Node]]:
        """A schedule that takes `step_s` at least, unless memory allows no way at all."""
        if step_s < float("inf"):
            yield max(floor_s, step_s), node
        else:
            self.outcome.prune("memory floor", self.candidates.num_shardings(node.scheduled))

    def _open(
        self, floor_s: float, scheduled: Scheduled, program: Program | None
    ) -> Iterator[tuple[float, Node]]:
        """The ways to run a layout with a schedule for which memory may suffice."""
        number = self.candidates.num_shardings(scheduled)
        for way in self.candidates.fitting(scheduled):
            number -= 1
            yield max(floor_s, self.floors.way_s(way, program)), WayNode(way, program)
        self.outcome.prune("memory floor", number)

    def _draft(self, floor_s: float, node: WayNode) -> Iterator[tuple[float, Node]]:
        """Cut stages; where memory makes that slow, smaller programs may do better."""
        p, program = node.p, node.program
        assert program is not None
        draft = self.planner.layer.draft(program, p)
        if draft is not None:
            self.others.note(p, program.key.price_level, draft.bound_s)
            drafted = node._replace(draft=draft)
            self.likely.add_draft(p, program, draft)
            yield max(floor_s, draft.bound_s), drafted
        fastest_s = float("inf") if draft is None else draft.bound_s
        if p.tp > 1 and fastest_s * (1 - NEGLIGIBLE) > floor_s:
            yield floor_s, SmallerNode(p, program.key.price_level + 1, fastest_s)
        elif draft is None:
            self.outcome.decide(p, "out of memory")
        elif p.tp > 1:
            self.outcome.leave(floor_s)

    def _solve(self, floor_s: float, node: WayNode) -> Iterator[tuple[float, Node]]:
        """Price a way with the program it has; others are worth a look where it takes longer than it seemed
        to."""
        assert node.program is not None
        solved = self.planner.layer.solve(node.program, node.p, node.draft)
        assert solved is not None, "what has a draft has units enough"
        # Another relaxation may have proven more than the draft.
        self.outcome.add(node.p, replace(solved, bound_s=max(solved.bound_s, floor_s)))
        if not solved.evaluated.fits:
            self.outcome.leave(floor_s)
        step_s = solved.evaluated.step_s if solved.evaluated.fits else float("inf")
        self.others.note(node.p, node.program.key.price_level, step_s)
        yield from self.others.reopened(node.p, self.tolerance)

    def _count_left(self) -> None:
        """What is still in the queue, or in what there is not opened yet."""
        number = self.num_candidates - self.outcome.num_decided
        assert number >= 0, "what was priced was not dropped before"
        self.outcome.prune(self.stopped or "time floor", number)

    def _report(self, node: Node | None, *, always: bool) -> None:
        if not always and self._arrivals - self._reported < REPORT_EVERY:
            return
        self._reported = self._arrivals
        gap = self.outcome.gap(self.floor_s)
        best = self.outcome.best
        looking_at = "" if node is None or isinstance(node, OpenNode) else str(node.p)
        self.report(Progress(self.outcome.num_decided, self.num_candidates, looking_at, best, gap))
