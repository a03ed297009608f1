"""What a unit takes at least on a tensor axis, and how little it can keep for how much longer.

A unit that keeps everything takes T with its collectives, the relaxation of the block problem for the unit by
itself (`autopar.search.block_floor`): the minimum over all strategies, forward and backward together. If a
byte that is kept costs λ seconds, a block that computes again takes at least

    h(λ) = min over strategies of  Σ time + Σ min(λ bytes, again)  + what always runs again + λ what entered

with one term for the result of every product, attention and conversion, each made again as its strategy makes
it. So in t seconds it keeps no less than b with t + λb ≥ min(T + λb_none, h(λ)) for every λ: lines that a
frontier cannot get below (`autopar.search.frontier`).

Schedules that run a forward beside the backward of another microbatch hide communication behind arithmetic.
Then the two take at least what they compute, F + B, and at least what the backward takes with what it
communicates, B + C; so also any mixture θ (F + B) + (1 - θ) (B + C), with which T and h are made as well.
What runs again comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, pairwise
from operator import and_
from typing import NamedTuple

from autopar.search.block_floor import Again, BlockFloor
from autopar.search.frontier import Line, Reached, lines_below
from autopar.search.units import Unit

MIXED = 0.75
"""How much of a mixture of both passes' arithmetic and whole backwards is arithmetic."""

MOST_PRICES = 4
"""The prices that a block problem is solved at: more bring its lines closer to the frontier."""


class Trade(NamedTuple):
    """What a unit takes at least that trades memory for time: `seconds` with all kept, and else the `lines`
    below its frontier; and how much `arithmetic` counts in the seconds, where something hides what is
    communicated."""

    seconds: float
    lines: tuple[Line, ...]
    arithmetic: float | None


@dataclass(frozen=True, eq=False)
class UnitFloor:
    """What a unit takes at least in the problem of an axis, of which it is the `ops`; `unit` is what one
    device does of the same microbatch, which `degree` ranks share. It `trades` memory for time, unless it is
    too small to be worth the linear programs."""

    ops: BlockFloor
    unit: Unit
    degree: int
    trades: bool = True

    @cached_property
    def exposed(self) -> Trade:
        """The trade where nothing hides what is communicated."""
        seconds = self.ops.least_s()
        return Trade(seconds, self._lines(seconds, None), None)

    @cached_property
    def hidden(self) -> Trade:
        """The same where arithmetic does."""
        computed_s, mixed_s = self.ops.computed_s, self.ops.least_s(MIXED)
        if mixed_s <= computed_s:
            return Trade(computed_s, self._lines(computed_s, 1.0), 1.0)
        return Trade(mixed_s, (*self._lines(mixed_s, 1.0), *self._lines(mixed_s, MIXED)), MIXED)

    def _lines(self, seconds: float, arithmetic: float | None) -> tuple[Line, ...]:
        """Lines below what it takes and keeps: so long with all kept, or with a part computed again."""
        most_bytes = self.unit.saved["none"].num_bytes / self.degree

        def reached(price: float) -> Reached:
            all_kept = Reached(Line(price, seconds + price * most_bytes), most_bytes)
            traded = self._reached(price, arithmetic)
            return traded if traded.line.seconds < all_kept.line.seconds else all_kept

        highest_price = max((price for price, _ in bends(self.unit)), default=0.0)
        keeps_most = Reached(Line(0.0, seconds), most_bytes)
        return tuple(lines_below(keeps_most, reached, highest_price, MOST_PRICES))

    def _reached(self, price: float, arithmetic: float | None) -> Reached:
        """h(λ) of the module, and what is kept there, if it computes again."""
        entering_bytes = self.unit.saved["full"].num_bytes / self.degree
        seconds, num_bytes = self.ops.traded(price, self._again, arithmetic)
        return Reached(Line(price, seconds + price * entering_bytes), entering_bytes + num_bytes)

    @cached_property
    def _again(self) -> Again:
        """What of the module runs again."""
        unit, representative = self.unit, self.ops.problem.graph.representative
        ops, full = representative[self.ops.start : self.ops.stop], unit.again["full"]
        both = map(and_, full, unit.again["selective"])
        made = (result.op for result in unit.results)
        return Again(frozenset(compress(ops, both)), frozenset(ops[op] for op in made if full[op]))


def bends(unit: Unit) -> Iterator[tuple[float, float]]:
    """What a byte is worth where a unit's frontier bends, and what it takes there with all kept at this
    price, beside what it takes with all kept."""
    for one, other in pairwise(unit.frontier):
        freed = unit.saved[one].num_bytes - unit.saved[other].num_bytes
        if freed > 0:
            price = (unit.recompute_s[other] - unit.recompute_s[one]) / freed
            yield price, unit.recompute_s[one] + price * unit.saved[one].num_bytes
