"""Ways that are likely to be good, priced out of turn: a search needs a plan long before its proof.

What comes first in the queue of a search has the least floor, and floors say little of what memory and small
kernels cost. So what looks likely is kept here in queues of its own, each a closer look at a part of the one
before:

    layouts       about what they would take were all stages alike      `WayFloors.likely_s`
    schedules     the same with their bubble                            the same
    ways          the same with what their data axes move               the same
    close ways    even cuts and memory, of one device's work divided    `WayFloors.likely_close_s`
    drafts        stages of a program                                   `StageLayer.draft`

What has no program yet is expected to take as many times longer as the best draft of its degrees and
schedule turned out to take, seen from the same queue, or somewhat less; those without a draft are taken
almost at their word. Of layouts, which have no schedule yet, those with schedules that hide communication are
kept apart from those with others: drafts of these say little of them.
What is expected to take least is looked at more closely, until that leads nowhere. The drafts are what to
price.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
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
"""How many drafts may follow each other that are no better than one before; at first only a quarter."""

NUM_LOOKS = 4
"""At layouts, at schedules, at ways, and at these more closely."""

AT_FIRST = (1.1, 1.08, 1.03, 1.0)
"""How many times longer than likely ways are expected to take, by the number of looks, before a draft tells:
what was looked at less closely disappoints more."""

LOOKS_EACH = 64
"""How many closer looks count as much as a draft."""

MOST_LOOKS = 512
"""How many do as long as there is nothing to compare with."""

FEW_ROUNDS = 3
"""How often chains are looked for before a draft is priced."""


MISFIT = 1.2
"""How many times longer ways that are alike are expected to take after each that did not fit, as long as none
does."""

TRUST = 0.5
"""How far what a draft took longer is believed of others: the power of it that counts."""


class Alike(NamedTuple):
    """What has much to do with how far off the mark an expectation is: the degrees by which programs differ
    most, tensor, context and expert; whether schedules hide communication; and which it is, None for layouts.
    """

    tp: int
    cp: int
    ep: int
    overlapping: bool
    schedule: str | None = None


class Drafted(NamedTuple):
    """A way with the stages of a program."""

    p: Parallelism
    program: Program
    draft: Draft
    is_tight: bool = False


class Open(NamedTuple):
    """What has no program yet, and how long it was thought to take at every look."""

    kind: Layout | Scheduled | Parallelism
    likely_s: tuple[float, ...]
    overlapping: bool
    """With schedules that hide communication, or with the others."""

    @property
    def alike(self) -> Alike:
        """What others that are as far off the mark have in common with it."""
        layout = self.kind.layout if isinstance(self.kind, Scheduled) else self.kind
        schedule = None if isinstance(self.kind, Layout) else self.kind.schedule
        return Alike(layout.tp, layout.cp, layout.ep, self.overlapping, schedule)

    def closer(self, kind: Scheduled | Parallelism, likely_s: float) -> Open:
        """After a closer look at it, or at a part of it."""
        return Open(kind, (*self.likely_s, max(self.likely_s[-1], likely_s)), self.overlapping)


class Expected:
    """Queues by what is likely, one for each number of looks, of what is alike; `slower` tells how many times
    longer than was likely the best draft of these takes, seen from each queue, and `AT_FIRST` before there is
    one."""

    def __init__(self) -> None:
        self.queues: list[list[tuple[float, int, Open]]] = [[] for _ in range(NUM_LOOKS)]
        self.slower = list(AT_FIRST)
        self._has_learnt = False
        self._first: tuple[float, int] | None = None  # until something changes

    def push(self, item: Open, tie: int) -> None:
        self._first = None
        heapq.heappush(self.queues[len(item.likely_s) - 1], (item.likely_s[-1], tie, item))

    def first(self) -> tuple[float, int]:
        """What is expected to take least, and its number of looks."""
        if self._first is None:
            filled = zip(self.queues, self.slower, count(1), strict=False)
            firsts = ((queue[0][0] * slower, looks) for queue, slower, looks in filled if queue)
            self._first = min(firsts, default=(float("inf"), 0))
        return self._first

    def pop(self, looks: int) -> Open:
        """The likeliest that was looked at so often."""
        self._first = None
        return heapq.heappop(self.queues[looks - 1])[2]

    def learn(self, item: Open, draft_s: float) -> None:
        """A way turned out to take so long."""
        self._first = None
        found = [(draft_s / likely_s) ** TRUST for likely_s in item.likely_s]
        self.slower = list(map(min, found, self.slower)) if self._has_learnt else found
        self._has_learnt = True

    def learn_misfit(self) -> None:
        """A way turned out not to fit."""
        if not self._has_learnt:
            self._first = None
            self.slower = [MISFIT * slower for slower in self.slower]


class LikelyWays:
    """The likely ways of one search, which notes their prices in its `outcome`."""

    def __init__(self, planner: Planner, candidates: Candidates, outcome: Outcome) -> None:
        self.planner = planner
        self.candidates = candidates
        self.outcome = outcome
        self._open: defaultdict[Alike, Expected] = defaultdict(Expected)
        self._drafted: list[tuple[float, int, Drafted]] = []
        self._best_draft_s = float("inf")
        self._patience = PATIENCE / 4
        self._ties = count()

    def add(self, layout: Layout) -> None:
        """All ways to run a layout."""
        for overlapping in (False, True):
            if self.candidates.number(layout, overlapping=overlapping):
                likely_s = self.planner.way_floors.likely_s(layout, overlapping=overlapping)
                self._add(Open(layout, (likely_s,), overlapping))

    def add_draft(self, p: Parallelism, program: Program, draft: Draft) -> None:
        """A way that was cut into stages."""
        self._best_draft_s = min(self._best_draft_s, draft.bound_s)
        self._push(Drafted(p, program, draft))

    def look_ahead(self, is_over: Callable[[], bool]) -> None:
        """Look at what is likely, cutting the likeliest ways into stages, as long as it takes to find one
        that fits, or until it `is_over`."""
        idle = 0.0
        while idle < self._patience and not is_over() and (item := self._pop()) is not None:
            if len(item.likely_s) < NUM_LOOKS:
                idle += 1 / (LOOKS_EACH if self._drafted or self.outcome.best else MOST_LOOKS)
                for closer in self._closer(item):
                    self._add(closer)
            else:
                before_s = min(self._best_draft_s, self.outcome.best_s)
                self._draft(item)
                idle = 0.0 if self._best_draft_s < before_s else idle + 1
        self._patience = min(PATIENCE, 2 * self._patience)

    def _add(self, item: Open) -> None:
        self._open[item.alike].push(item, next(self._ties))

    def _pop(self) -> Open | None:
        """What is expected to take least, if that is less than the best."""
        expected = min(self._open.values(), key=Expected.first, default=None)
        if expected is None:
            return None
        least_s, looks = expected.first()
        return expected.pop(looks) if least_s < self.outcome.best_s else None

    def _closer(self, item: Open) -> Iterator[Open]:
        floors, kind = self.planner.way_floors, item.kind
        match kind:
            case Layout():
                for scheduled in self.candidates.schedules(kind, overlapping=item.overlapping):
                    yield item.closer(scheduled, floors.likely_s(scheduled))
            case Scheduled() if floors.busiest_s(kind, None) < float("inf"):
                for p in self.candidates.fitting(kind):
                    yield item.closer(p, floors.likely_s(p))
            case Parallelism() if (close_s := floors.likely_close_s(kind)) < float("inf"):
                yield item.closer(kind, close_s)

    def _draft(self, item: Open) -> None:
        """Cut a way into stages, and learn from it."""
        assert isinstance(item.kind, Parallelism), "all others were looked at more closely"
        program = self.planner.programs.program(item.kind)
        draft = self.planner.layer.draft(program, item.kind)
        alike = self._open[item.alike], self._open[item.alike._replace(schedule=None)]
        if draft is None:
            for expected in alike:
                expected.learn_misfit()
        else:
            for expected in alike:
                expected.learn(item, draft.bound_s)
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
                if not solved.evaluated.fits:  # others may
                    self._best_draft_s = min((each[0] for each in self._drafted), default=float("inf"))
            return solved
        return None

    def _push(self, drafted: Drafted) -> None:
        heapq.heappush(self._drafted, (drafted.draft.bound_s, next(self._ties), drafted))

    @property
    def has_drafts(self) -> bool:
        """Whether there is one to price."""
        return bool(self._drafted)
