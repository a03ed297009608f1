"""What no candidate of a kind can beat: floors on step time and memory, from the whole graph alone.

Per sample, the arithmetic of all matrix products and attention at the rate the device reaches takes

    floor = Σ flops / rate,

forward and backward, over however many devices; nothing else is counted. A candidate with m microbatches on p
stages cannot be faster than the pipeline of stages cut as well as possible. With T_r the time of stage r and
S_r the sum of T up to r, rank r ends no earlier than S_r + (m - 1) T_r; making all of these equal gives

    step ≥ total / (1 - (1 - 1/m)^p)      total = Σ T_r

for one stage a rank, and m · total / p for several. Memory: a rank with n of the B repeated blocks and k
microbatches in flight holds at least n (a + k s), a being a block's model states and s its saved activations,
both split as far as the ranks allow; so however the blocks are dealt out, some rank holds

    memory ≥ B / Σ_r 1 / (a + k_r s).

On one stage everything is held at once, and the operands and gradients of the largest op with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from itertools import compress

from autopar.op_kinds import dtype_name, is_causal, kind_of
from autopar.plan import Parallelism, Recompute
from autopar.pricing import DEFAULT_SOFTWARE, Pricer
from autopar.search.data_axes import data_groups
from autopar.search.saved import MODES, Saved, SavedActivations
from autopar.search.units import unit_starts
from costmodel import OptimizerPolicy, Software, model_state_ledger, peak_in_flight, software
from graphs import Capture
from graphs.ir import Op, OpGraph
from hardware_db import Cluster


class Bounds:
    """Floors for one model on one cluster."""

    def __init__(
        self, capture: Capture, cluster: Cluster, policy: OptimizerPolicy, era: Software | None = None
    ) -> None:
        self.software = era or software(DEFAULT_SOFTWARE)
        self.cluster = cluster
        self.policy = policy
        self.graph: OpGraph = capture.graph
        self.num_parameters = capture.graph.num_parameters
        self.batch = 2  # the reference batch of a capture

    @cached_property
    def forward_s(self) -> float:
        """Arithmetic of one sample's forward."""
        return sum(self._forward_s(op) for op in self.graph.ops) / self.batch

    @cached_property
    def backward_s(self) -> float:
        return sum(self._backward_s(op) for op in self.graph.ops) / self.batch

    @cached_property
    def block_forward_s(self) -> float:
        """Arithmetic that full recomputation repeats."""
        counts = Counter(block.block_class for block in self.graph.blocks)
        repeated_s = 0.0
        for block in self.graph.blocks:
            if count := counts.pop(block.block_class, 0):
                again, _ = self._activations.unit(block.start, block.stop, is_block=True)
                ops = compress(self.graph.ops[block.start : block.stop], again["full"])
                repeated_s += count * sum(map(self._forward_s, ops))
        return repeated_s / self.batch

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
    def _units(self) -> list[tuple[int, bool, Mapping[Recompute, Saved]]]:
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
                _, saved = self._activations.unit(start, stop, is_block=block is not None)
                found.append((count, block is not None, saved))
        return found

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return unit_starts(self.graph)

    @cached_property
    def _activations(self) -> SavedActivations:
        return SavedActivations(self.graph, self.software)

    def _own(self, saved: Saved) -> float:
        """What a unit keeps of one sample that no other unit does: made by it, or passed to it alone."""

        def num_units(name: str) -> int:
            readers = self._activations.needs.readers.get(name, ())
            return len({bisect_right(self._starts, index) for index in readers})

        alone = (
            num_bytes
            for name, num_bytes in saved.storages.items()
            if self.graph.tensors[name].requires_grad and num_units(name) <= 1
        )
        return (sum(alone) + saved.internal_bytes) / self.batch

    @cached_property
    def block_parameters(self) -> int:
        """Every block has at least so many parameters, those shared between blocks left out."""
        graph = self.graph
        readers = {p.tensor: len(graph.consumers[p.tensor]) for p in graph.parameters}
        own = (
            {
                name
                for op in graph.ops[block.start : block.stop]
                for name in op.inputs
                if readers.get(name) == 1
            }
            for block in graph.blocks
        )
        return min((sum(graph.tensors[name].num_elements for name in names) for names in own), default=0)

    @cached_property
    def working_bytes(self) -> float:
        """What the last unit holds beside what it keeps of one sample: all else is still kept then."""
        return min(saved.working_bytes for saved in self._units[-1][2].values()) / self.batch

    def step_s(self, p: Parallelism, sample_s: float | None = None) -> float:
        """No step with this parallelism takes less.

        `sample_s` is what one sample is known to cost on one rank of all stages together, where that is
        known.
        """
        if sample_s is None:
            sample_s = (self.forward_s + self.backward_s) / p.tp
        if p.recompute == "full":
            sample_s += self.block_forward_s / p.tp
        moved_s, sync_s = self._data_traffic_s(p)
        total_s = max(p.microbatch_size * sample_s, moved_s)
        m = p.num_microbatches
        pipeline_s = m * total_s / p.pp
        if p.num_virtual_stages == 1:
            pipeline_s = total_s / (1 - (1 - 1 / m) ** p.pp)
        return pipeline_s + max(0.0, sync_s - total_s) / p.pp + self.update_s(p)

    def _data_traffic_s(self, p: Parallelism) -> tuple[float, float]:
        """Bandwidth time of the data axes, over all stages: with every microbatch, and once a step.

        What moves with a microbatch can at best hide all of its computing, and the other way round; what
        moves once a step can hide behind one microbatch.
        """
        parameter_bytes = self.policy.parameter_bytes * self.num_parameters / p.tp
        gradient_bytes = self.policy.gradient_bytes * self.num_parameters / p.tp
        shard, replicate = data_groups(p)
        move_s = self._pricer.bucketed_s
        gather_s = move_s("all_gather", parameter_bytes, shard)
        scatter_s = move_s("reduce_scatter", gradient_bytes, shard)
        replicas_s = move_s("all_reduce", gradient_bytes / p.dp_shard, replicate)
        if p.zero_stage <= 1:
            return 0.0, scatter_s + gather_s + replicas_s
        earlier_s = scatter_s * (p.num_microbatches - 1) / p.num_microbatches
        if p.zero_stage == 2:
            return earlier_s, scatter_s + gather_s + replicas_s
        return 2 * gather_s + earlier_s, scatter_s + replicas_s

    @cached_property
    def _pricer(self) -> Pricer:
        return Pricer(self.cluster, {}, self.software)

    def memory_bytes(self, p: Parallelism) -> float:
        """Whatever the program and the cuts, some rank holds this much."""
        per_element = model_state_ledger(1.0, self.policy, p.zero_stage, data_groups(p)[0].size).total_bytes
        samples = p.microbatch_size / p.tp
        states = per_element * self.num_parameters / (p.pp * p.tp)
        held = states + samples * self.saved_bytes[p.recompute] / p.pp
        if p.pp == 1:
            held += samples * self.working_bytes
        else:
            held = max(held, samples * self.working_bytes, self._blocks_bytes(p, per_element / p.tp, samples))
        return held + self.cluster.device.efficiency.reserved_memory_bytes

    def _blocks_bytes(self, p: Parallelism, per_element: float, samples: float) -> float:
        """What the repeated blocks alone take of the fullest rank; virtual stages of a rank are thought
        equal."""
        state = per_element * self.block_parameters
        saved = samples * self.block_saved_bytes[p.recompute] / p.num_virtual_stages
        if not state:
            return 0.0
        flights = peak_in_flight(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages)
        return len(self.graph.blocks) / sum(1 / (state + flight * saved) for flight in flights)

    def update_s(self, p: Parallelism) -> float:
        """The optimizer's traffic at the device's full bandwidth."""
        share = self.num_parameters / (p.pp * p.tp * (p.dp_shard if p.zero_stage else 1))
        return self.policy.update_bytes * share / self.cluster.device.memory_bandwidth_bytes_per_s

    def _forward_s(self, op: Op) -> float:
        kind = kind_of(op, self.graph.tensors)
        if kind not in ("matmul", "attention"):
            return 0.0
        efficiency = self.cluster.device.efficiency
        share = efficiency.matmul if kind == "matmul" else efficiency.attention
        peak = self.cluster.device.peak_flops_per_s(dtype_name(self.graph.tensors[op.outputs[0]].dtype))
        return (op.flops / 2 if kind == "attention" and is_causal(op) else op.flops) / (peak * share)

    def _backward_s(self, op: Op) -> float:
        tensors = self.graph.tensors
        if not any(tensors[name].requires_grad for name in op.outputs):
            return 0.0
        if kind_of(op, tensors) == "attention":
            return 2.5 * self._forward_s(op)
        return self._forward_s(op) * sum(tensors[name].requires_grad for name in dict.fromkeys(op.inputs))
