"""What no candidate of a kind can beat: floors on step time and memory, from the whole graph alone.

Per sample, the arithmetic of all matrix products and attention at the rate the device reaches takes

    floor = Σ flops / rate,

forward and backward, over however many devices; nothing else is counted. A candidate with m microbatches on p stages
cannot be faster than the pipeline of stages cut as well as possible. With T_r the time of stage r and S_r the sum of
T up to r, rank r ends no earlier than S_r + (m - 1) T_r; making all of these equal gives

    step ≥ total / (1 - (1 - 1/m)^p)      total = Σ T_r

for one stage a rank, and m · total / p for several. Memory, averaged over ranks, is at least the model states and one
microbatch's activations, divided over all ranks that can share them.
"""

from __future__ import annotations

from functools import cached_property

from autopar.plan import Parallelism, Recompute
from autopar.pricing import dtype_name, is_causal, kind_of
from costmodel import OptimizerPolicy, model_state_ledger
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
        ops = (op for block in self.graph.blocks for op in self.graph.ops[block.start : block.stop])
        return sum(self._forward_s(op) for op in ops) / self.batch

    @cached_property
    def saved_bytes(self) -> dict[Recompute, float]:
        """At least this much is kept of one sample."""
        graph = self.graph
        fixed = {*graph.parameter_tensors, *graph.inputs, *(buffer.tensor for buffer in graph.buffers)}
        inside = {op.name for block in graph.blocks for op in graph.ops[block.start : block.stop]}
        everything = {s for op in graph.ops for s in op.saved} - fixed
        outside = {s for op in graph.ops if op.name not in inside for s in op.saved} - fixed
        whole = sum(graph.tensors[s].num_bytes for s in everything) / self.batch
        rest = sum(graph.tensors[s].num_bytes for s in outside) / self.batch
        return {"none": whole, "selective": rest, "full": rest}

    def step_s(self, p: Parallelism, sample_s: float | None = None) -> float:
        """No step with this parallelism takes less.

        `sample_s` is what one sample is known to cost on one rank of all stages together, where that is known.
        """
        if sample_s is None:
            sample_s = (self.forward_s + self.backward_s) / p.tp
        if p.recompute == "full":
            sample_s += self.block_forward_s / p.tp
        total_s = p.microbatch_size * sample_s
        m = p.num_microbatches
        pipeline_s = m * total_s / p.pp
        if p.num_virtual_stages == 1:
            pipeline_s = total_s / (1 - (1 - 1 / m) ** p.pp)
        return pipeline_s + self._update_s(p)

    def memory_bytes(self, p: Parallelism) -> float:
        """No rank of the fullest kind has less."""
        share = self.num_parameters / (p.pp * p.tp)
        states = model_state_ledger(share, self.policy, p.zero_stage, p.dp_shard).total_bytes
        activations = p.microbatch_size * self.saved_bytes[p.recompute] / (p.pp * p.tp)
        return states + activations + self.cluster.device.efficiency.reserved_memory_bytes

    def _update_s(self, p: Parallelism) -> float:
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
