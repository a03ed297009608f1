"""Schedules with several stages on a rank: cuts as even as units allow, and what memory makes of them.

The bubble of these schedules shrinks only if stages are alike, so their cuts are those whose longest stage is
shortest, without memory. What a rank then keeps too much its units free in the least time, each as often as
microbatches of its stage are in flight when the rank is fullest. A rank that takes T for a microbatch on all
its stages, P before the first of them and O once a step takes P + m T + O at least, and the largest of these
bounds the step. One stage for the whole model is the same with nothing to cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from autopar.plan import Parallelism
from autopar.search.runs import Array
from autopar.search.stage_costs import Machine, accumulating, moved_once, room_bytes, run_times
from autopar.search.stage_table import RunSums, StageTable
from autopar.search.stages import Where, cheapest, legal
from costmodel import peak_activation_bytes, pipeline_lower_bound_s, rank_finish_s
from costmodel.events import overlap_saving_s
from costmodel.orders import (
    OVERLAPPING_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    in_flight_when_fullest,
    stage_ranks,
)


class EvenStages:
    """The stages of one chain in schedules whose cuts memory has no say in."""

    def __init__(self, table: StageTable) -> None:
        self.table = table
        self._cuts: dict[int, tuple[int, ...] | None] = {}
        self._schedule_floors_s: dict[tuple[object, ...], float] = {}
        self._orders_s: dict[tuple[object, ...], float] = {}

    def cuts(self, num_stages: int, where: Where = None) -> tuple[int, ...] | None:
        """The cuts whose longest stage is shortest; None for fewer units than stages."""
        if num_stages > self.table.num_units:
            return None
        if num_stages not in self._cuts:
            values = legal(self.table.all_runs.forward_s + self.table.all_runs.backward_s, where)
            found = cheapest([values] * num_stages)
            self._cuts[num_stages] = None if found is None else found.cuts
        return self._cuts[num_stages]

    def excess_bytes(self, p: Parallelism, machine: Machine, cuts: tuple[int, ...]) -> Array:
        """What each rank at least keeps too much with these cuts, or has left, everywhere with the fastest
        variant."""
        room = room_bytes(self.table, self.table.sums(cuts, _ranks(p)), p, machine)
        peaks = peak_activation_bytes(
            p.schedule, p.pp, p.num_microbatches, self._saved_bytes(cuts), p.num_virtual_stages
        )
        excess: Array = np.array(peaks) - room
        return excess

    def in_flight(self, p: Parallelism, cuts: tuple[int, ...]) -> tuple[int, ...]:
        """How many microbatches each stage keeps when its rank keeps most, as `excess_bytes`."""
        return in_flight_when_fullest(
            p.schedule, p.pp, p.num_microbatches, self._saved_bytes(cuts), p.num_virtual_stages
        )

    def _saved_bytes(self, cuts: tuple[int, ...]) -> list[float]:
        found: list[float] = self.table.sums(cuts).saved_bytes.tolist()
        return found

    def relief_s(
        self,
        p: Parallelism,
        cuts: tuple[int, ...],
        excess_bytes: Array,
        weights: Sequence[float] | None = None,
    ) -> Array:
        """E of ranks, whose bytes are counted at the moment when a rank holds most: what a unit frees counts
        as often as microbatches of its stage are in flight then, and seconds of a stage by its weight."""
        segments = self.table.sums(cuts).segments
        columns = [*zip(*(number.tolist() for _, _, number in segments), strict=True)] or [()] * len(cuts)
        stages = [*zip(columns, self.in_flight(p, cuts), weights or repeat(1.0), strict=False)]
        own: list[list[int]] = [[] for _ in range(p.pp)]
        for stage, rank in enumerate(_ranks(p)):
            own[rank].append(stage)
        known: dict[object, float] = {}  # most ranks are alike
        seconds = np.zeros_like(excess_bytes)
        for rank in np.flatnonzero(excess_bytes > 0).tolist():
            excess = float(excess_bytes[rank])
            mine = tuple(stages[stage] for stage in own[rank])
            if (mine, excess) not in known:
                steps = sorted(
                    (rate * weight / flight, flight * freed * number)
                    for numbers, flight, weight in mine
                    if flight
                    for (rate, freed, _), number in zip(segments, numbers, strict=True)
                )
                known[mine, excess] = _least_s(steps, excess)
            seconds[rank] = known[mine, excess]
        return seconds

    def most_relief_s(self, cuts: tuple[int, ...]) -> list[float]:
        """What each stage can compute again at most of one microbatch."""
        parts = (rate * freed * number for rate, freed, number in self.table.sums(cuts).segments)
        found: list[float] = sum(parts, np.zeros(len(cuts))).tolist()
        return found

    def bound_s(self, p: Parallelism, machine: Machine, cuts: tuple[int, ...], excess_bytes: Array) -> float:
        """What a step with these cuts takes at least if ranks keep so much less of activations; infinite
        where they cannot."""
        sums = accumulating(self.table.sums(cuts, _ranks(p)), p, machine)
        if p.schedule in OVERLAPPING_SCHEDULES:
            sums = sums.computing()
        again_s = self.relief_s(p, cuts, excess_bytes)
        if np.isinf(again_s).any():
            return float("inf")
        times = run_times(sums, moved_once(self.table, p, machine), machine.overlap, again_s)
        return_s = 0.0 if p.schedule in SPLIT_BACKWARD_SCHEDULES else sums.return_s
        # A rank's first stage is its earliest: what comes before that it must wait for.
        ends_s = sums.arrival_s + p.num_microbatches * times.microbatch_s
        return float((ends_s + np.maximum(return_s, times.once_s)).max())

    def schedule_floor_s(self, p: Parallelism, cuts: tuple[int, ...], accumulation_s: float) -> float:
        """What the schedule takes at least with these cuts, were there nothing else to do than to compute
        and, in so long for each parameter, to add up gradients."""
        key = (p.schedule, p.pp, p.num_microbatches, cuts, accumulation_s)
        if key not in self._schedule_floors_s:
            sums = self.table.sums(cuts).accumulating(accumulation_s)
            if p.schedule in OVERLAPPING_SCHEDULES:
                sums = sums.computing()
            weight_s = None
            if p.schedule in SPLIT_BACKWARD_SCHEDULES:
                weight_s = self._weight_s(sums)
            self._schedule_floors_s[key] = pipeline_lower_bound_s(
                p.pp, p.num_microbatches, sums.forward_s.tolist(), sums.backward_s.tolist(),
                num_virtual=p.num_virtual_stages, schedule_name=p.schedule, weight_s=weight_s,
            )  # fmt: skip
        return self._schedule_floors_s[key]

    def order_s(
        self, p: Parallelism, cuts: tuple[int, ...], accumulation_s: float, sends_s: tuple[float, ...]
    ) -> float:
        """What the schedule takes with these cuts in its own order, nothing computed again and nothing
        gathered: no step of the program takes less. Otherwise as `schedule_floor_s`; `sends_s` are the
        messages between stages."""
        key = (p.schedule, p.pp, p.num_microbatches, cuts, accumulation_s, sends_s)
        if key not in self._orders_s:
            sums = self.table.sums(cuts).accumulating(accumulation_s)
            weight_s = savings_s = None
            if p.schedule in SPLIT_BACKWARD_SCHEDULES:
                weight_s = self._weight_s(sums)
            if p.schedule in OVERLAPPING_SCHEDULES:
                savings_s = _savings_s(sums)
            self._orders_s[key] = max(
                rank_finish_s(
                    p.schedule, p.pp, p.num_microbatches, sums.forward_s.tolist(), sums.backward_s.tolist(),
                    sends_s, p.num_virtual_stages, weight_s=weight_s, overlap_saving_s=savings_s or 0.0,
                )
            )  # fmt: skip
        return self._orders_s[key]

    def _weight_s(self, sums: RunSums) -> list[float]:
        """The gradients of weights of each run."""
        found: list[float] = sums.runs.sums([unit.cost.weight_s for unit in self.table.chain.units]).tolist()
        return found


def _least_s(steps: Sequence[tuple[float, float]], excess_bytes: float) -> float:
    """The least time for so many bytes, of steps with seconds a byte and bytes, the quickest first; infinite
    where they are too few."""
    seconds, left = 0.0, excess_bytes
    for rate, size in steps:
        seconds += rate * min(left, size)
        left -= min(left, size)
    return seconds if left <= 1e-6 * max(1.0, excess_bytes) else float("inf")


def _savings_s(sums: RunSums) -> list[float]:
    """What a backward of each stage saves beside a forward of the other stage of its rank."""
    there_s, back_s = sums.communication_s
    forward = zip((sums.forward_s - there_s).tolist()[::-1], there_s.tolist()[::-1], strict=True)
    backward = zip((sums.backward_s - back_s).tolist(), back_s.tolist(), strict=True)
    return [overlap_saving_s(*other, *one) for other, one in zip(forward, backward, strict=True)]


def _ranks(p: Parallelism) -> tuple[int, ...]:
    """The rank of each stage."""
    return stage_ranks(p.schedule, p.pp, p.num_virtual_stages)
