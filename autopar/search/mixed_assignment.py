"""One assignment made of several: every block of a graph takes its strategies from one of them.

Where neighbours differ, `localize` converts what passes between them, as everywhere: beside its reader, or
beside its maker where that has a sum's terms. What is left to see to is that there are such conversions, and
how parameters lie that blocks share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.localize import Assignment
from autopar.placements import State
from autopar.strategies import conversion, settle, stored_state
from graphs.ir import OpGraph


def op_levels(local: OpGraph, whole: OpGraph, by_path: Mapping[str, int], outside: int) -> tuple[int, ...]:
    """For every op of a local graph the level of the block it is in, or the one `outside` of blocks.

    `whole` is the graph that it was made from, whose blocks have levels `by_path`. Ops that were inserted go
    with the op they were inserted for, which is the next.
    """
    known = {op.name: outside for op in whole.ops}
    for block in whole.blocks:
        known.update((op.name, by_path[block.path]) for op in whole.ops[block.start : block.stop])
    found = []
    level = outside
    for op in reversed(local.ops):
        level = known.get(op.name, level)
        found.append(level)
    return tuple(reversed(found))


def mixed_assignment(
    graph: OpGraph, by_level: Mapping[int, Assignment], levels: Sequence[int]
) -> Assignment | None:
    """The assignment that gives each op its strategy of one of the levels; None where what one makes cannot
    be turned into what another reads."""
    choice = tuple(by_level[level].choice[index] for index, level in enumerate(levels))
    first = by_level[levels[0]]
    mixed = replace(first, choice=choice, sources={**first.sources, **_stored(graph, by_level, levels)})
    return mixed if _is_possible(graph, mixed) else None


def _stored(graph: OpGraph, by_level: Mapping[int, Assignment], levels: Sequence[int]) -> Mapping[str, State]:
    """How parameters lie: as in the level of all their readers, or as readers of several ask together."""
    found = {}
    for name in graph.parameter_tensors:
        readers = graph.consumers[name]
        near = {levels[index] for index in readers}
        if len(near) == 1:
            found[name] = by_level[near.pop()].sources[name]
        elif near:
            asked = (by_level[levels[i]].choice[i].operands[graph.ops[i].inputs.index(name)] for i in readers)
            found[name] = stored_state(asked)
    return found


def _is_possible(graph: OpGraph, assignment: Assignment) -> bool:
    for op, strategy in zip(graph.ops, assignment.choice, strict=True):
        for name, state in zip(op.inputs, strategy.operands, strict=True):
            has_gradient = graph.tensors[name].requires_grad
            made = settle(assignment.state_of(graph, name), has_gradient)
            needed = settle(state, has_gradient)
            if made != needed and conversion(made, needed, has_gradient) is None:
                return False
    return True
