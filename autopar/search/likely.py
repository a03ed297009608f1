"""Ways that are likely to be good, priced out of turn: a search needs a plan long before its proof.

What comes first in the queue of a search has the least floor, and floors say little of what memory and small
kernels cost. So what looks likely is kept here in queues of its own, each a closer look at a part of the one
before:

    layouts       the strategies of their axes                          `WayFloors.layout_s`
    schedules     what they would take were all their stages alike      `WayFloors.likely_s`
    ways          the same with what their data axes move               the same
    close ways    even cuts and memory, of one device's work divided    `WayFloors.close_s`
    drafts        stages of a program                                   `StageLayer.draft`

What has no program yet is expected to take as many times longer as the drafts of its degrees turned out to
take, seen from the same queue; degrees without a draft are thought to be like those next to them. What is
expected to take least is looked at more closely, until that leads nowhere. The drafts are what to price.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from math import log2
from typing import TYPE_CHECKING, NamedTuple

from autopar.plan import Parallelism
from autopar.search.candidates import Candidates
from autopar.search.local_programs import Program
from autopar.search.outcome import Outcome, Solved
from autopar.search.space import Layout, Scheduled
from autopar.search.staging import Draft

if TYPE_CHECKING:
    from autopar.search.planner import Planner

PATIENCE = 12
"""How many drafts may follow each other that are no better than one before."""

NUM_LOOKS = 4
"""At layouts, schedules, ways, and ways more closely."""

LOOKS_EACH = 64
"""How many closer looks count as much as a draft."""

FEW_ROUNDS = 3
"""How often chains are looked for before a draft is priced."""

MISFIT = 2.0
"""How many times longer than was likely a way is said to take that does not fit."""


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


class Open(NamedTuple):
    """What has no program yet, and how long it was thought to take at every look."""

    kind: Schedules | Scheduled | Parallelism
    likely_s: tuple[float, ...]

    @property
    def degrees(self) -> tuple[int, int, int]:
        """Those by which programs differ most."""
        layout = self.kind if isinstance(self.kind, Parallelism) else self.kind.layout
        return layout.tp, layout.cp, layout.ep

    def closer(self, kind: Scheduled | Parallelism, likely_s: float) -> Open:
        """After a closer look at it, or at a part of it."""
        return Open(kind, (*self.likely_s, max(self.likely_s[-1], likely_s)))


class Expected:
    """Queues by what is likely, for every degrees and number of looks, and how many times longer drafts of
    the same turned out to take."""

    def __init__(self) -> None:
        self._heaps: dict[Seen, list[tuple[float, int, Open]]] = {}
        self._slower: dict[Seen, float] = {}
        self._nearest: dict[Seen, float] = {}
        self._ties = count()

    def push(self, item: Open) -> None:
        seen = len(item.likely_s), item.degrees
        heapq.heappush(self._heaps.setdefault(seen, []), (item.likely_s[-1], next(self._ties), item))

    def pop(self, below_s: float) -> Open | None:
        """What is expected to take least, if that is less than `below_s`; before anything was learnt, of what
        was looked at most closely."""
        filled = [(seen, heap) for seen, heap in self._heaps.items() if heap]
        if not self._slower:
            most = max((looks for (looks, _), _ in filled), default=0)
            filled = [(seen, heap) for seen, heap in filled if seen[0] == most]
        expected = ((heap[0][0] * self._factor(seen), seen) for seen, heap in filled)
        least_s, seen = min(expected, default=(below_s, None))
        if seen is None or least_s >= below_s:
            return None
        return heapq.heappop(self._heaps[seen])[2]

    def learn(self, item: Open, draft_s: float) -> None:
        """A way turned out to take so long."""
        for looks, likely_s in enumerate(item.likely_s, start=1):
            seen, slower = (looks, item.degrees), draft_s / likely_s
            self._slower[seen] = min(slower, self._slower.get(seen, slower))
        self._nearest.clear()

    def _factor(self, seen: Seen) -> float:
        if seen in self._slower:
            return self._slower[seen]
        if seen not in self._nearest:
            looks, degrees = seen
            known = [other for other in self._slower if other[0] == looks]
            nearest = min(known, key=lambda other: (_apart(degrees, other[1]), other[1]), default=seen)
            self._nearest[seen] = self._slower.get(nearest, 1.0)
        return self._nearest[seen]


Seen = tuple[int, tuple[int, int, int]]
"""A number of looks, and degrees."""


def _apart(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How far degrees are from each other."""
    return sum(abs(log2(a / b)) for a, b in zip(one, other, strict=True))


class LikelyWays:
    """The likely ways of one search, which notes their prices in its `outcome`."""

    def __init__(self, planner: Planner, candidates: Candidates, outcome: Outcome) -> None:
        self.planner = planner
        self.candidates = candidates
        self.outcome = outcome
        self._open = Expected()
        self._drafted: list[tuple[float, int, Drafted]] = []
        self._best_draft_s = float("inf")
        self._ties = count()

    def add(self, layout: Layout, floor_s: float, *, overlapping: bool) -> None:
        """Ways to run a layout, which take `floor_s` at least: those whose schedules hide communication, or
        the others."""
        self._open.push(Open(Schedules(layout, overlapping), (floor_s,)))

    def add_draft(self, p: Parallelism, program: Program, draft: Draft) -> None:
        """A way that was cut into stages."""
        self._best_draft_s = min(self._best_draft_s, draft.bound_s)
        self._push(Drafted(p, program, draft))

    def look_ahead(self) -> None:
        """Look at what is likely, cutting the likeliest ways into stages."""
        idle = 0.0
        while idle < PATIENCE and (item := self._open.pop(self.outcome.best_s)) is not None:
            if len(item.likely_s) < NUM_LOOKS:
                idle += 1 / LOOKS_EACH
                for closer in self._closer(item):
                    self._open.push(closer)
            else:
                before_s = min(self._best_draft_s, self.outcome.best_s)
                self._draft(item)
                idle = 0.0 if self._best_draft_s < before_s else idle + 1

    def _closer(self, item: Open) -> Iterator[Open]:
        floors, kind = self.planner.way_floors, item.kind
        match kind:
            case Schedules():
                for scheduled in self.candidates.schedules(kind.layout, overlapping=kind.overlapping):
                    yield item.closer(scheduled, floors.likely_s(scheduled))
            case Scheduled():
                for p in self.candidates.fitting(kind):
                    yield item.closer(p, floors.likely_s(p))
            case _:
                yield item.closer(kind, floors.close_s(kind))

    def _draft(self, item: Open) -> None:
        """Cut a way into stages, and learn from it."""
        assert isinstance(item.kind, Parallelism), "all others were looked at more closely"
        program = self.planner.programs.program(item.kind)
        draft = self.planner.layer.draft(program, item.kind)
        if draft is None:
            self._open.learn(item, MISFIT * item.likely_s[-1])
        else:
            self._open.learn(item, draft.bound_s)
            self.add_draft(item.kind, program, draft)

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
