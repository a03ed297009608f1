"""Data parallelism by propagation: follow the batch through the graph.

The batch dimension of every input is sharded, parameters are replicated with partial gradients, and each op,
in order, takes the strategy that moves the fewest bytes given what its operands already are. For a model
whose samples do not meet this is data parallelism as everybody knows it: nothing moves in the forward but the
count of the loss. A batch norm shares its statistics; where samples meet otherwise (a contrastive loss) the
values are gathered, so the mathematics never changes.

The same walk, seeded with another dimension, prices context parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from autopar.localize import Assignment
from autopar.placements import RP, RR, Shard, State, sharded
from autopar.strategies import Offers, Strategy, conversion, natural_sections, settle
from graphs.ir import Op, OpGraph

Cost = tuple[int, int, int]
"""Bytes moved, number of conversions, 1 if unusual: smaller is better."""


def data_parallel(graph: OpGraph, size: int, *, axis: str = "dp", dim: int = 0) -> Assignment:
    """Shard dimension `dim` of every input over `size` ranks and let the rest follow.

    Inputs whose dimension is not the common one (`batch` for dim 0) or does not divide stay replicated.
    """
    sources = {name: _input_state(graph, name, size, dim) for name in graph.inputs}
    sources |= {parameter.tensor: RP for parameter in graph.parameters}
    sources |= {buffer.tensor: RR for buffer in graph.buffers}
    offers = Offers(graph, size, natural_sections(graph, size))
    sources = {name: settle(state, graph.tensors[name].requires_grad) for name, state in sources.items()}
    made = dict(sources)
    choice: list[Strategy] = []
    for op in graph.ops:
        best = min(offers.of(op), key=partial(_cost, op, graph, made))
        made.update(zip(op.outputs, best.results, strict=True))
        choice.append(best)
    return Assignment(axis, size, tuple(choice), sources)


def gathered_ops(graph: OpGraph, assignment: Assignment) -> tuple[Op, ...]:
    """Ops before which a sharded activation had to be gathered: where samples meet, or where no rule is
    known.
    """
    found = []
    for op, strategy in zip(graph.ops, assignment.choice, strict=True):
        states = zip(op.inputs, strategy.operands, strict=True)
        if any(
            isinstance(assignment.state_of(graph, name).value, Shard) and not isinstance(needed.value, Shard)
            for name, needed in states
        ):
            found.append(op)
    return tuple(found)


def _input_state(graph: OpGraph, name: str, size: int, dim: int) -> State:
    shapes = [graph.tensors[other].shape for other in graph.inputs if len(graph.tensors[other].shape) > dim]
    extent = max((shape[dim] for shape in shapes), default=0)
    shape = graph.tensors[name].shape
    return sharded(dim) if len(shape) > dim and shape[dim] == extent and extent % size == 0 else RR


def _cost(op: Op, graph: OpGraph, made: Mapping[str, State], strategy: Strategy) -> Cost:
    moved = conversions = 0
    for name, needed in zip(op.inputs, strategy.operands, strict=True):
        tensor = graph.tensors[name]
        if made[name] == needed:
            continue
        how = conversion(made[name], needed, tensor.requires_grad)
        if how is None or (name in graph.parameter_tensors and isinstance(needed.value, Shard)):
            return (1 << 62, 0, 0)
        conversions += 1
        moved += tensor.num_bytes * ((how.forward is not None) + (how.backward is not None))
    # Work is split where its operands already are; what starts from nothing or from whole tensors stays
    # whole.
    follows = any(isinstance(made[name].value, Shard) for name in op.inputs)
    unusual = (strategy.factor is not None) != follows
    return (moved, conversions, int(unusual))
