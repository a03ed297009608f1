"""One assignment made of several: every block of a graph takes its strategies from one of them.

Where neighbours differ, `localize` converts what passes between them, as everywhere: beside its reader, or
beside its maker where that has a sum's terms. What is left to see to is that there are such conversions, and
how parameters lie that blocks share.

Assignments that convert what passes between their own equal blocks do not mix: a neighbour could spare a
block that conversion, and floors (`autopar.search.relaxed`) know blocks beside their like alone. All others
can only gain conversions, so no mixture is below these floors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from autopar.localize import Assignment
from autopar.placements import State
from autopar.strategies import conversion, settle, stored_state
from graphs.ir import Block, OpGraph


class Passing(NamedTuple):
    """A tensor that an op reads, in what state it is made and in what state it is asked for."""

    name: str
    reader: int
    made: State
    asked: State


def op_blocks(local: OpGraph, whole: OpGraph) -> tuple[Block | None, ...]:
    """For every op of a local graph the block that it is in, of the graph `whole` that it was made from. Ops
    that were inserted go with the op they were inserted for, which is the next."""
    known: dict[str, Block | None] = {op.name: None for op in whole.ops}
    for block in whole.blocks:
        known.update((op.name, block) for op in whole.ops[block.start : block.stop])
    found = []
    current: Block | None = None
    for op in reversed(local.ops):
        current = known.get(op.name, current)
        found.append(current)
    return tuple(reversed(found))


def mixed_assignment(
    graph: OpGraph,
    by_level: Mapping[int, Assignment],
    blocks: Sequence[Block | None],
    levels: Mapping[str, int],
    outside: int,
) -> Assignment | None:
    """The assignment that gives the ops of every block their strategies of its level, by the block's path,
    and all others those of level `outside`; None where that does not go together. `blocks` are those of the
    ops."""
    op_levels = [outside if block is None else levels[block.path] for block in blocks]
    differing = {*levels.values()}
    if len(differing) > 1 and any(_converts_between(graph, by_level[level], blocks) for level in differing):
        return None
    choice = tuple(by_level[level].choice[index] for index, level in enumerate(op_levels))
    sources = {**by_level[outside].sources, **_stored(graph, by_level, op_levels)}
    mixed = replace(by_level[outside], choice=choice, sources=sources)
    return mixed if all(_is_possible(graph, each) for each in _passing(graph, mixed)) else None


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


def _converts_between(graph: OpGraph, assignment: Assignment, blocks: Sequence[Block | None]) -> bool:
    """Whether an assignment converts what passes from a block to another of its kind."""
    for each in _passing(graph, assignment):
        if each.made != each.asked and each.name in graph.producer:
            maker, reader = blocks[graph.producer[each.name]], blocks[each.reader]
            if maker and reader and maker != reader and maker.kind == reader.kind:
                return True
    return False


def _passing(graph: OpGraph, assignment: Assignment) -> Iterator[Passing]:
    """All that ops read."""
    for index, (op, strategy) in enumerate(zip(graph.ops, assignment.choice, strict=True)):
        for name, state in zip(op.inputs, strategy.operands, strict=True):
            has_gradient = graph.tensors[name].requires_grad
            made = settle(assignment.state_of(graph, name), has_gradient)
            yield Passing(name, index, made, settle(state, has_gradient))


def _is_possible(graph: OpGraph, each: Passing) -> bool:
    has_gradient = graph.tensors[each.name].requires_grad
    return each.made == each.asked or conversion(each.made, each.asked, has_gradient) is not None
