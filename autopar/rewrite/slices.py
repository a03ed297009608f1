"""Take a slice once that several blocks take of the same tensor.

Layers share tables without gradient, such as the cosines of rotary angles, and each gives them a dimension to
broadcast along before it multiplies by its own part. A plan splits what is multiplied, in every layer; a
person would split the table, where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from autopar.localize import Localized
from autopar.placements import Shard, State
from graphs.ir import Op, OpGraph, Ref

_SLICE = "autopar.shard"
_VIEW = "aten.unsqueeze.default"


@dataclass(frozen=True)
class _Slice:
    """A slice along dimension `dim` of `source`, which ops take of views of it."""

    source: str
    dim: int
    axis: str
    options: tuple[Any, ...]
    """Sections, and whether they are dealt out in zigzag."""


def slice_once(local: Localized) -> Localized:
    """The program with slices of views of a tensor as views of one slice of it, which is beside what makes
    the tensor. The views that nothing reads any more are left to be dropped with the rest of that kind."""
    graph = local.graph
    found: dict[_Slice, list[Op]] = {}
    for op in graph.ops:
        if op.target == _SLICE and (key := _of_view(op, graph)) is not None:
            found.setdefault(key, []).append(op)
    tensors, states = dict(graph.tensors), dict(local.states)
    made: dict[str, list[Op]] = {}
    views: dict[str, Op] = {}
    for number, (key, slices) in enumerate(found.items()):
        if len(slices) == 1:
            continue
        name = f"{key.source}__{key.axis}_once{number}"
        maker = graph.ops[graph.producer[key.source]]
        args = (Ref(key.source), key.dim, *slices[0].args[2:])
        op = replace(slices[0], name=name, args=args, outputs=(name,), module=maker.module)
        made.setdefault(maker.name, []).append(op)
        shape = list(graph.tensors[key.source].shape)
        shape[key.dim] = tensors[slices[0].output].shape[slices[0].args[1]]
        tensors[name] = replace(graph.tensors[key.source], name=name, shape=tuple(shape), storage=name)
        along = local.states[slices[0].output][key.axis]
        states[name] = {**local.states[key.source], key.axis: _moved(along, key.dim)}
        for each in slices:
            view = graph.ops[graph.producer[each.inputs[0]]]
            args = (Ref(name), *view.args[1:])
            views[each.name] = replace(view, name=each.name, args=args, outputs=each.outputs)
            tensors[each.output] = replace(tensors[each.output], storage=name)

    def ops() -> Iterator[Op]:
        for op in graph.ops:
            yield views.get(op.name, op)
            yield from made.get(op.name, ())

    return Localized(replace(graph, tensors=tensors, ops=tuple(ops()), blocks=()), states)


def _of_view(op: Op, graph: OpGraph) -> _Slice | None:
    """What a slice is of, where that is a view of something that is made in the program and has no
    gradient."""
    viewed, dim = op.inputs[0], op.args[1]
    view = graph.ops[graph.producer[viewed]] if viewed in graph.producer else None
    if view is None or view.target != _VIEW or graph.tensors[viewed].requires_grad:
        return None
    added = view.args[1] % len(graph.tensors[viewed].shape)
    if added == dim or view.inputs[0] not in graph.producer:
        return None
    options = (op.args[2:], op.kwargs.get("zigzag"))
    return _Slice(view.inputs[0], dim - (dim > added), op.kwargs["axis"], options)


def _moved(state: State, dim: int) -> State:
    """The state of what lies so along another dimension."""
    assert isinstance(state.value, Shard)
    shard = replace(state.value, dim=dim)
    return State(shard, shard)
