"""Ways that are likely to be good, priced out of turn: a search needs a plan long before its proof.

What comes first in the queue of a search has the least floor, and floors say little of what memory costs. So
ways are kept here in two orders of their own: those that were cut into stages by the least that these take,
and those without a program by what they would take were all their stages alike. The first is what to price;
looking ahead turns some of the second into the first.
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
"""How many ways are looked at each time."""

MOST_PROGRAMS = 2
"""How many programs that were not looked at before may be made for that."""


class Drafted(NamedTuple):
    """A way with the stages of a program."""

    p: Parallelism
    program: Program
    draft: Draft


class LikelyWays:
    """The likely ways of one search, which notes their prices in its `outcome`."""

    def __init__(self, planner: Planner, outcome: Outcome) -> None:
        self.planner = planner
        self.outcome = outcome
        self._drafted: list[tuple[float, int, Drafted]] = []
        self._open: list[tuple[float, int, Parallelism]] = []
        self._seen: set[ProgramKey] = set()
        self._ties = count()

    def add(self, p: Parallelism, floor_s: float) -> None:
        """A way without a program, which takes `floor_s` at least."""
        likely_s = max(floor_s, self.planner.way_floors.likely_s(p))
        heapq.heappush(self._open, (likely_s, next(self._ties), p))

    def add_draft(self, p: Parallelism, program: Program, draft: Draft) -> None:
        """A way that was cut into stages."""
        heapq.heappush(self._drafted, (draft.bound_s, next(self._ties), Drafted(p, program, draft)))

    def look_ahead(self) -> None:
        """Cut the best of those without a program into stages."""
        num_programs = 0
        for _ in range(MOST_LOOKS):
            if not self._open or self._open[0][0] >= self.outcome.best_s or num_programs == MOST_PROGRAMS:
                return
            _, _, p = heapq.heappop(self._open)
            program = self.planner.programs.program(p)
            num_programs += program.key not in self._seen
            self._seen.add(program.key)
            draft = self.planner.layer.draft(program, p)
            if draft is not None:
                self.add_draft(p, program, draft)

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
