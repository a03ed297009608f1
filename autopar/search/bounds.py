"""What no candidate of a kind can beat: floors on step time and memory, before its stages are known.

A microbatch takes T seconds on one rank of all stages together (`autopar.search.floors` knows how little). A
candidate with m microbatches on p stages cannot be faster than the pipeline of stages cut as well as
possible. With T_r the time of stage r and S_r the sum of T up to r, rank r ends no earlier than
S_r + (m - 1) T_r; making all of these equal gives

    step ≥ T / (1 - (1 - 1/m)^p)      T = Σ T_r

for one stage a rank, and m T / p for several, or where gradients of weights fill the gaps. With more
microbatches than stages, the last forward of a rank is followed by its way to the end and back, so that it
ends no earlier than T + U_r + (m - 1 - k_r) T_r, U_r being the sum of T from r on and k_r = p - r + 1 what is
in flight; making these equal gives T (1 + (m - 1) / p). What all ranks together do once a step, O seconds,
late ones may do while the pipeline runs empty: it counts only in step ≥ (m T + O) / p. Memory: a rank
with n of the B repeated blocks and k microbatches in flight holds at least n (a + k s), a being a block's
model states and s its saved activations, both split as far as the ranks allow; so however the blocks are
dealt out, some rank holds

    memory ≥ B / Σ_r 1 / (a + k_r s).

On one stage everything is held at once, and the operands and gradients of the largest op with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import NamedTuple, Protocol

import numpy as np

from autopar.kernels import KernelMaker
from autopar.plan import Parallelism, Recompute
from autopar.pricing import DEFAULT_SOFTWARE, Pricer
from autopar.search.data_axes import (
    data_groups,
    held_states,
    least_accumulation_s,
    least_update_s,
    updated_elements,
)
from autopar.search.experts import expert_parameters
from autopar.search.needs import Needs, needs_of
from autopar.search.pieces import Elements
from autopar.search.runs import Array
from autopar.search.saved import MODES, Saved, saved_by_unit
from autopar.search.units import unit_starts
from costmodel import OptimizerPolicy, Software, peak_in_flight, software
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES
from graphs import Capture
from graphs.ir import OpGraph
from hardware_db import Cluster


class DataAxes(NamedTuple):
    """Bandwidth time of the data axes over all stages, with every microbatch and once a step, the time in
    which gradients are added to those of earlier microbatches, and of the update, and bytes of all model
    states."""

    moved_s: float
    sync_s: float
    accumulation_s: float
    update_s: float
    state_bytes: float


class States(NamedTuple):
    """Bytes of model states on a rank at least, of ways that differ in what the data axes shard: of all
    stages together, and of any one block."""

    all_bytes: Array
    block_bytes: Array


class DeviceSums(Protocol):
    """The sums of a microbatch on one device that floors are made of."""

    @property
    def computed_s(self) -> float: ...
    @property
    def weight_s(self) -> float: ...
    @property
    def all_saved_bytes(self) -> float: ...
    def least_relief_s(self, excess_bytes: float) -> float: ...


class Bounds:
    """Floors for one model on one cluster."""

    def __init__(
        self,
        capture: Capture,
        cluster: Cluster,
        policy: OptimizerPolicy,
        era: Software | None = None,
        low_precision: str | None = None,
    ) -> None:
        self.software = era or software(DEFAULT_SOFTWARE)
        self.cluster = cluster
        self.policy = policy
        self.low_precision = low_precision
        self.graph: OpGraph = capture.graph
        self.batch = 2  # the reference batch of a capture
        self._known: dict[tuple[object, ...], DataAxes] = {}
        self._state_bytes: dict[tuple[object, ...], tuple[float, float]] = {}

    @cached_property
    def saved_bytes(self) -> dict[Recompute, float]:
        """At least this much is kept of one sample."""
        return {
            mode: sum(count * self._own(saved[mode]) for count, _, saved in self._units) for mode in MODES
        }

    @cached_property
    def block_saved_bytes(self) -> dict[Recompute, float]:
        """At least this much of it is kept of any one block."""
        blocks = [saved for _, is_block, saved in self._units if is_block]
        return {mode: min((self._own(saved[mode]) for saved in blocks), default=0.0) for mode in MODES}

    @cached_property
    def _units(self) -> list[tuple[int, bool, Mapping[str, Saved]]]:
        """What the units of the whole model keep: how many there are of a kind, and whether they are
        blocks."""
        graph = self.graph
        blocks = {block.start: block for block in graph.blocks}
        counts = Counter(block.block_class for block in graph.blocks)
        found = []
        for start, stop in zip(self._starts, [*self._starts[1:], len(graph.ops)], strict=True):
            block = blocks.get(start)
            count = 1 if block is None else counts.pop(block.block_class, 0)
            if count:
                _, saved = saved_by_unit(self._needs, start, stop, is_block=block is not None)
                found.append((count, block is not None, saved))
        return found

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return unit_starts(self.graph)

    @cached_property
    def _needs(self) -> Needs:
        blocks = tuple(block.path for block in self.graph.blocks)
        return needs_of(self.graph, KernelMaker(self.software, {}, self.low_precision, blocks))

    def _own(self, saved: Saved) -> float:
        """What a unit keeps of one sample that no other unit does: made by it, or passed to it alone."""

        def num_units(name: str) -> int:
            readers = self._needs.readers.get(name, ())
            return len({bisect_right(self._starts, index) for index in readers})

        alone = (
            num_bytes
            for name, num_bytes in saved.storages.items()
            if self.graph.tensors[name].requires_grad and num_units(name) <= 1
        )
        return (sum(alone) + saved.internal_bytes) / self.batch

    @cached_property
    def _block_parameters(self) -> frozenset[tuple[int, int]]:
        """Elements of what kinds of blocks have, as `_elements`; parameters that others share left out."""
        graph = self.graph
        readers = {p.tensor: len(graph.consumers[p.tensor]) for p in graph.parameters}
        return frozenset(
            self._elements(
                name
                for op in graph.ops[block.start : block.stop]
                for name in op.inputs
                if readers.get(name) == 1
            )
            for block in graph.blocks
        )

    @cached_property
    def _parameters(self) -> tuple[int, int]:
        return self._elements(parameter.tensor for parameter in self.graph.parameters)

    def _elements(self, names: Iterable[str]) -> tuple[int, int]:
        """Elements of dense parameters and of experts."""
        sizes = [0, 0]
        for name in set(names):
            sizes[name in self._experts] += self.graph.tensors[name].num_elements
        return sizes[0], sizes[1]

    @cached_property
    def _experts(self) -> frozenset[str]:
        return expert_parameters(self.graph)

    def states(self, ways: Iterable[Parallelism]) -> States:
        """The model states of each of these ways."""
        return States(*np.array([self._states(p) for p in ways]).reshape(-1, 2).T)

    def block_state_bytes(self, p: Parallelism) -> float:
        """Model states of any one block on a rank, at least."""
        _, block_bytes = self._states(p)
        return block_bytes

    def _states(self, p: Parallelism) -> tuple[float, float]:
        """Bytes of all model states, and of those of any one block."""
        key = _sharding(p)
        if key not in self._state_bytes:
            all_bytes, *blocks_bytes = (
                held_states(_split(elements, p), p, self.policy).total_bytes
                for elements in (self._parameters, *self._block_parameters)
            )
            self._state_bytes[key] = all_bytes, min(blocks_bytes, default=0.0)
        return self._state_bytes[key]

    @cached_property
    def working_bytes(self) -> float:
        """What the last unit holds beside what it keeps of one sample: all else is still kept then."""
        return min(saved.working_bytes for saved in self._units[-1][2].values()) / self.batch

    def step_s(self, p: Parallelism, microbatch_s: float, device: DeviceSums) -> float:
        """No step with this parallelism takes less, if a microbatch takes `microbatch_s` on one rank of all
        stages together; `device` has the sums of the same microbatch on one device."""
        moved_s, sync_s, _, update_s, _ = self._data(p)
        more_s = self.more_s(p, device)
        microbatch_s += more_s
        # What moves behind computing slows it down; what does not fit behind it comes on top.
        contention = self.software.contention
        total_s = microbatch_s + max(contention * moved_s, moved_s - microbatch_s)
        pipeline_s = max(pipeline_floor_s(p, total_s), _through_s(p, device, more_s))
        # Once a step ranks have more to do, but may do it while the pipeline runs empty.
        once_s = max(contention * sync_s, sync_s - total_s) + update_s
        busy_s = (p.num_microbatches * total_s + once_s) / p.pp
        return max(pipeline_s, busy_s) + self.software.step_overhead_s

    def layout_s(self, p: Parallelism, microbatch_s: float, device: DeviceSums) -> float:
        """The same for every way to run the layout of `p`, the one that keeps least: nothing but its
        microbatches without a bubble, and the way of one of them through all stages."""
        more_s = self.more_s(p, device)
        busy_s = p.num_microbatches * (microbatch_s + more_s) / p.pp
        return max(busy_s, _through_s(p, device, more_s)) + self.software.step_overhead_s

    def pipeline_s(self, p: Parallelism, microbatch_s: float, device: DeviceSums) -> float:
        """The same with the bubble of its schedule."""
        more_s = self.more_s(p, device)
        pipeline_s = pipeline_floor_s(p, microbatch_s + more_s)
        return max(pipeline_s, _through_s(p, device, more_s)) + self.software.step_overhead_s

    def more_s(self, p: Parallelism, device: DeviceSums) -> float:
        """What a microbatch takes on all stages together beside its own passes: what must be computed again,
        and its gradients added to those before."""
        data = self._data(p)
        return self._again_s(p, device, data.state_bytes) + data.accumulation_s

    def _again_s(self, p: Parallelism, device: DeviceSums, state_bytes: float) -> float:
        """What must at least be computed again for a microbatch, on all stages together, beside all model
        states.

        However activations are split, a rank r with k_r microbatches in flight keeps no more of each than
        what is left of its memory, divided by k_r; what the sum over all ranks leaves over is freed at the
        least seconds a byte.
        """
        inner = p.tp * p.cp
        shares, least = _shares(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages)
        # States are somewhere: taken off where they cost the least room.
        room = (self.limit_bytes - self._reserved_bytes) * shares - state_bytes * least
        kept = room * inner / (1 + self.software.fragmentation)
        return device.least_relief_s(device.all_saved_bytes - kept) / inner

    def _data(self, p: Parallelism) -> DataAxes:
        """What the data axes do, whatever the schedule."""
        key = (*_sharding(p), p.num_microbatches)
        if key not in self._known:
            elements = _split(self._parameters, p)
            traffic_s = [self._traffic_s(p, number, is_expert) for is_expert, number in elements.items()]
            moved_s, sync_s = map(sum, zip(*traffic_s, strict=True))
            update_s = updated_elements(elements, p) * least_update_s(p, self.policy, self._pricer)
            state_bytes, _ = self._states(p)
            accumulation_s = sum(elements.values()) * least_accumulation_s(p, self.policy, self._pricer)
            self._known[key] = DataAxes(moved_s, sync_s, accumulation_s, update_s, state_bytes)
        return self._known[key]

    def _traffic_s(self, p: Parallelism, num_elements: int, is_expert: bool) -> tuple[float, float]:
        """Bandwidth time of the data axes for so many elements: with every microbatch, and once a step.

        What moves with a microbatch can at best hide all of its computing, and the other way round; what
        moves once a step can hide behind one microbatch.
        """
        parameter_bytes = self.policy.gathered_bytes * num_elements
        gradient_bytes = self.policy.gradient_bytes * num_elements
        shard, replicate = data_groups(p, experts=is_expert)
        move_s = self._pricer.bucketed_s
        gather_s = move_s("all_gather", parameter_bytes, shard)
        scatter_s = move_s("reduce_scatter", gradient_bytes, shard)
        replicas_s = move_s("all_reduce", gradient_bytes / shard.size, replicate)
        if p.zero_stage <= 1:
            return 0.0, scatter_s + gather_s + replicas_s
        earlier_s = scatter_s * (p.num_microbatches - 1) / p.num_microbatches
        if p.zero_stage == 2:
            return earlier_s, scatter_s + gather_s + replicas_s
        return 2 * gather_s + earlier_s, scatter_s + replicas_s

    @cached_property
    def _pricer(self) -> Pricer:
        return Pricer(self.cluster, {}, self.software)

    def memory_bytes(self, p: Parallelism, recompute: Recompute | None = None) -> float:
        """Whatever the program and the cuts, some rank holds this much; with another way to `recompute`, if
        it is given."""
        return float(self.ways_bytes(p, self.states((p,)), recompute)[0])

    def ways_bytes(self, p: Parallelism, states: States, recompute: Recompute | None = None) -> Array:
        """The same of each of the ways that differ from `p` in nothing but their model states."""
        samples = p.microbatch_size / (p.tp * p.cp)
        mode = recompute or p.recompute
        if mode == "mixed":
            mode = "full"
        held = (states.all_bytes + samples * self.saved_bytes[mode]) / p.pp
        if p.pp == 1:
            held = held + samples * self.working_bytes
        else:
            held = np.maximum(held, samples * self.working_bytes)
            held = np.maximum(held, self._blocks_bytes(p, mode, samples, states.block_bytes))
        total: Array = held + self._reserved_bytes
        return total

    @cached_property
    def limit_bytes(self) -> float:
        """The memory of a device."""
        return self.cluster.device.memory_bytes

    @cached_property
    def _reserved_bytes(self) -> float:
        return self.cluster.device.efficiency.reserved_memory_bytes

    def _blocks_bytes(self, p: Parallelism, mode: Recompute, samples: float, state_bytes: Array) -> Array:
        """What the repeated blocks alone take of the fullest rank; virtual stages of a rank are thought
        equal."""
        if not state_bytes.all():
            return np.zeros_like(state_bytes)
        saved = samples * self.block_saved_bytes[mode] / p.num_virtual_stages
        flights = _flights(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages)
        found: Array = len(self.graph.blocks) / (1 / (state_bytes[:, None] + saved * flights)).sum(axis=1)
        return found


def _through_s(p: Parallelism, device: DeviceSums, more_s: float) -> float:
    """The way of a microbatch through all stages and back, where gradients of weights are put off: from the
    sums of one device, as a rank may take longer than its share for just those."""
    return (device.computed_s - device.weight_s) / (p.tp * p.cp) + more_s


def _sharding(p: Parallelism) -> tuple[object, ...]:
    """What model states of a rank depend on, beside the elements that its stages have."""
    return p.tp, p.cp, p.ep, p.dp_shard, p.dp_replicate, p.zero_stage, p.offload


def _split(elements: tuple[int, int], p: Parallelism) -> Elements:
    """What of dense parameters and experts a rank has if all of them are split."""
    dense, experts = elements
    if p.ep == 1:
        return {False: (dense + experts) // p.tp}
    return {False: dense // p.tp, True: experts // (p.tp * p.ep)}


@cache
def _flights(schedule: str, pp: int, num_microbatches: int, num_virtual_stages: int) -> Array:
    """`peak_in_flight` to calculate with."""
    return np.array(peak_in_flight(schedule, pp, num_microbatches, num_virtual_stages), dtype=np.float64)


@cache
def _shares(schedule: str, pp: int, num_microbatches: int, num_virtual_stages: int) -> tuple[float, float]:
    """The part of its memory that a microbatch may have, summed over all ranks, and the least of them."""
    flights = peak_in_flight(schedule, pp, num_microbatches, num_virtual_stages)
    shares = [num_virtual_stages / flight for flight in flights]
    return sum(shares), min(shares)


def pipeline_floor_s(p: Parallelism, total_s: float) -> float:
    """No pipeline takes less whose stages take `total_s` for a microbatch together."""
    m = p.num_microbatches
    if p.num_virtual_stages > 1 or p.schedule in SPLIT_BACKWARD_SCHEDULES:
        return m * total_s / p.pp
    if m > p.pp or p.schedule == "GPipe":
        return total_s * (1 + (m - 1) / p.pp)
    return total_s / (1 - (1 - 1 / m) ** p.pp)
