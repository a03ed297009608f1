"""Ways that are likely to be good, priced out of turn: a search needs a plan long before its proof.

What comes first in the queue of a search has the least floor, and floors say little of what memory and small
kernels cost. So what looks likely is kept here in queues of its own, each a closer look at the best of the
one before:

    layouts       the strategies of their axes                          `WayFloors.layout_s`
    ways          what they would take were all their stages alike      `WayFloors.likely_s`
    close ways    even cuts and memory, of one device's work divided    `WayFloors.close_s`
    drafts        stages of a program                                   `StageLayer.draft`

What has no program yet is expected to take as many times longer as the last one of its degrees turned out to
take; degrees without a draft are taken at their word, which mostly puts them first. The drafts are what to
price.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from autopar.plan import Parallelism
from autopar.search.candidates import Candidates
from autopar.search.local_programs import Program
from autopar.search.outcome import Outcome, Solved
from autopar.search.space import Layout
from autopar.search.staging import Draft

if TYPE_CHECKING:
    from autopar.search.planner import Planner

MOST_DRAFTS = 16
"""How many ways are cut into stages each time."""

MOST_PROGRAMS = 2
"""How many programs that were not looked at before may be made for that."""

FEW_ROUNDS = 3
"""How often chains are looked for before a draft is priced."""

LOOKS_PER_ROOT = 0.25
"""Of n open layouts, or ways, 1 + so many times √n are looked at more closely each time."""


class Drafted(NamedTuple):
    """A way with the stages of a program."""

    p: Parallelism
    program: Program
    draft: Draft
    is_tight: bool = False


class Schedules(NamedTuple):
    """The ways to run a layout whose schedules hide communication, or the others."""

    layout: Layout
    overlapping: bool

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.layout.tp, self.layout.cp, self.layout.ep


class Way(NamedTuple):
    """A way without a program, and how long it was thought to take at every look."""

    p: Parallelism
    likely_s: tuple[float, ...]

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.p.tp, self.p.cp, self.p.ep


Open = TypeVar("Open", Schedules, Way)


class Expected(Generic[Open]):
    """A queue by what is expected to take least, as long as that is less than the best. What is known of
    `tp`, `cp` and `ep`, which programs differ by most, is how many times longer than was likely the last
    draft takes."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._slower: dict[tuple[int, int, int], float] = {}
        self._heap: list[tuple[float, int, float, Open]] = []
        self._ties = count()

    def push(self, likely_s: float, item: Open) -> None:
        """Something that takes so long, as far as is known."""
        expected_s = self._expected_s(likely_s, item)
        if expected_s < self.outcome.best_s:
            heapq.heappush(self._heap, (expected_s, next(self._ties), likely_s, item))

    def pop(self) -> tuple[float, Open] | None:
        """What is likely, and the first; None for an empty queue."""
        while self._heap:
            expected_s, _, likely_s, item = heapq.heappop(self._heap)
            if self._expected_s(likely_s, item) <= expected_s:
                return likely_s, item
            self.push(likely_s, item)  # programs like its own were found to be slower since
        return None

    def learn(self, way: Way, likely_s: float, draft_s: float) -> None:
        """A way turned out to take so much longer."""
        self._slower[way.degrees] = draft_s / likely_s

    def _expected_s(self, likely_s: float, item: Open) -> float:
        return likely_s * self._slower.get(item.degrees, 1.0)

    def some(self) -> Iterator[tuple[float, Open]]:
        """The first few, taken out."""
        for _ in range(1 + int(LOOKS_PER_ROOT * len(self._heap) ** 0.5)):
            found = self.pop()
            if found is None:
                return
            yield found


class LikelyWays:
    """The likely ways of one search, which notes their prices in its `outcome`."""

    def __init__(self, planner: Planner, candidates: Candidates, outcome: Outcome) -> None:
        self.planner = planner
        self.candidates = candidates
        self.outcome = outcome
        self._layouts = Expected[Schedules](outcome)
        self._ways = Expected[Way](outcome)
        self._close_ways = Expected[Way](outcome)
        self._drafted: list[tuple[float, int, Drafted]] = []
        self._ties = count()

    def add(self, layout: Layout, floor_s: float, *, overlapping: bool) -> None:
        """Ways to run a layout, which take `floor_s` at least: those whose schedules hide communication, or
        the others."""
        self._layouts.push(floor_s, Schedules(layout, overlapping))

    def add_draft(self, p: Parallelism, program: Program, draft: Draft) -> None:
        """A way that was cut into stages."""
        self._push(Drafted(p, program, draft))

    def look_ahead(self) -> None:
        """Cut the best of those without a program into stages."""
        for layout_s, schedules in self._layouts.some():
            for p in self.candidates.fitting(schedules.layout, overlapping=schedules.overlapping):
                way_s = max(layout_s, self.planner.way_floors.likely_s(p))
                self._ways.push(way_s, Way(p, (layout_s, way_s)))
        for way_s, way in self._ways.some():
            close_s = max(way_s, self.planner.way_floors.close_s(way.p))
            self._close_ways.push(close_s, way._replace(likely_s=(*way.likely_s, close_s)))
        num_programs = 0
        for _ in range(MOST_DRAFTS):
            found = self._close_ways.pop() if num_programs < MOST_PROGRAMS else None
            if found is None:
                return
            _, way = found
            num_programs += not self.planner.programs.has_fastest(way.p)
            program = self.planner.programs.program(way.p)
            draft = self.planner.layer.draft(program, way.p)
            if draft is not None:
                self._learn(way, draft.bound_s)
                self.add_draft(way.p, program, draft)

    def _learn(self, way: Way, draft_s: float) -> None:
        self._layouts.learn(way, way.likely_s[0], draft_s)
        self._ways.learn(way, way.likely_s[1], draft_s)
        self._close_ways.learn(way, way.likely_s[2], draft_s)

    def price(self, below_s: float = float("inf")) -> Solved | None:
        """Price the best of those that were cut into stages, if it may take less than `below_s`."""
        while self._drafted and self._drafted[0][0] < below_s:
            _, _, drafted = heapq.heappop(self._drafted)
            p, program, draft, is_tight = drafted
            if p in self.outcome.decided:
                continue
            if not is_tight and below_s < float("inf"):
                draft = self.planner.layer.tightened(program, p, draft, below_s, FEW_ROUNDS)
                self._push(drafted._replace(draft=draft, is_tight=True))
                continue
            solved = self.planner.layer.solve(program, p, draft)
            if solved is not None:
                self.outcome.offer(p, solved)
            return solved
        return None

    def _push(self, drafted: Drafted) -> None:
        heapq.heappush(self._drafted, (drafted.draft.bound_s, next(self._ties), drafted))

    @property
    def has_drafts(self) -> bool:
        """Whether there is one to price."""
        return bool(self._drafted)
