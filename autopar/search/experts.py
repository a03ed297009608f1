"""Expert parallelism: the experts of every mixture layer dealt out over `ep` of the data-parallel ranks.

A rank then holds 1/ep of every expert parameter and computes as many rows as before, now for its experts
alone. Rows travel to their experts by an all_to_all and back by another, and so do their gradients (GShard,
arXiv:2006.16668). The gradient of an expert is summed over the dp/ep ranks that hold it. Load is thought to
be balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.pricing import OpCost, Pricer, total
from autopar.search.units import Chain, Unit
from graphs.ir import Op, OpGraph

GROUPED = "grouped_mm"


def expert_parameters(graph: OpGraph) -> frozenset[str]:
    """Tensors of the parameters that grouped matrix products multiply by."""
    return frozenset(
        name for op in graph.ops if GROUPED in op.target for name in _parameters_behind(graph, op.inputs[1])
    )


def num_experts(graph: OpGraph) -> int:
    """Experts of one layer: the leading dimension of their weights; 0 for a model without any."""
    return max((graph.tensors[name].shape[0] for name in expert_parameters(graph)), default=0)


def _parameters_behind(graph: OpGraph, name: str) -> frozenset[str]:
    """The parameter that a value is a view, a cast or a gathered copy of."""
    while name in graph.producer:
        inputs = graph.ops[graph.producer[name]].inputs
        if len(inputs) != 1:
            return frozenset()
        name = inputs[0]
    return frozenset({name} & set(graph.parameter_tensors))


@dataclass(frozen=True)
class ExpertParallelism:
    """The experts of a local graph, dealt out over the `ep` axis of a pricer."""

    graph: OpGraph
    pricer: Pricer

    @cached_property
    def size(self) -> int:
        return self.pricer.groups["ep"].size

    def applied(self, chain: Chain) -> Chain:
        """The chain of the same graph with its experts dealt out."""
        experts = expert_parameters(self.graph)
        own = {name: name.partition("#")[0] in experts for name in chain.parameters}
        parameters = {
            name: replace(
                shard,
                num_elements=shard.num_elements // self.size,
                num_bytes=shard.num_bytes // self.size,
                is_expert=True,
            )
            if own[name]
            else shard
            for name, shard in chain.parameters.items()
        }
        return Chain(tuple(self._unit(unit, own) for unit in chain.units), parameters)

    def _unit(self, unit: Unit, own: dict[str, bool]) -> Unit:
        read = {name.partition("#")[0] for name in unit.parameters if own[name]}
        if not read:
            return unit
        products = [op for op in self.graph.ops if GROUPED in op.target]
        mine = [op for op in products if read & _parameters_behind(self.graph, op.inputs[1])]
        exchange = total([self._exchange(mine)])
        recompute_s = {
            mode: seconds + (exchange.forward_total_s if mode == "full" else 0.0)
            for mode, seconds in unit.recompute_s.items()
        }
        return replace(unit, cost=total([unit.cost, exchange]), recompute_s=recompute_s)

    def _exchange(self, products: Sequence[Op]) -> OpCost:
        """Rows to their experts before a layer's first product and back after its last, in both passes."""
        tensors = self.graph.tensors
        there = tensors[products[0].inputs[0]].num_bytes
        back = tensors[products[-1].outputs[0]].num_bytes
        group = self.pricer.groups["ep"]
        seconds = sum(self.pricer.collective_s("all_to_all", num_bytes, group) for num_bytes in (there, back))
        return OpCost(forward_communication_s=seconds, backward_communication_s=seconds)
