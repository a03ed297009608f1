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

from collections.abc import Iterable, Sequence
from functools import cached_property

from autopar.plan import Parallelism, Recompute
from autopar.pricing import Pricer, dtype_name, is_causal, kind_of
from autopar.search.data_axes import data_groups
from costmodel import OptimizerPolicy, model_state_ledger, peak_in_flight
from graphs import Capture
from graphs.ir import Op, OpGraph
from hardware_db import Cluster


class Bounds:
    """Floors for one model on one cluster."""

    def __init__(self, capture: Capture, cluster: Cluster, policy: OptimizerPolicy) -> None:
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
        """Arithmetic of the repeated blocks alone: what full recomputation repeats."""
        return sum(self._forward_s(op) for op in self.graph.ops if op.name in self._in_blocks) / self.batch

    @cached_property
    def saved_bytes(self) -> dict[Recompute, float]:
        """At least this much is kept of one sample."""
        rest = self._saved(op for op in self.graph.ops if op.name not in self._in_blocks)
        inputs = {storage for ops in self._blocks for storage in self._entering(ops)}
        products = {storage for ops in self._blocks for storage in self._products(ops)}
        return {
            "none": self._saved(self.graph.ops),
            "selective": self._bytes(inputs | products) + rest,
            "full": self._bytes(inputs) + rest,
        }

    @cached_property
    def block_saved_bytes(self) -> dict[Recompute, float]:
        """At least this much of it is kept of any one block."""
        blocks = self._blocks
        return {
            "none": min(map(self._saved, blocks), default=0.0),
            "selective": min(
                (self._bytes(self._entering(b) | self._products(b)) for b in blocks), default=0.0
            ),
            "full": min((self._bytes(self._entering(b)) for b in blocks), default=0.0),
        }

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
        """Results and gradients of the hungriest op, for one sample."""
        tensors = self.graph.tensors
        sizes = (
            sum(tensors[name].num_bytes for name in op.outputs)
            + sum(
                tensors[n].num_bytes
                for n in dict.fromkeys(op.inputs)
                if tensors[n].requires_grad and n not in self._fixed
            )
            for op in self.graph.ops
            if kind_of(op, tensors) != "view"
        )
        return max(sizes, default=0) / self.batch

    @cached_property
    def _fixed(self) -> set[str]:
        graph = self.graph
        return {*graph.parameter_tensors, *graph.inputs, *(buffer.tensor for buffer in graph.buffers)}

    @cached_property
    def _in_blocks(self) -> set[str]:
        return {op.name for block in self.graph.blocks for op in self.graph.ops[block.start : block.stop]}

    @cached_property
    def _blocks(self) -> list[tuple[Op, ...]]:
        return [self.graph.ops[block.start : block.stop] for block in self.graph.blocks]

    def _products(self, ops: Sequence[Op]) -> set[str]:
        """What selective recomputation keeps of a block."""
        return {
            name
            for op in ops
            if kind_of(op, self.graph.tensors) in ("matmul", "attention")
            for name in op.outputs[:1]
        }

    def _entering(self, ops: Sequence[Op]) -> set[str]:
        tensors = self.graph.tensors
        inside = {name for op in ops for name in op.outputs}
        read = {name for op in ops for name in op.inputs} - inside
        return {tensors[name].storage for name in read if tensors[name].requires_grad} - self._fixed

    def _saved(self, ops: Iterable[Op]) -> float:
        return self._bytes({storage for op in ops for storage in op.saved} - self._fixed)

    def _bytes(self, storages: Iterable[str]) -> float:
        return sum(self.graph.tensors[storage].num_bytes for storage in storages) / self.batch

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
        return Pricer(self.cluster, {})

    def memory_bytes(self, p: Parallelism) -> float:
        """Whatever the program and the cuts, some rank holds this much."""
        per_element = model_state_ledger(1.0, self.policy, p.zero_stage, p.dp_shard).total_bytes
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
