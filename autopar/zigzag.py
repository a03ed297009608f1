"""The order in which positions are dealt out under a causal mask.

A later query attends to more keys, so ranks with equal runs of positions have unequal work. In zigzag
(`Shard.zigzag`) every rank has an early and a late slice and all have the same (arXiv:2407.21783, section
3.3.2), which is what prices assume. Ops along a split dimension treat each element alike, so any order is
right as long as all that meet in an op have the same: tensors that are split together change it together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autopar.localize import Assignment, splits_causal_rows
from autopar.placements import Shard, State
from graphs.ir import OpGraph

Version = tuple[str, State]
"""A tensor in one of the states in which it is made or needed."""


def in_zigzag(graph: OpGraph, assignment: Assignment) -> Assignment:
    """The assignment with the rows of every causal attention, and all that is split together with them, dealt
    out in zigzag; as it is where some length does not divide into two slices for every rank."""
    causal = {
        (op.outputs[0], strategy.results[0])
        for op, strategy in zip(graph.ops, assignment.choice, strict=True)
        if splits_causal_rows(op, strategy, graph)
    }
    together = _split_together(graph, assignment, causal)
    if not all(_divides(graph.tensors[name].shape, state, 2 * assignment.size) for name, state in together):
        return assignment

    def turned(names: Iterable[str], states: Iterable[State]) -> tuple[State, ...]:
        versions = zip(names, states, strict=True)
        return tuple(_turned(state) if (name, state) in together else state for name, state in versions)

    choice = tuple(
        replace(
            strategy,
            operands=turned(op.inputs, strategy.operands),
            results=turned(op.outputs, strategy.results),
        )
        for op, strategy in zip(graph.ops, assignment.choice, strict=True)
    )
    sources = dict(
        zip(assignment.sources, turned(*zip(*assignment.sources.items(), strict=True)), strict=True)
    )
    return replace(assignment, choice=choice, sources=sources)


def _split_together(graph: OpGraph, assignment: Assignment, first: set[Version]) -> set[Version]:
    """These, and all that some op splits together with one of them."""
    meetings: dict[Version, list[list[Version]]] = {}
    for op, strategy in zip(graph.ops, assignment.choice, strict=True):
        states = (*strategy.operands, *strategy.results)
        versions = zip((*op.inputs, *op.outputs), states, strict=True)
        split = [version for version in versions if isinstance(version[1].value, Shard)]
        for version in split:
            meetings.setdefault(version, []).append(split)
    found, waiting = set(first), list(first)
    while waiting:
        met = {version for split in meetings[waiting.pop()] for version in split}
        waiting += met - found
        found |= met
    return found


def _divides(shape: tuple[int, ...], state: State, num_slices: int) -> bool:
    assert isinstance(state.value, Shard)
    parts = state.value.sections or (shape[state.value.dim],)
    return all(part % num_slices == 0 for part in parts)


def _turned(state: State) -> State:
    assert isinstance(state.value, Shard)
    shard = replace(state.value, zigzag=True)
    return State(shard, shard)
