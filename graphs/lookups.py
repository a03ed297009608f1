"""Indexing in which an index only counts the rows.

`x[arange(n), i]` picks one element of each of the n rows of x, and `mask[arange(n)[:, None], arange(s)]`
picks everything. Index tensors say nothing of this, so that such an `index` cannot be split along the rows;
as a `gather` or a reshape it can.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from graphs.ir import Op, OpGraph, Ref, Tensor

_NEW_SHAPE = frozenset({"aten.unsqueeze.default", "aten.reshape.default"})
_NEVER_NEGATIVE = frozenset({"aten.argmax.default", "aten.argmin.default"})


def row_lookups(graph: OpGraph) -> OpGraph:
    """The graph with every such `index` as a reshape or a gather."""
    tensors = dict(graph.tensors)
    ops: list[Op] = []
    for op in graph.ops:
        instead = _rewritten(graph, op) if op.target == "aten.index.Tensor" else None
        for each, tensor in instead or ((op, None),):
            ops.append(each)
            if tensor is not None:
                tensors[tensor.name] = tensor
    return replace(graph, ops=tuple(ops), tensors=tensors)


def _rewritten(graph: OpGraph, op: Op) -> list[tuple[Op, Tensor]] | None:
    """The ops that stand for an `index`, each with its result; None where it is something else."""
    source, indices = graph.tensors[op.inputs[0]], op.args[1]
    picked = {dim: graph.tensors[item.name] for dim, item in enumerate(indices) if item is not None}
    first = min(picked)
    if list(picked) != list(range(first, first + len(picked))):
        return None
    rank = max(len(index.shape) for index in picked.values())
    counted = {dim: _counts(graph, index, source.shape[dim], rank) for dim, index in picked.items()}
    places = [place for place in counted.values() if place is not None]
    result = graph.tensors[op.output]
    if len(places) == len(picked):
        if places != sorted(set(places)):
            return None
        return [(replace(op, target="aten.reshape.default", args=(op.args[0], list(result.shape))), result)]
    if list(picked) != [0, 1] or counted[0] != 0 or len(picked[1].shape) != rank:
        return None
    return _gathered(graph, op, picked[1]) if picked[1].shape[0] == source.shape[0] else None


def _counts(graph: OpGraph, index: Tensor, size: int, rank: int) -> int | None:
    """Along which of `rank` dimensions an index counts from 0 to `size`, None where it is no such range."""
    if index.num_elements != size or size == 1:
        return None
    name = index.name
    while (position := graph.producer.get(name)) is not None and graph.ops[position].target in _NEW_SHAPE:
        name = graph.ops[position].inputs[0]
    if position is None:
        return None
    made = graph.ops[position]
    if (made.target, made.args) not in {("aten.arange.default", (size,)), ("aten.arange.start", (0, size))}:
        return None
    place = [extent != 1 for extent in index.shape].index(True)
    return place + rank - len(index.shape)


def _gathered(graph: OpGraph, op: Op, index: Tensor) -> list[tuple[Op, Tensor]]:
    """`gather(x, 1, i)` with i repeated over the dimensions that follow in x, then reshaped."""
    source, result = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    num_rows, size, *rest = source.shape
    made: list[tuple[Op, Tensor]] = []

    def add(target: str, like: Tensor, shape: tuple[int, ...], *args: object) -> Tensor:
        name = f"{op.output}__{len(made)}"
        tensor = replace(like, name=name, shape=shape, storage=name)
        made.append((Op(name, target, args, {}, (name,), op.module), tensor))
        return tensor

    if index.dtype != torch.int64:
        wider = replace(index, dtype=torch.int64)
        index = add("aten.to.dtype", wider, index.shape, Ref(index.name), torch.int64)
    if not _never_negative(graph, index.name):  # a gather does not count from the end
        index = add("aten.remainder.Scalar", index, index.shape, Ref(index.name), size)
    flat = (num_rows, prod(index.shape[1:]), *(1 for _ in rest))
    index = add("aten.reshape.default", index, flat, Ref(index.name), list(flat))
    wide = (*flat[:2], *rest)
    if wide != flat:
        index = add("aten.expand.default", index, wide, Ref(index.name), list(wide))
    taken = add("aten.gather.default", result, wide, Ref(source.name), 1, Ref(index.name))
    last = replace(op, target="aten.reshape.default", args=(Ref(taken.name), list(result.shape)))
    return [*made, (last, result)]


def _never_negative(graph: OpGraph, name: str) -> bool:
    position = graph.producer.get(name)
    return position is not None and graph.ops[position].target in _NEVER_NEGATIVE
