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
communicates, B + C; so also any mixture θ (F + B) + (1 - θ) (B + C), with which T and h are made as well: one
for all units, as a forward may stand beside the backward of an unlike one. What runs again comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from autopar.search.block_floor import BlockFloor, RunAgain
from autopar.search.frontier import Line, Reached, lines_below
from autopar.search.units import Unit

MIXED = 0.75
"""How much of a mixture of both passes' arithmetic and whole backwards is arithmetic."""

MOST_PRICES = 4
"""The prices that a block problem is solved at for each mixture: more bring its lines closer to the
frontier."""


class FloorLines(NamedTuple):
    """What a unit takes at least that trades memory for time: `seconds` with all kept, and else the `lines`
    below its frontier."""

    seconds: float
    lines: tuple[Line, ...]


@dataclass(frozen=True, eq=False)
class UnitFloor:
    """What a unit takes at least in the problem of an axis, of which it is the `ops`; `unit` is what one
    device does of the same microbatch, with ops of these `names`, which `degree` ranks share. It `trades`
    memory for time, unless it is too small to be worth the linear programs."""

    ops: BlockFloor
    unit: Unit
    names: tuple[str, ...]
    degree: int
    trades: bool = True
    _lines_by_mixture: dict[float | None, FloorLines] = field(default_factory=dict)

    def lines(self, arithmetic: float | None) -> FloorLines:
        """The lines of a mixture with so much arithmetic, or where nothing hides what is communicated."""
        known = self._lines_by_mixture
        if arithmetic not in known:
            # Arithmetic alone is least for each op by itself: no linear program says more.
            seconds = self.ops.computed_s() if arithmetic == 1.0 else self.ops.least_s(arithmetic)
            known[arithmetic] = FloorLines(seconds, self._lines(seconds, arithmetic))
        return known[arithmetic]

    def _lines(self, seconds: float, arithmetic: float | None) -> tuple[Line, ...]:
        """Lines below what it takes and keeps: so long with all kept, or with a part computed again."""
        most_bytes = self.unit.saved["none"].num_bytes / self.degree
        highest_price = max((price for price, _ in bends(self.unit)), default=0.0)
        if not highest_price:
            return ()

        def reached(price: float) -> Reached:
            all_kept = Reached(Line(price, seconds + price * most_bytes), most_bytes)
            traded = self.reached(price, arithmetic)
            return traded if traded.line.seconds < all_kept.line.seconds else all_kept

        keeps_most = Reached(Line(0.0, seconds), most_bytes)
        return tuple(lines_below(keeps_most, reached, highest_price, MOST_PRICES))

    def reached(self, price: float, arithmetic: float | None) -> Reached:
        """h(λ) of the module, and what is kept there, if it computes again."""
        entering_bytes = self.unit.saved["full"].num_bytes / self.degree
        seconds, num_bytes = self.ops.traded(price, self.again, arithmetic)
        return Reached(Line(price, seconds + price * entering_bytes), entering_bytes + num_bytes)

    @cached_property
    def again(self) -> RunAgain:
        """What of the module runs again; on a context axis other ops stand between these."""
        graph, unit = self.ops.problem.graph, self.unit
        members = range(self.ops.start, self.ops.stop)
        at = {graph.ops[index].name: graph.representative[index] for index in members}
        results = {result.op for result in unit.results}
        flags = zip(self.names, unit.again["full"], unit.again["selective"], strict=True)
        found: tuple[set[int], set[int]] = set(), set()
        for number, (name, whole, selective) in enumerate(flags):
            if whole and name in at and (number in results or selective):
                found[number in results].add(at[name])
        return RunAgain(*map(frozenset, found))


def bends(unit: Unit) -> Iterator[tuple[float, float]]:
    """What a byte is worth where a unit's frontier bends, and what it takes there with all kept at this
    price, beside what it takes with all kept."""
    for one, other in pairwise(unit.frontier):
        freed = unit.saved[one].num_bytes - unit.saved[other].num_bytes
        if freed > 0:
            price = (unit.recompute_s[other] - unit.recompute_s[one]) / freed
            yield price, unit.recompute_s[one] + price * unit.saved[one].num_bytes
