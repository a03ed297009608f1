"""What no program of a layout can beat, as a chain: every unit as fast, and as small, as it can be anywhere.

A kernel takes a time to launch, and beside that the larger of constants and terms linear in the work; no rank
holds less of a tensor than one of n equal parts. So beside n ranks of tensor and context axes a unit takes at
least its launches and 1/n of what is beside them on one device, keeps and receives at least 1/n of what it
does there, and frees a byte for no fewer seconds.

What it takes with its collectives, forward and backward together, and how little it then keeps, its floor in
the block problem says (`autopar.search.unit_floor`). Conversions and their conjugates mirror each other, so
the minimum is divided into forward and backward as the strategies that reach it divide their time. Gradients
of weights, which some schedules put off, are those of these strategies: with fewer of them a microbatch would
have a longer way back. In a part of a larger problem, what is more than one device's share counts as put off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from autopar.pricing import OpCost
from autopar.search.frontier import Line, corners
from autopar.search.saved import Saved, SavedByName
from autopar.search.unit_floor import UnitFloor, bends
from autopar.search.units import Chain, ParameterShard, Unit


def relaxed(
    device: Chain,
    tp: int,
    cp: int,
    floors: Sequence[UnitFloor | None],
    *,
    part: float | None = None,
    trades: bool = True,
    arithmetic: float | None = None,
) -> Chain:
    """The bound of all programs on `tp` `cp` ranks, given the program of one device, and where units are in
    the block problem; without that, their collectives are left out. Prices being what they are, a `part` of a
    problem's microbatch and positions takes, and keeps, that part at least, beside its launches; how passes
    divide such a problem's time says nothing of theirs. Without `trades` blocks that compute again are
    thought to communicate no more than others. Where schedules hide communication behind other units'
    arithmetic, a mixture counts with so much `arithmetic` and the rest whole backwards."""
    degree = tp * cp
    known: dict[tuple[int, UnitFloor | None], Unit] = {}
    units = []
    for unit, floor in zip(device.units, floors, strict=True):
        kind = (id(unit.recompute_s), floor)
        if kind not in known:
            known[kind] = _Least(unit, degree, floor, part, trades, arithmetic).unit()
        # Units that share what they compute again still do.
        least = known[kind]
        units.append(
            unit._replace(
                cost=least.cost, unpaced=least.unpaced,
                recompute_s=least.recompute_s, frontier=least.frontier,
                saved=SavedByName((*unit.saved, *least.saved), partial(_kept, unit, least, degree)),
                received_bytes=unit.received_bytes // degree,
            )
        )  # fmt: skip
    shards = {shard: _shard(shard, tp) for shard in set(device.parameters.values())}
    parameters = {name: shards[shard] for name, shard in device.parameters.items()}
    return replace(device, units=tuple(units), parameters=parameters)


def _kept(unit: Unit, least: Unit, degree: int, name: str) -> Saved:
    """What a unit keeps on one of `degree` ranks under a name, its own or one that only `least` has, the
    relaxed unit with the same kernels."""
    if name in unit.saved:
        return unit.saved[name].divided(degree)
    entering = unit.saved["full"].divided(degree).storages
    beside = least.saved[name].num_bytes - sum(entering.values())
    return Saved(entering, beside, unit.saved["none"].peak_bytes // degree)


def _shard(shard: ParameterShard, tp: int) -> ParameterShard:
    elements, num_bytes = shard.num_elements // tp, shard.num_bytes // tp
    return shard._replace(num_elements=elements, num_bytes=num_bytes, is_partial=False)


class _Least:
    """The least of one kind of unit."""

    def __init__(
        self,
        unit: Unit,
        degree: int,
        floor: UnitFloor | None,
        part: float | None,
        trades: bool,
        arithmetic: float | None,
    ) -> None:
        self.device = unit
        self.degree = degree
        self.floor = floor
        self.part = part
        self.arithmetic = arithmetic
        self.cost = unit.part(1 / degree)
        self.time_s = self.cost.total_s
        if floor is not None:
            self.time_s = max(self.time_s, self._scaled_s(floor.ops.least_s()))
        self.least_s = self.time_s if arithmetic is None else self._hidden_s(arithmetic)
        self.lines: list[Line] | None = None
        if floor is not None and trades and floor.trades and unit.is_block:
            kept_s, lines = floor.lines(arithmetic)
            self.least_s = max(self.least_s, self._scaled_s(kept_s))
            self.lines = [Line(price, self._scaled_s(seconds)) for price, seconds in lines]

    def _hidden_s(self, arithmetic: float) -> float:
        """What the mixture leaves at least if nothing is computed again, whatever that communicates."""
        least_s = arithmetic * self.cost.forward_s + self.cost.backward_s
        if self.floor is None:
            return least_s
        return max(least_s, self._scaled_s(self.floor.ops.computed_s(arithmetic)))

    def _scaled_s(self, seconds: float) -> float:
        """What of a problem's seconds is left in a part of it, of which all launches stay that count."""
        if self.part is None:
            return seconds
        launches = self.device.launches
        launched_s = self._forward_part * launches.forward_s + launches.backward_s
        return self.part * seconds + (1 - self.part) * launched_s

    @property
    def _forward_part(self) -> float:
        return 1.0 if self.arithmetic is None else self.arithmetic

    def unit(self) -> Unit:
        again_s = {name: seconds / self.degree for name, seconds in self.device.recompute_s.items()}
        cost = self._cost()
        least = self.device._replace(cost=cost, unpaced=cost, recompute_s=again_s)
        if self.lines is None:
            return least
        saved = dict(self.device.saved)
        names = ["none"]
        for number, (num_bytes, seconds) in enumerate(self._frontier(self.lines)):
            names.append(f"least-{number}")
            again_s[names[-1]] = max(0.0, seconds - self.least_s)
            saved[names[-1]] = Saved({}, int(num_bytes))
        return least._replace(frontier=tuple(names), saved=saved)

    def _cost(self) -> OpCost:
        if self.part is not None:
            return self._least_passes()
        like, part = self.cost if self.floor is None else self.floor.ops.fastest.cost, self._forward_part
        if self.arithmetic is None:
            forward_s = self.time_s * _share(like.forward_total_s, like.total_s)
            return _passes(forward_s, self.time_s - forward_s, like.weight_s)
        # What it does beside that is communication at best, and hides behind as much at most; with it, each
        # pass takes what it takes alone.
        ahead_s, back_s = part * like.forward_s, like.backward_s + (1 - part) * like.backward_communication_s
        more_ahead_s = (1 - part) * like.forward_s + like.forward_communication_s
        more_back_s = part * like.backward_communication_s
        forward_s = self.least_s * _share(ahead_s, ahead_s + back_s)
        moved_s = min(max(0.0, self.time_s - self.least_s), self.least_s)
        there_s = moved_s * _share(more_ahead_s, more_ahead_s + more_back_s)
        return _passes(forward_s, self.least_s - forward_s, like.weight_s)._replace(
            forward_communication_s=there_s, backward_communication_s=moved_s - there_s
        )

    def _least_passes(self) -> OpCost:
        """The least of forward and of input gradients, and of all together, the rest with gradients of
        weights: a chain of work may count that only as often as it passes all three."""
        forward_s = self._forward_part * self.cost.forward_s
        back_s = self.cost.backward_s - self.cost.weight_s
        return _passes(forward_s, self.least_s - forward_s, max(0.0, self.least_s - forward_s - back_s))

    def _frontier(self, lines: Sequence[Line]) -> list[tuple[float, float]]:
        """Bytes and seconds where one line crosses the next, from what keeps all to what keeps least: these,
        and those of one device's frontier, divided over the ranks."""
        most, least = (self.device.saved[mode].num_bytes / self.degree for mode in ("none", "full"))
        device = (Line(price, self.least_s + more_s / self.degree) for price, more_s in bends(self.device))
        return corners([Line(0.0, self.least_s), *lines, *device], least, most)


def _passes(forward_s: float, backward_s: float, weight_s: float) -> OpCost:
    return OpCost(forward_s, backward_s, weight_s=min(backward_s, weight_s))


def _share(part_s: float, whole_s: float) -> float:
    return part_s / whole_s if whole_s else 0.0
