"""The stage layer: where to cut a chain of units, and what its blocks compute again, so that memory holds.

A stage s that takes units [i, j) computes T_ij seconds a microbatch, has O_ij to do once a step, and holds
R_ij bytes whatever is in flight and A_ij for each of its k_s microbatches in flight. With D the bytes that do
not fit, each microbatch must keep D / k_s less, and

    E(i, j, D) = min Σ e_uv x_uv    Σ (a_u0 - a_uv) x_uv ≥ D / k_s,   Σ_v x_uv = 1,   0 ≤ x_uv ≤ 1

is what computing again costs: unit u uses variant v, which keeps a_uv and repeats e_uv seconds. Variants lie
on a convex frontier, so the linear program is solved by taking the cheapest seconds a byte first, for all
(i, j) at once (`relief_s`). Stage s cannot begin before its first microbatch has come through earlier stages,
in P_si seconds with messages, and takes B_sij for m microbatches of T_ij + E_ij by the order of its schedule
(`autopar.search.stage_times`), so

    best_1(j) = V_10j       best_s(j) = min over i < j of max(best_{s-1}(i), V_sij)
    V_sij = P_si + B_sij + the larger of O_ij and a backward through earlier stages

is the least that any cuts and any variants take (`cut`): exact for the relaxation, since units are a chain,
and a proven bound for the step. With several stages on a rank the cuts are as even as the units allow
(`even`), B is m T, and the largest V of a rank is the bound (`even_bound_s`). The whole numbers of
`autopar.search.variants` come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.data_axes import (
    data_groups,
    data_traffic,
    device_policy,
    least_update_s,
    updated_elements,
)
from autopar.search.pieces import Bucket, num_weights
from autopar.search.runs import AllRuns, Array, GivenRuns, RankRuns, Runs
from autopar.search.stage_times import StageTimes, busy_s, stage_times
from autopar.search.units import Chain
from costmodel import (
    OptimizerPolicy,
    Overlap,
    model_state_ledger,
    peak_activation_bytes,
    peak_in_flight,
    pipeline_lower_bound_s,
)
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, in_flight_when_fullest, stage_ranks

Options = tuple[tuple[str, ...], ...]
"""For each unit the variants it may use, from the fastest to the smallest."""

Where = NDArray[np.bool_] | None
"""At (i, j) whether the units [i, j) may be a stage; None for all."""


class Machine(NamedTuple):
    """What stages run on: prices on the mesh, the optimizer's policy, what overlaps, and the memory that
    there is for them."""

    pricer: Pricer
    policy: OptimizerPolicy
    overlap: Overlap
    memory_bytes: float


class Cut(NamedTuple):
    """Where stages begin, 0 first, and the least that any step takes."""

    cuts: tuple[int, ...]
    bound_s: float


class Once(NamedTuple):
    """What data axes and optimizer add to each unit: seconds with every forward and every backward, and of
    synchronisation and of the optimizer once a step."""

    forward_gather_s: Array
    backward_gather_s: Array
    sync_s: Array
    optimizer_s: Array


class Segment(NamedTuple):
    """A step along the frontier of like units: seconds a byte, bytes freed, and which units can take it."""

    rate: float
    freed_bytes: float
    members: Array


class RunSums:
    """The sums of a chain that no parallelism changes, over some runs of its units."""

    def __init__(self, table: StageTable, runs: Runs) -> None:
        self.runs = runs
        self.forward_s = runs.sums(table.unit_forward_s)
        self.backward_s = runs.sums(table.unit_backward_s)
        self.arrival_s = runs.before(table.unit_forward_s)
        self.return_s = runs.before(table.unit_backward_s)
        self.num_sharding_units = np.maximum(1.0, runs.sums(table.unit_has_parameters))
        self.elements = tuple(runs.sums(elements) for elements in table.unit_elements)
        self.block_elements = runs.largest(table.elements_of(blocks=True))
        self.root_elements = runs.sums(table.elements_of(blocks=False))
        self.largest_weights = runs.largest(table.unit_weights)
        self.saved_bytes = runs.sums(table.unit_saved_bytes)
        self.working_bytes = runs.last(table.unit_working_bytes)
        self.segments = [(s.rate, s.freed_bytes, runs.sums(s.members)) for s in table.segments]


class StageTable:
    """All stages that one chain can be cut into; `options` narrows what units may compute again."""

    def __init__(self, chain: Chain, options: Options | None = None) -> None:
        self.chain = chain
        self.options = options or tuple(unit.frontier for unit in chain.units)
        self.num_units = len(chain.units)
        self._even: dict[int, tuple[int, ...] | None] = {}
        self._known_sums: dict[tuple[tuple[int, ...], tuple[int, ...]], RunSums] = {}
        self._schedule_floors_s: dict[tuple[object, ...], float] = {}

    # --- units ----------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> tuple[str, ...]:
        """Every unit's fastest variant."""
        return tuple(names[0] for names in self.options)

    @cached_property
    def unit_forward_s(self) -> Array:
        """The forward of each unit, with the communication that nothing hides."""
        return np.array(
            [u.cost.forward_s + self._exposed * u.cost.forward_communication_s for u in self.chain.units]
        )

    @cached_property
    def unit_backward_s(self) -> Array:
        """The backward of each unit, with what its fastest variant computes again."""
        return np.array(
            [
                u.cost.backward_s + self._exposed * u.cost.backward_communication_s + u.recompute_s[name]
                for u, name in zip(self.chain.units, self.base, strict=True)
            ]
        )

    @property
    def _exposed(self) -> float:
        return 1 - self.chain.era.tensor_parallel_overlap

    @cached_property
    def unit_has_parameters(self) -> list[float]:
        """1 for units that are gathered and reduced by themselves."""
        return [float(bool(unit.parameters)) for unit in self.chain.units]

    @cached_property
    def unit_elements(self) -> tuple[list[float], list[float]]:
        """Elements of dense parameters and of experts, each for the first unit that has it."""
        seen: set[str] = set()
        sizes: tuple[list[float], list[float]] = ([], [])
        for unit in self.chain.units:
            fresh = [self.chain.parameters[name] for name in unit.parameters if name not in seen]
            seen.update(unit.parameters)
            for is_expert, found in enumerate(sizes):
                found.append(float(sum(s.num_elements for s in fresh if s.is_expert is bool(is_expert))))
        return sizes

    def elements_of(self, *, blocks: bool) -> list[float]:
        """The same together, 0 outside of blocks, or in them."""
        both = zip(self.chain.units, *self.unit_elements, strict=True)
        return [sum(sizes) if unit.is_block is blocks else 0.0 for unit, *sizes in both]

    @cached_property
    def _element_bytes(self) -> list[float]:
        """Bytes of an element of each unit's parameters."""
        found = []
        for unit in self.chain.units:
            shards = [self.chain.parameters[name] for name in unit.parameters]
            elements = sum(shard.num_elements for shard in shards)
            found.append(sum(shard.num_bytes for shard in shards) / elements if elements else 0.0)
        return found

    @cached_property
    def unit_weights(self) -> list[float]:
        """Elements of a block's weights, one matrix of every stack."""
        return [num_weights(unit, self.chain.parameters) for unit in self.chain.units]

    @cached_property
    def unit_saved_bytes(self) -> list[float]:
        """What each unit keeps that none before it does, with its fastest variant."""
        seen: set[str] = set()
        sizes = []
        for unit, name in zip(self.chain.units, self.base, strict=True):
            saved = unit.saved[name]
            fresh = sum(size for storage, size in saved.storages.items() if storage not in seen)
            seen.update(saved.storages)
            sizes.append(float(fresh + saved.internal_bytes))
        return sizes

    @cached_property
    def unit_working_bytes(self) -> list[float]:
        """What each unit holds beside what it keeps."""
        pairs = zip(self.chain.units, self.base, strict=True)
        return [float(unit.saved[name].working_bytes) for unit, name in pairs]

    @cached_property
    def segments(self) -> list[Segment]:
        """What units can free, the cheapest first."""
        kinds: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, (unit, names) in enumerate(zip(self.chain.units, self.options, strict=True)):
            kinds.setdefault((id(unit.recompute_s), names), []).append(index)
        found = []
        for (_, names), indices in kinds.items():
            unit = self.chain.units[indices[0]]
            members = np.zeros(self.num_units)
            members[indices] = 1
            for one, other in pairwise(names):
                freed = unit.saved[one].num_bytes - unit.saved[other].num_bytes
                if freed > 0:
                    seconds = unit.recompute_s[other] - unit.recompute_s[one]
                    found.append(Segment(seconds / freed, float(freed), members))
        return sorted(found, key=lambda segment: segment.rate)

    # --- all units together ---------------------------------------------------------------------------------

    @cached_property
    def microbatch_s(self) -> float:
        """A microbatch on all stages, nothing computed again that need not be."""
        return float(self.unit_forward_s.sum() + self.unit_backward_s.sum())

    @cached_property
    def weight_s(self) -> float:
        """The gradients of weights among it, which no other stage waits for."""
        return sum(unit.cost.weight_s for unit in self.chain.units)

    @cached_property
    def all_saved_bytes(self) -> float:
        """What all units keep of a microbatch."""
        return sum(self.unit_saved_bytes)

    def least_relief_s(self, excess_bytes: float) -> float:
        """E for all units; what all that can be freed costs where that is not enough."""
        seconds = 0.0
        for segment in self.segments:
            if excess_bytes <= 0:
                break
            taken = min(excess_bytes, segment.freed_bytes * float(segment.members.sum()))
            seconds += segment.rate * taken
            excess_bytes -= taken
        return seconds

    # --- what a parallelism makes of runs -------------------------------------------------------------------

    def _once(self, p: Parallelism, machine: Machine) -> Once:
        """What moves for each unit; parameters that units share count for the first."""
        update_s = least_update_s(p, machine.policy, machine.pricer)
        known: dict[tuple[float, ...], tuple[float, ...]] = {}
        columns = []
        for unit in zip(*self.unit_elements, self._element_bytes, strict=True):
            if unit not in known:
                known[unit] = _unit_once(*unit, p, machine, update_s)
            columns.append(known[unit])
        return Once(*np.array(columns).T)

    def _held_bytes(self, sums: RunSums, p: Parallelism, policy: OptimizerPolicy) -> Array:
        """R: model states, what the last unit works on, and what ZeRO gathers for a moment, as
        `autopar.search.ledger` counts it."""
        held = np.zeros_like(sums.forward_s)
        for is_expert, elements in zip((False, True), sums.elements, strict=True):
            degree = data_groups(p, experts=is_expert)[0].size
            held += state_bytes(p, policy, degree) * elements
        moving = sums.working_bytes
        if self.chain.era.cached_weight_gradients:
            moving = moving + policy.gathered_bytes * sums.largest_weights
        if data_groups(p)[0].size > 1 and p.zero_stage >= 2:
            is_block = sums.block_elements > 0
            largest = np.where(is_block, sums.block_elements, sums.root_elements)
            moving = moving + (policy.gathered_bytes + policy.gradient_bytes) * largest
            if p.zero_stage == 3:
                moving = moving + policy.gathered_bytes * (2 * largest + is_block * sums.root_elements)
        held_bytes: Array = held + self._wasteful * moving
        return held_bytes

    @property
    def _wasteful(self) -> float:
        """What the allocator holds for a byte that comes and goes."""
        return 1 + self.chain.era.fragmentation

    def _times(self, sums: RunSums, once: Once, overlap: Overlap, again_s: Array) -> StageTimes:
        """What runs take that compute `again_s` seconds again, which is infinite where memory is short."""
        moved_s = tuple(map(sums.runs.sums, once))
        return stage_times(
            sums.forward_s, sums.backward_s + again_s, moved_s, sums.num_sharding_units, overlap
        )

    # --- one stage a rank -----------------------------------------------------------------------------------

    @cached_property
    def _all(self) -> RunSums:
        return RunSums(self, AllRuns(self.num_units))

    def cut(
        self,
        p: Parallelism,
        machine: Machine,
        send_s: Sequence[float],
        where: Where = None,
        *,
        fitting: bool = True,
    ) -> Cut | None:
        """The best cuts into one stage a rank; without `fitting` memory is no matter. `send_s` are the
        messages with which each unit would begin a stage. None where memory, or the number of units, allows
        no cuts at all."""
        if p.pp > self.num_units:
            return None
        once, sums = self._once(p, machine), self._all
        room = machine.memory_bytes - self._held_bytes(sums, p, machine.policy)
        known: dict[int, StageTimes] = {}
        values = []
        for stage, flight in enumerate(peak_in_flight(p.schedule, p.pp, p.num_microbatches, 1)):
            if flight not in known:
                again_s = np.zeros_like(room)
                if fitting:
                    again_s = relief_s(sums.segments, sums.saved_bytes - room / (self._wasteful * flight))
                known[flight] = self._times(sums, once, machine.overlap, again_s)
            around_s = _messages_s(np.array(send_s), stage, p.pp)
            found = self._values_s(sums, known[flight], around_s, p.num_microbatches, flight)
            values.append(_legal(found, where))
        return _cheapest(values)

    def _values_s(
        self, sums: RunSums, times: StageTimes, around_s: tuple[Array, Array], m: int, in_flight: int
    ) -> Array:
        """V of all runs as one of the stages, with messages of a microbatch before it and after it."""
        before_s, after_s = around_s
        rest_s = self.microbatch_s - sums.arrival_s - sums.return_s - sums.forward_s - sums.backward_s
        ends_s = sums.arrival_s + before_s + busy_s(times, rest_s + 2 * after_s, m, in_flight)
        values_s: Array = ends_s + np.maximum(sums.return_s + before_s, times.once_s)
        return values_s

    # --- several stages a rank, or one for all --------------------------------------------------------------

    def even(self, num_stages: int, where: Where = None) -> tuple[int, ...] | None:
        """The cuts whose longest stage is shortest; None for fewer units than stages."""
        if num_stages > self.num_units:
            return None
        if num_stages not in self._even:
            values = _legal(self._all.forward_s + self._all.backward_s, where)
            found = _cheapest([values] * num_stages)
            self._even[num_stages] = None if found is None else found.cuts
        return self._even[num_stages]

    def excess_bytes(self, p: Parallelism, machine: Machine, cuts: tuple[int, ...]) -> Array:
        """What each rank at least keeps too much with these cuts, or has left, everywhere with the fastest
        variant."""
        held_bytes = self._held_bytes(self._sums(cuts, _ranks(p)), p, machine.policy)
        peaks = peak_activation_bytes(
            p.schedule, p.pp, p.num_microbatches, self._saved_bytes(cuts), p.num_virtual_stages
        )
        excess: Array = np.array(peaks) - (machine.memory_bytes - held_bytes) / self._wasteful
        return excess

    def in_flight(self, p: Parallelism, cuts: tuple[int, ...]) -> tuple[int, ...]:
        """How many microbatches each stage keeps when its rank keeps most, as `excess_bytes`."""
        return in_flight_when_fullest(
            p.schedule, p.pp, p.num_microbatches, self._saved_bytes(cuts), p.num_virtual_stages
        )

    def _saved_bytes(self, cuts: tuple[int, ...]) -> list[float]:
        found: list[float] = self._sums(cuts).saved_bytes.tolist()
        return found

    def ranks_relief_s(
        self,
        p: Parallelism,
        cuts: tuple[int, ...],
        excess_bytes: Array,
        weights: Sequence[float] | None = None,
    ) -> Array:
        """E of ranks, whose bytes are counted at the moment when a rank holds most: what a unit frees counts
        as often as microbatches of its stage are in flight then, and seconds of a stage by its weight."""
        seconds = np.zeros_like(excess_bytes)
        stages = list(zip(_ranks(p), self.in_flight(p, cuts), weights or repeat(1.0), strict=False))
        for rank in np.flatnonzero(excess_bytes > 0).tolist():
            mine = [(stage, k, w) for stage, (own, k, w) in enumerate(stages) if own == rank and k]
            steps = sorted(
                (rate * w / k, k * freed * number[stage])
                for rate, freed, number in self._sums(cuts).segments
                for stage, k, w in mine
            )
            left = excess_bytes[rank]
            for rate, size in steps:
                seconds[rank] += rate * min(left, size)
                left -= min(left, size)
            if left > 1e-6 * max(1.0, excess_bytes[rank]):
                seconds[rank] = np.inf
        return seconds

    def even_bound_s(
        self, p: Parallelism, machine: Machine, cuts: tuple[int, ...], excess_bytes: Array
    ) -> float:
        """What a step with these cuts takes at least if ranks keep so much less of activations; infinite
        where they cannot."""
        sums = self._sums(cuts, _ranks(p))
        again_s = self.ranks_relief_s(p, cuts, excess_bytes)
        if np.isinf(again_s).any():
            return float("inf")
        times = self._times(sums, self._once(p, machine), machine.overlap, again_s)
        return_s = 0.0 if p.schedule in SPLIT_BACKWARD_SCHEDULES else sums.return_s
        # A rank's first stage is its earliest: what comes before that it must wait for.
        ends_s = sums.arrival_s + p.num_microbatches * times.microbatch_s
        return float((ends_s + np.maximum(return_s, times.once_s)).max())

    def schedule_floor_s(self, p: Parallelism, cuts: tuple[int, ...]) -> float:
        """What the schedule takes at least with these cuts, were there nothing else."""
        key = (p.schedule, p.pp, p.num_microbatches, cuts)
        if key not in self._schedule_floors_s:
            sums = self._sums(cuts)
            weight_s = None
            if p.schedule in SPLIT_BACKWARD_SCHEDULES:
                weight_s = sums.runs.sums([unit.cost.weight_s for unit in self.chain.units]).tolist()
            self._schedule_floors_s[key] = pipeline_lower_bound_s(
                p.pp, p.num_microbatches, sums.forward_s.tolist(), sums.backward_s.tolist(),
                num_virtual=p.num_virtual_stages, schedule_name=p.schedule, weight_s=weight_s,
            )  # fmt: skip
        return self._schedule_floors_s[key]

    def _sums(self, cuts: tuple[int, ...], ranks: tuple[int, ...] = ()) -> RunSums:
        """The sums of the stages, or of ranks with several of them."""
        key = cuts, ranks
        if key not in self._known_sums:
            runs = RankRuns(cuts, ranks, self.num_units) if ranks else GivenRuns(cuts, self.num_units)
            self._known_sums[key] = RunSums(self, runs)
        return self._known_sums[key]


def _ranks(p: Parallelism) -> tuple[int, ...]:
    """The rank of each stage."""
    return stage_ranks(p.schedule, p.pp, p.num_virtual_stages)


def relief_s(segments: Sequence[tuple[float, float, Array]], excess_bytes: Array) -> Array:
    """E: the least time in which units free so many bytes of a microbatch; infinite where they cannot."""
    left = np.maximum(0.0, excess_bytes)
    seconds = np.zeros_like(left)
    if not left.any():
        return seconds
    for rate, freed, number in segments:
        taken = np.minimum(left, freed * number)
        seconds += rate * taken
        left -= taken
    seconds[left > 1e-6 * np.maximum(1.0, excess_bytes)] = np.inf
    return seconds


def state_bytes(p: Parallelism, policy: OptimizerPolicy, degree: int) -> float:
    """Bytes of a parameter's model states on a rank, sharded over `degree` of them."""
    return model_state_ledger(1.0, device_policy(p, policy), p.zero_stage, degree).total_bytes


def _unit_once(
    dense: float, experts: float, element_bytes: float, p: Parallelism, machine: Machine, update_s: float
) -> tuple[float, ...]:
    """What moves for one unit; updating a parameter takes `update_s`."""
    buckets = {
        Bucket(int(number), int(number * element_bytes), is_expert): 1
        for number, is_expert in ((dense, False), (experts, True))
        if number
    }
    traffic = data_traffic(buckets, p, machine.pricer, machine.policy)
    updated = updated_elements({False: int(dense), True: int(experts)}, p)
    return traffic.forward_s, traffic.backward_s, traffic.step_s, update_s * updated


def _messages_s(send_s: Array, stage: int, num_stages: int) -> tuple[Array, Array]:
    """The least that the messages to a stage and those from it take on the way of a microbatch to the last
    one: for each unit that it may begin with, and for each with which the next one may."""
    least_s = float(send_s[1:].min(initial=np.inf)) if num_stages > 1 else 0.0
    at_s = np.append(send_s, 0.0)
    num_after = num_stages - 1 - stage
    before_s = at_s + (stage - 1) * least_s if stage else np.zeros_like(at_s)
    after_s = at_s + (num_after - 1) * least_s if num_after else np.zeros_like(at_s)
    return before_s[:, None], after_s


def _legal(values: Array, where: Where) -> Array:
    """The values, infinite where there is no run, or none that may be a stage."""
    values[~np.triu(np.ones_like(values, dtype=bool), 1)] = np.inf
    if where is not None:
        values[~where] = np.inf
    return values


def _cheapest(values: Sequence[Array]) -> Cut | None:
    """The cuts whose largest value is smallest."""
    best = values[0][0]
    came_from = []
    for stage in values[1:]:
        through = np.maximum(best[:, None], stage)
        came_from.append(through.argmin(axis=0))
        best = through.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    cuts = [len(best) - 1]
    for previous in reversed(came_from):
        cuts.append(int(previous[cuts[-1]]))
    return Cut((0, *reversed(cuts[1:])), float(best[-1]))
