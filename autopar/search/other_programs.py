"""The other programs of a way: smaller ones, at higher prices of memory, and those whose blocks differ.

The fastest program of a way may keep more than memory has room for, and then pays with recomputation. A
smaller one is made where it could still be faster: no program at all beats the relaxations of
`autopar.search.relaxed`, which raise the floor of what is left first. After the smallest, blocks may choose
between all of them (`autopar.search.mixed`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from autopar.plan import Parallelism
from autopar.search.nodes import MixedNode, Node, SmallerNode, WayNode
from autopar.search.outcome import Outcome
from autopar.search.programs import MEMORY_PRICES
from costmodel.orders import OVERLAPPING_SCHEDULES

if TYPE_CHECKING:
    from autopar.search.planner import Planner

NEGLIGIBLE = 1e-3
"""What other programs could gain that is not worth making them: a part of the gap."""


class Look(NamedTuple):
    """A bound over any program: a relaxation, that `trades` memory for time or not, and `is_mixed` with whole
    backwards or not, its stages cut or `is_tight` by many chains of work."""

    trades: bool
    is_mixed: bool = False
    is_tight: bool = False


FEW_LOOKS = (Look(trades=False), Look(trades=True))
"""The bounds that ways get with one stage a rank, the cuts of which have no chains."""

LOOKS = (*FEW_LOOKS, *[Look(trades=True, is_tight=True)] * 2)
"""Those of other ways, one after the other; the last twice, as what is learnt of one way helps the next."""

HIDING_LOOKS = (
    *FEW_LOOKS,
    Look(trades=True, is_mixed=True),
    Look(trades=True, is_tight=True),
    Look(trades=True, is_mixed=True, is_tight=True),
)
"""Those of ways whose schedule hides communication."""


def looks_at(p: Parallelism) -> tuple[Look, ...]:
    """The bounds over any program that a way gets."""
    if p.num_virtual_stages == 1:
        return FEW_LOOKS
    return HIDING_LOOKS if p.schedule in OVERLAPPING_SCHEDULES else LOOKS


class OtherPrograms:
    """What is known of the programs of one search's ways, which notes their prices in its `outcome`."""

    def __init__(self, planner: Planner, outcome: Outcome) -> None:
        self.planner = planner
        self.outcome = outcome
        self._uniform_s: defaultdict[Parallelism, dict[int, float]] = defaultdict(dict)
        # Ways whose fastest program looked no slower than any, with what none can beat.
        self._left: dict[Parallelism, tuple[float, SmallerNode]] = {}

    def note(self, p: Parallelism, price_level: int, step_s: float) -> None:
        """A way takes so long with one program for all blocks: the draft, until it was solved."""
        self._uniform_s[p][price_level] = step_s

    def _least_uniform_s(self, p: Parallelism) -> float:
        """What a way takes with the best program for all blocks, as far as is known."""
        return min(self._uniform_s[p].values(), default=float("inf"))

    def closer(self, floor_s: float, node: SmallerNode, enough_s: float) -> Iterator[tuple[float, Node]]:
        """A closer look: a higher floor, of which no more than `enough_s` is worth while, and in the end a
        smaller program where any could still be faster."""
        p, price, fastest_s, rigour = node
        looks = looks_at(p)
        if rigour < len(looks):
            look = looks[rigour]
            least = self.planner.programs.least.relaxed(p, trades=look.trades, mixed=look.is_mixed)
            draft = self.planner.layer.draft(least, p)
            if draft is not None:
                if look.is_tight:
                    draft = self.planner.layer.tightened(least, p, draft, enough_s)
                yield max(floor_s, draft.bound_s), node._replace(rigour=rigour + 1)
            elif fastest_s == float("inf"):
                self.outcome.decide(p, "out of memory")
        elif price == len(MEMORY_PRICES):
            self.outcome.leave(floor_s)
            yield from self._mix(floor_s, p)
        elif floor_s >= max(fastest_s, self._least_uniform_s(p)) * (1 - NEGLIGIBLE):
            self.outcome.leave(floor_s)
            self._left[p] = floor_s, node
        else:
            yield floor_s, WayNode(p, self.planner.programs.program(p, price), is_close=True)

    def reopened(self, p: Parallelism, tolerance: float) -> Iterator[tuple[float, Node]]:
        """The smaller programs of a way, which were left while its fastest seemed quick enough, if by now
        that is slower by more than the `tolerance`."""
        fastest_s = self._least_uniform_s(p)
        if p in self._left and fastest_s * (1 - tolerance) > self._left[p][1].fastest_s:
            floor_s, smaller = self._left.pop(p)
            yield floor_s, smaller._replace(fastest_s=fastest_s)

    def _mix(self, floor_s: float, p: Parallelism) -> Iterator[tuple[float, Node]]:
        """Let the blocks of a way choose between its programs."""
        for blend in self.planner.mixer.blends(p):
            draft = self.planner.layer.draft(blend.program, p)
            if draft is not None:
                yield max(floor_s, draft.bound_s), MixedNode(p, blend, draft)

    def solve_mixed(self, node: MixedNode) -> None:
        """Price a way with several programs, where that promises more than one for all."""
        p, blend, draft = node
        if draft.bound_s < min(self.outcome.best_s, self._least_uniform_s(p) * (1 - NEGLIGIBLE)):
            solved = self.planner.mixer.solve(p, blend, draft, self.outcome.best_s)
            if solved is not None:
                self.outcome.offer(p, solved)
