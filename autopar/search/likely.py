"""Ways that are likely to be good, priced out of turn: a search needs a plan long before its proof.

What comes first in the queue of a search has the least floor, and floors say little of what memory costs. So
ways are kept here in orders of their own: those that were cut into stages by the least that these take, those
without a program by what they would take were all their stages alike, and some of the best of the latter by
what even cuts and memory make of one device's work, in proportion to what programs of the same degrees turned
out to take. The first is what to price; looking ahead turns some of the others into it.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from autopar.plan import Parallelism
from autopar.search.outcome import Outcome, Solved
from autopar.search.programs import Program, ProgramKey
from autopar.search.staging import Draft

if TYPE_CHECKING:
    from autopar.search.planner import Planner

MOST_LOOKS = 16
"""How many ways are cut into stages each time."""

CLOSER_LOOKS = 0.5
"""How many are looked at more closely before, in times of the root of how many there are."""

MOST_PROGRAMS = 2
"""How many programs that were not looked at before may be made for that."""


class Drafted(NamedTuple):
    """A way with the stages of a program."""

    p: Parallelism
    program: Program
    draft: Draft


class Likely(NamedTuple):
    """A way without a program: what it takes as far as one device can tell."""

    p: Parallelism
    likely_s: float

    @property
    def degrees(self) -> tuple[int, int, int]:
        """What programs differ by most."""
        return self.p.tp, self.p.cp, self.p.ep


class LikelyWays:
    """The likely ways of one search, which notes their prices in its `outcome`."""

    def __init__(self, planner: Planner, outcome: Outcome) -> None:
        self.planner = planner
        self.outcome = outcome
        self._drafted: list[tuple[float, int, Drafted]] = []
        self._open: list[tuple[float, int, Parallelism]] = []
        self._close: list[tuple[float, int, Likely]] = []
        self._close_s: dict[Parallelism, float] = {}
        self._slower: dict[tuple[int, int, int], float] = {}
        self._seen: set[ProgramKey] = set()
        self._ties = count()

    def add(self, p: Parallelism, floor_s: float) -> None:
        """A way without a program, which takes `floor_s` at least."""
        likely_s = max(floor_s, self.planner.way_floors.likely_s(p))
        heapq.heappush(self._open, (likely_s, next(self._ties), p))

    def add_draft(self, p: Parallelism, program: Program, draft: Draft) -> None:
        """A way that was cut into stages."""
        heapq.heappush(self._drafted, (draft.bound_s, next(self._ties), Drafted(p, program, draft)))

    def close_s(self, p: Parallelism) -> float:
        """No program of a way takes less, from what one device does and keeps; infinite where memory allows
        none."""
        if p not in self._close_s:
            self._close_s[p] = self.planner.layer.floor_s(self.planner.programs.divided(p), p)
        return self._close_s[p]

    def look_ahead(self) -> None:
        """Cut the best of those without a program into stages."""
        self._look_closer()
        num_programs = 0
        for _ in range(MOST_LOOKS):
            way = self._likeliest() if num_programs < MOST_PROGRAMS else None
            if way is None:
                return
            program = self.planner.programs.program(way.p)
            num_programs += program.key not in self._seen
            self._seen.add(program.key)
            draft = self.planner.layer.draft(program, way.p)
            if draft is not None:
                self._slower[way.degrees] = draft.bound_s / way.likely_s
                self.add_draft(way.p, program, draft)

    def _look_closer(self) -> None:
        """Some of the best, with memory and even cuts; where these leave nothing, a way is dropped."""
        for _ in range(int(CLOSER_LOOKS * len(self._open) ** 0.5)):
            if not self._open or self._open[0][0] >= self.outcome.best_s:
                return
            likely_s, _, p = heapq.heappop(self._open)
            self._push(Likely(p, max(likely_s, self.close_s(p))))

    def _likeliest(self) -> Likely | None:
        """The way that is expected to take least, if that is less than the best; it is taken out."""
        while self._close:
            expected_s, _, way = heapq.heappop(self._close)
            if self._expected_s(way) > expected_s:
                self._push(way)  # programs like its own were found to be slower since
            else:
                return way
        return None

    def _push(self, way: Likely) -> None:
        expected_s = self._expected_s(way)
        if expected_s < self.outcome.best_s:
            heapq.heappush(self._close, (expected_s, next(self._ties), way))

    def _expected_s(self, way: Likely) -> float:
        """What a way takes if its program is as much slower than one device's as the last of its degrees."""
        return way.likely_s * self._slower.get(way.degrees, 1.0)

    def price(self, below_s: float = float("inf")) -> Solved | None:
        """Price the best of those that were cut into stages, if it may take less than `below_s`."""
        while self._drafted and self._drafted[0][0] < below_s:
            _, _, (p, program, draft) = heapq.heappop(self._drafted)
            if p not in self.outcome.decided:
                solved = self.planner.layer.solve(program, p, draft)
                if solved is not None:
                    self.outcome.offer(p, solved)
                return solved
        return None

    @property
    def has_drafts(self) -> bool:
        """Whether there is one to price."""
        return bool(self._drafted)
