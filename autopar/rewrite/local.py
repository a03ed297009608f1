"""What one rank runs: the plan's strategies applied to the graph, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from autopar.data_parallel import data_parallel
from autopar.errors import RewriteError
from autopar.expert_parallel import expert_parallel
from autopar.localize import Assignment, Localized, localize
from autopar.op_kinds import without_order
from autopar.placements import RP, RR, State
from autopar.plan import Plan
from autopar.rewrite.slices import slice_once
from autopar.strategies import Strategy, natural_sections, stored_state, strategies
from autopar.zigzag import in_zigzag
from graphs import Capture
from graphs.blocks import find_blocks
from graphs.ir import Op, OpGraph


def local_program(capture: Capture, plan: Plan) -> Localized:
    """What one rank runs, before it is cut into stages."""
    parallelism = plan.parallelism
    local = Localized.of(capture.at(parallelism.microbatch_size * parallelism.dp))
    if parallelism.dp > 1:
        local = localize(local, data_parallel(local.graph, parallelism.dp))
    if parallelism.cp > 1:
        local = localize(local, context_split(local.graph, parallelism.cp, plan.strategies.get("cp", {})))
    if parallelism.tp > 1:
        local = localize(local, chosen(local.graph, "tp", parallelism.tp, plan.strategies["tp"]))
    if parallelism.ep > 1:
        local = expert_parallel(local, parallelism.ep)
    local = slice_once(local)
    return replace(local, graph=replace(local.graph, blocks=find_blocks(local.graph)))


def context_split(graph: OpGraph, size: int, keys: Mapping[str, str]) -> Assignment:
    """The assignment that a plan's strategy keys name on the context axis, positions dealt out in zigzag
    where causal attention splits them.

    Every parameter is whole there with a partial gradient, also one that all ranks use alike: gradients are
    summed over the context axis together with the data axes.
    """
    split = chosen(graph, "cp", size, keys, without_order)
    sources = {**split.sources, **{each.tensor: RP for each in graph.parameters}}
    return in_zigzag(graph, replace(split, sources=sources))


def chosen(
    graph: OpGraph,
    axis: str,
    size: int,
    keys: Mapping[str, str],
    as_split: Callable[[Op], Op] = lambda op: op,
) -> Assignment:
    """The assignment that a plan's strategy keys name; repeated blocks take the keys of their
    representative. `as_split` makes of an op the one whose strategies it has on this axis."""
    free = replace(graph, ops=tuple(map(as_split, graph.ops)))
    sections = natural_sections(free, size)
    choice = []
    for index, op in enumerate(free.ops):
        key = keys.get(op.name) or keys.get(graph.ops[graph.representative[index]].name)
        offered = {strategy.key: strategy for strategy in strategies(op, free, size, sections)}
        if key is None or key not in offered:
            raise RewriteError(
                f"the plan gives {op.name} ({op.target}, module {op.module or 'root'}) the strategy "
                f"{key!r} on axis {axis}, but the model offers {', '.join(offered)}; the plan was made for "
                "another model"
            )
        choice.append(offered[key])
    return Assignment(axis, size, tuple(choice), parameter_sources(graph, choice))


def parameter_sources(graph: OpGraph, choice: Sequence[Strategy]) -> dict[str, State]:
    """The state in which every input, parameter and buffer lies on an axis; for parameters see
    `stored_state`."""
    wanted: dict[str, list[State]] = {}
    for op, strategy in zip(graph.ops, choice, strict=True):
        for name, state in zip(op.inputs, strategy.operands, strict=True):
            wanted.setdefault(name, []).append(state)
    sources = dict.fromkeys((*graph.inputs, *(buffer.tensor for buffer in graph.buffers)), RR)
    return sources | {each.tensor: stored_state(wanted.get(each.tensor, ())) for each in graph.parameters}
