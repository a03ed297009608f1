"""Schedules with several stages on a rank: cuts as even as units allow, and what memory makes of them.

The bubble of these schedules shrinks only if stages are alike, so their cuts are those whose longest stage is
shortest, without memory. What a rank then keeps too much its units free in the least time, each as often as
microbatches of its stage are in flight: at whichever moment that takes longest. A rank that takes T for a
microbatch on all its stages, P before the first of them and O once a step takes P + m T + O at least, and the
largest of these bounds the step. One stage for the whole model is the same with nothing to cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.plan import Parallelism
from autopar.search.run_sums import RunSums
from autopar.search.runs import AllRuns, Array
from autopar.search.stage_costs import Machine, accumulating, cached_bytes, moved_once, room_bytes, run_times
from autopar.search.stage_table import StageTable
from autopar.search.stages import Where, cheapest, legal
from costmodel import latest_finish_s, rank_finish_s
from costmodel.events import overlap_saving_s
from costmodel.orders import (
    OVERLAPPING_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    moments_in_flight,
    rank_stages,
    stage_ranks,
)

ROUNDING = 1e-9
"""By which part what is freed may fall short of what must be."""

MOST_STEPS = 2
"""Of how many schedules it is kept what ranks may free: far the largest of what is known of a chain."""

MOST_ROUNDS = 64
"""Microbatches of a step for each rank up to which its order is simulated."""


class Staged(NamedTuple):
    """Where stages begin, the seconds in which each of their parameters' gradients is added up, and the
    messages between them."""

    cuts: tuple[int, ...]
    accumulation_s: float
    sends_s: tuple[float, ...]


class EvenStages:
    """The stages of one chain in schedules whose cuts memory has no say in."""

    def __init__(self, table: StageTable) -> None:
        self.table = table
        self._cuts: dict[int, tuple[int, ...] | None] = {}
        self._schedule_floors_s: dict[tuple[object, ...], float] = {}
        self._known_latest_s: dict[tuple[object, ...], float] = {}
        self._known_finish_s: dict[tuple[object, ...], float] = {}
        self._known_freed: dict[tuple[int, ...], tuple[Array, Array]] = {}
        self._kept_bytes: dict[tuple[object, ...], Array] = {}
        self._known_steps: dict[tuple[object, ...], tuple[Array, Array]] = {}

    def cuts(self, num_stages: int, where: Where = None) -> tuple[int, ...] | None:
        """The cuts whose longest stage is shortest; None for fewer units than stages."""
        if num_stages > self.table.num_units:
            return None
        if num_stages not in self._cuts:
            unit_s = self.table.unit_forward_s + self.table.unit_backward_s
            values = legal(AllRuns(self.table.num_units).sums(unit_s), where)
            found = cheapest([values] * num_stages)
            self._cuts[num_stages] = None if found is None else found.cuts
        return self._cuts[num_stages]

    def excess_bytes(self, p: Parallelism, machine: Machine, cuts: tuple[int, ...]) -> Array:
        """What each rank at least keeps too much with these cuts, or has left, everywhere with the fastest
        variant."""
        sums = self.table.sums(cuts, _ranks(p))
        kept_bytes = self.kept_bytes(p, cuts).max(axis=1)
        excess_bytes: Array = kept_bytes - room_bytes(self.table, sums, p, machine)
        return self._with_work(p, cuts, excess_bytes, sums.working_bytes)

    def cached_bytes(self, p: Parallelism, machine: Machine, cuts: tuple[int, ...]) -> Array:
        """What ranks hold of gradients that products make in the format that they read."""
        return cached_bytes(self.table, self.table.sums(cuts, _ranks(p)), machine)

    def least_excess_bytes(
        self, p: Parallelism, cuts: tuple[int, ...], allowed_bytes: Array, working_bytes: Array
    ) -> Array:
        """What each rank has to keep less at least, so that it keeps no more than is allowed beside units
        that work on so much with the fastest variants."""
        return self._with_work(p, cuts, self.kept_bytes(p, cuts).max(axis=1) - allowed_bytes, working_bytes)

    def _with_work(
        self, p: Parallelism, cuts: tuple[int, ...], excess_bytes: Array, working_bytes: Array
    ) -> Array:
        """What ranks keep too much, with what units work on beyond these bytes once they compute so much
        again that it may fit: W is the least with

            excess + max(0, W - working) ≤ Σ k_u max of freed_uv over variants v that work on W at most

        over the units u of a rank, and the left side is what is returned. Infinite where there is none."""
        if (excess_bytes <= 0).all():
            return excess_bytes
        sizes, freed = self._freed_within(cuts)
        fullest = self.kept_bytes(p, cuts).argmax(axis=1)
        flights = moments(p)[range(p.pp), fullest]
        most = (freed[own_stages(p)] * flights[:, :, None]).sum(axis=1)
        needed = excess_bytes[:, None] + np.maximum(0.0, sizes - working_bytes[:, None])
        suffices = most >= needed * (1 - ROUNDING)
        least = np.where(suffices.any(axis=1), needed[range(p.pp), suffices.argmax(axis=1)], np.inf)
        found: Array = np.where(excess_bytes > 0, least, excess_bytes)
        return found

    def _freed_within(self, cuts: tuple[int, ...]) -> tuple[Array, Array]:
        """All sizes of what units work on, and how much of a microbatch each stage can keep less if none of
        its units works on more: [stage, size].

        A unit works while all of the stage is kept but what comes after it, which is no more than with the
        fastest variants."""
        if cuts not in self._known_freed:
            working, freed = self.table.freed_within
            stages = np.repeat(range(len(cuts)), np.diff([*cuts, self.table.num_units]))
            unit_bytes, _, _ = self._saved
            kept_bytes = unit_bytes.cumsum()
            later_bytes = kept_bytes[[*(cut - 1 for cut in cuts[1:]), -1]][stages] - kept_bytes
            worked = working - later_bytes[:, None]
            there = np.isfinite(worked)
            sizes, place = np.unique(worked[there], return_inverse=True)
            steps = np.zeros((len(cuts), len(sizes)))
            np.add.at(steps, (stages[there.nonzero()[0]], place), freed[there])
            self._known_freed[cuts] = sizes, steps.cumsum(axis=1)
        return self._known_freed[cuts]

    def kept_bytes(self, p: Parallelism, cuts: tuple[int, ...]) -> Array:
        """What ranks keep with the fastest variants when they may keep most: [rank, moment]."""
        key = (p.schedule, p.pp, p.num_microbatches, cuts)
        if key not in self._kept_bytes:
            saved_bytes = self._saved_bytes(cuts)[own_stages(p)]
            self._kept_bytes[key] = (moments(p) * saved_bytes[:, None, :]).sum(axis=2)
        return self._kept_bytes[key]

    def _saved_bytes(self, cuts: tuple[int, ...]) -> Array:
        """What each stage keeps of a microbatch; a storage that several of its units keep counts once."""
        unit_bytes, shared_bytes, keepers = self._saved
        repeats = np.maximum(np.add.reduceat(keepers, cuts, axis=1) - 1, 0)
        found: Array = np.add.reduceat(unit_bytes, cuts) - shared_bytes @ repeats
        return found

    @cached_property
    def _saved(self) -> tuple[Array, Array, NDArray[np.int64]]:
        """Bytes that each unit keeps with its fastest variant, those of the storages that several units keep,
        and which do: [storage, unit]."""
        units = [unit.saved[name] for unit, name in zip(self.table.chain.units, self.table.base, strict=True)]
        sizes = {name: size for saved in units for name, size in saved.storages.items()}
        numbers = Counter(name for saved in units for name in saved.storages)
        shared = [name for name, number in numbers.items() if number > 1]
        keepers = np.array([[name in saved.storages for saved in units] for name in shared], dtype=np.int64)
        return (
            np.array([saved.num_bytes for saved in units], dtype=np.float64),
            np.array([sizes[name] for name in shared], dtype=np.float64),
            keepers.reshape(len(shared), len(units)),
        )

    def relief_s(
        self,
        p: Parallelism,
        cuts: tuple[int, ...],
        excess_bytes: Array,
        weights: Sequence[float] | None = None,
    ) -> Array:
        """E of ranks, which keep so much too much when they keep most: the most of all moments, at each of
        which what a unit frees counts as often as microbatches of its stage are in flight, and seconds of a
        stage by its weight. Infinite where what can be freed is too little."""
        kept_bytes = self.kept_bytes(p, cuts)
        allowed_bytes = kept_bytes.max(axis=1) - excess_bytes
        needed_bytes = np.maximum(0.0, kept_bytes - allowed_bytes[:, None])
        if not needed_bytes.any():
            return np.zeros(p.pp)
        rates, sizes = self._steps(p, cuts, weights)
        before = sizes.cumsum(axis=2) - sizes
        seconds = (rates * np.clip(needed_bytes[:, :, None] - before, 0.0, sizes)).sum(axis=2)
        enough = sizes.sum(axis=2) >= needed_bytes * (1 - 1e-6) - 1e-6
        found: Array = np.where(enough, seconds, np.inf).max(axis=1)
        return found

    def _steps(
        self, p: Parallelism, cuts: tuple[int, ...], weights: Sequence[float] | None
    ) -> tuple[Array, Array]:
        """What each rank may free, the quickest first: seconds a byte, and how many bytes, both [rank,
        moment, step]."""
        key = (p.schedule, p.pp, p.num_microbatches, cuts)
        if weights is None and key in self._known_steps:
            return self._known_steps[key]
        own, flights = own_stages(p), moments(p)[:, :, :, None]
        each, freed = self.freed(cuts)
        slow = np.ones(len(cuts)) if weights is None else np.array(weights)
        sizes = (flights * freed.T[own][:, None]).reshape(p.pp, flights.shape[1], -1)
        # What is never in flight frees nothing, whatever it takes.
        seconds = slow[own][:, None, :, None] / np.maximum(flights, 1) * each
        rates = seconds.reshape(sizes.shape)
        order = rates.argsort(axis=2, kind="stable")
        found = np.take_along_axis(rates, order, 2), np.take_along_axis(sizes, order, 2)
        if weights is None:
            if len(self._known_steps) == MOST_STEPS:
                del self._known_steps[next(iter(self._known_steps))]
            self._known_steps[key] = found
        return found

    def most_relief_s(self, cuts: tuple[int, ...]) -> list[float]:
        """What each stage can compute again at most of one microbatch."""
        rates, freed = self.freed(cuts)
        found: list[float] = (rates @ freed).tolist()
        return found

    def freed(self, cuts: tuple[int, ...]) -> tuple[Array, Array]:
        """What stages can free of a microbatch, the quickest first: seconds a byte, and how many bytes each
        stage, [part, stage]."""
        segments = self.table.sums(cuts).segments
        freed = np.array([freed * number for _, freed, number in segments])
        return np.array([rate for rate, _, _ in segments]), freed.reshape(-1, len(cuts))

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
        and, in so long for each parameter, to add up gradients: a rank as in `bound_s`, or a microbatch on
        its way through all stages."""
        key = (p.schedule, p.pp, p.num_microbatches, cuts, accumulation_s)
        if key not in self._schedule_floors_s:
            sums = self.table.sums(cuts, _ranks(p)).accumulating(accumulation_s)
            if p.schedule in OVERLAPPING_SCHEDULES:
                sums = sums.computing()
            whole_s = sums.forward_s + sums.backward_s
            is_split = p.schedule in SPLIT_BACKWARD_SCHEDULES
            through_s = whole_s - sums.weight_s if is_split else whole_s
            return_s = 0.0 if is_split else sums.return_s
            ends_s = sums.arrival_s + p.num_microbatches * whole_s + return_s
            self._schedule_floors_s[key] = float(max(through_s.sum(), ends_s.max()))
        return self._schedule_floors_s[key]

    def order_s(self, p: Parallelism, staged: Staged, known_s: float) -> float:
        """What the schedule takes in its own order, nothing computed again and nothing gathered, or `known_s`
        if that is more: no step of the program takes less. Otherwise as `schedule_floor_s`.

        Only simulated where it may take more, as it would were all stages like the slowest; and where rounds
        of microbatches are so few that the bubble, all that the busiest rank does not know of, is worth it.
        """
        if p.num_microbatches > MOST_ROUNDS * p.pp or self._latest_s(p, staged) <= known_s:
            return known_s
        return max(known_s, self._finish_s(p, staged))

    def _latest_s(self, p: Parallelism, staged: Staged) -> float:
        """When the last rank would end, were all stages like the slowest."""
        key = (p.schedule, p.pp, p.num_microbatches, staged)
        if key not in self._known_latest_s:
            sums = self._sums(staged)
            latest_s = latest_finish_s(
                p.schedule, p.pp, p.num_microbatches, sums.forward_s.tolist(), sums.backward_s.tolist(),
                staged.sends_s, p.num_virtual_stages, weight_s=_weight_s(p, sums),
            )  # fmt: skip
            self._known_latest_s[key] = latest_s * (1 + ROUNDING)
        return self._known_latest_s[key]

    def _finish_s(self, p: Parallelism, staged: Staged) -> float:
        """When it ends with stages as they are."""
        key = (p.schedule, p.pp, p.num_microbatches, staged)
        if key not in self._known_finish_s:
            sums = self._sums(staged)
            savings_s = _savings_s(sums) if p.schedule in OVERLAPPING_SCHEDULES else 0.0
            finish_s = rank_finish_s(
                p.schedule, p.pp, p.num_microbatches, sums.forward_s.tolist(), sums.backward_s.tolist(),
                staged.sends_s, p.num_virtual_stages, weight_s=_weight_s(p, sums), overlap_saving_s=savings_s,
            )  # fmt: skip
            self._known_finish_s[key] = max(finish_s)
        return self._known_finish_s[key]

    def _sums(self, staged: Staged) -> RunSums:
        return self.table.sums(staged.cuts).accumulating(staged.accumulation_s)


def _weight_s(p: Parallelism, sums: RunSums) -> list[float] | None:
    """The gradients of weights among the backward of each stage, where the schedule tells them apart."""
    return sums.weight_s.tolist() if p.schedule in SPLIT_BACKWARD_SCHEDULES else None


def _savings_s(sums: RunSums) -> list[float]:
    """What a backward of each stage saves beside a forward of the other stage of its rank."""
    there_s, back_s = sums.communication_s
    forward = zip((sums.forward_s - there_s).tolist()[::-1], there_s.tolist()[::-1], strict=True)
    backward = zip((sums.backward_s - back_s).tolist(), back_s.tolist(), strict=True)
    return [overlap_saving_s(*other, *one) for other, one in zip(forward, backward, strict=True)]


def moments(p: Parallelism) -> NDArray[np.int64]:
    """The microbatches of each stage that a rank keeps when it may keep most: [rank, moment, stage]."""
    return moments_in_flight(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages)


def own_stages(p: Parallelism) -> NDArray[np.intp]:
    """The stages of each rank: [rank, stage]."""
    return _own_stages(p.schedule, p.pp, p.num_virtual_stages)


@lru_cache(maxsize=1024)
def _own_stages(schedule: str, pp: int, num_virtual_stages: int) -> NDArray[np.intp]:
    found = np.array([rank_stages(schedule, rank, pp, num_virtual_stages) for rank in range(pp)])
    found.setflags(write=False)  # all who ask share it
    return found


def _ranks(p: Parallelism) -> tuple[int, ...]:
    """The rank of each stage."""
    return stage_ranks(p.schedule, p.pp, p.num_virtual_stages)
