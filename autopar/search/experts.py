"""Expert parallelism: the experts of every mixture layer dealt out over `ep` of the data-parallel ranks.

A rank then holds 1/ep of every expert parameter and computes as many rows as before, now for its experts
alone. Rows travel to their experts by an all_to_all and back by another, and so do their gradients (GShard,
arXiv:2006.16668); before them their numbers, of which the experts need to know. The gradient of an expert is
summed over the dp/ep ranks that hold it. Load is thought to be balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.kernels import KernelMaker, Kernels, Move
from autopar.search.units import Chain, Unit
from graphs.ir import OpGraph

GROUPED = "grouped_mm"


def expert_parameters(graph: OpGraph) -> frozenset[str]:
    """Tensors of the parameters that grouped matrix products multiply by."""
    return frozenset(
        name for op in graph.ops if GROUPED in op.target for name in _parameters_behind(graph, op.inputs[1])
    )


def num_experts(graph: OpGraph) -> int:
    """Experts of one layer: the leading dimension of their weights; 0 for a model without any."""
    return max((graph.tensors[name].shape[0] for name in expert_parameters(graph)), default=0)


def routes_unseen(graph: OpGraph) -> bool:
    """Whether the rows of some grouped product come in an order that `graphs.routing` could not follow."""
    return any(GROUPED in op.target and op.rows is None for op in graph.ops)


def _parameters_behind(graph: OpGraph, name: str) -> frozenset[str]:
    """The parameter that a value is a view, a cast or a gathered copy of."""
    while name in graph.producer:
        inputs = graph.ops[graph.producer[name]].inputs
        if len(inputs) != 1:
            return frozenset()
        name = inputs[0]
    return frozenset({name} & set(graph.parameter_tensors))


def with_own_experts(chain: Chain, graph: OpGraph, maker: KernelMaker) -> Chain:
    """The chain of a local graph, without prices, where `maker` knows how many ranks share the experts: of
    all kernels, only those of grouped products depend on it."""
    parameters = frozenset(graph.parameter_tensors)
    known: dict[int, tuple[Kernels, ...]] = {}  # copies of a unit go on sharing theirs

    def own(unit: Unit) -> tuple[Kernels, ...]:
        ops = graph.ops[unit.start : unit.start + len(unit.kernels)]
        return tuple(
            maker.op(op, graph.tensors, parameters=parameters) if GROUPED in op.target else kernels
            for op, kernels in zip(ops, unit.kernels, strict=True)
        )

    for unit in chain.units:
        if id(unit.kernels) not in known:
            known[id(unit.kernels)] = own(unit)
    return replace(chain, units=tuple(unit._replace(kernels=known[id(unit.kernels)]) for unit in chain.units))


def deal_out_experts(chain: Chain, graph: OpGraph, size: int) -> Chain:
    """The chain of a local graph with its experts dealt out over the `size` ranks of the `ep` axis."""
    experts = expert_parameters(graph)
    own = {name for name in chain.parameters if name.partition("#")[0] in experts}
    parameters = {
        name: shard._replace(
            num_elements=shard.num_elements // size, num_bytes=shard.num_bytes // size, is_expert=True
        )
        if name in own
        else shard
        for name, shard in chain.parameters.items()
    }
    exchanges = {
        names: _exchange(graph, names)
        for names in {
            frozenset(n.partition("#")[0] for n in unit.parameters if n in own) for unit in chain.units
        }
        if names
    }
    # Copies of a unit go on sharing these.
    dealt: dict[int, tuple[tuple[Kernels, ...], Mapping[str, tuple[bool, ...]]]] = {}

    def exchanging(unit: Unit) -> Unit:
        names = frozenset(name.partition("#")[0] for name in unit.parameters if name in own)
        if not names:
            return unit
        if id(unit.kernels) not in dealt:
            dealt[id(unit.kernels)] = (
                (*unit.kernels, exchanges[names]),
                {mode: (*flags, mode == "full") for mode, flags in unit.again.items()},
            )
        kernels, again = dealt[id(unit.kernels)]
        return unit._replace(kernels=kernels, again=again)

    return replace(chain, units=tuple(exchanging(unit) for unit in chain.units), parameters=parameters)


def _exchange(graph: OpGraph, experts: frozenset[str]) -> Kernels:
    """Rows to their experts before a layer's first product and back after its last, in both passes; in the
    forward also how many they are."""
    products = [
        op for op in graph.ops if GROUPED in op.target and experts & _parameters_behind(graph, op.inputs[1])
    ]
    there = graph.tensors[products[0].inputs[0]].num_bytes
    back = graph.tensors[products[-1].outputs[0]].num_bytes
    counts = graph.tensors[products[0].inputs[2]].num_bytes
    rows = tuple(Move("all_to_all", num_bytes, "ep") for num_bytes in (there, back))
    return Kernels(forward_moves=(Move("all_to_all", counts, "ep"), *rows), backward_moves=rows)
