"""Rewrites that give every model the same, shorter form, and change no value.

restore_rows     a matrix product of rows that were flattened for it becomes one of the unflattened tensor,
                 whose sequence dimension can be split
row_lookups      indexing by the numbers of all rows, `x[arange(n), i]`, is a gather that keeps the rows apart
merge_reshapes   a reshape of a reshape is one reshape
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from graphs.ir import Op, OpGraph, Ref, Tensor, map_refs
from graphs.lookups import row_lookups

_RESHAPE = "aten.reshape.default"


def simplified(graph: OpGraph) -> OpGraph:
    """The graph after every rewrite; ops that became dead are still there."""
    return merge_reshapes(row_lookups(restore_rows(graph)))


def merge_reshapes(graph: OpGraph) -> OpGraph:
    """Reshape from the first tensor of a chain of reshapes; one that leads back to its shape vanishes.

    A reshape with other readers stays in the chain, for it may be a copy that they share.
    """
    sources: dict[str, str] = {}
    renames: dict[str, str] = {}
    ops = []
    for op in graph.ops:
        op = _renamed_inputs(op, renames)
        if op.target == _RESHAPE:
            operand = op.inputs[0]
            source = sources.get(operand, operand)
            if graph.tensors[source].shape == graph.tensors[op.output].shape:
                renames[op.output] = source
                continue
            shared = len(graph.consumers[operand]) > 1 or operand in graph.outputs
            source = operand if shared else source
            sources[op.output] = source
            op = replace(op, args=(Ref(source), op.args[1]))
        ops.append(op)
    return _with_outputs(replace(graph, ops=tuple(ops)), renames)


def restore_rows(graph: OpGraph) -> OpGraph:
    """`reshape(mm(reshape(x, [rows, k]), w) + b, [*lead, n])` as `matmul(x, w) + b`; `rows` are `lead`."""
    replacements: dict[int, Op] = {}
    renames: dict[str, str] = {}
    tensors = dict(graph.tensors)
    for index, op in enumerate(graph.ops):
        if op.target != "aten.mm.default":
            continue
        source = _unflattened(graph, op.inputs[0])
        chain = _until_reshape(graph, index)
        if source is None or chain is None:
            continue
        *computing, last = chain
        lead = source.shape[:-1]
        if graph.tensors[graph.ops[last].output].shape[:-1] != lead:
            continue
        replacements[index] = replace(op, target="aten.matmul.default", args=(Ref(source.name), *op.args[1:]))
        for position in computing:
            name = graph.ops[position].output
            tensors[name] = replace(tensors[name], shape=(*lead, tensors[name].shape[-1]))
        renames[graph.ops[last].output] = graph.ops[computing[-1]].output
    dropped = set(renames)
    ops = tuple(
        _renamed_inputs(replacements.get(index, op), renames)
        for index, op in enumerate(graph.ops)
        if dropped.isdisjoint(op.outputs)
    )
    return _with_outputs(replace(graph, ops=ops, tensors=tensors), renames)


def _unflattened(graph: OpGraph, name: str) -> Tensor | None:
    """The tensor of which `name` flattens all dimensions but the last."""
    index = graph.producer.get(name)
    if index is None or graph.ops[index].target != _RESHAPE:
        return None
    source = graph.tensors[graph.ops[index].inputs[0]]
    flat = (prod(source.shape[:-1]), source.shape[-1])
    return source if len(source.shape) > 2 and graph.tensors[name].shape == flat else None


def _until_reshape(graph: OpGraph, index: int) -> list[int] | None:
    """A product, biases added to it, and the reshape at the end: each the only reader of the one before."""
    chain = [index]
    while True:
        name = graph.ops[chain[-1]].output
        readers = graph.consumers[name]
        if len(readers) != 1 or name in graph.outputs:
            return None
        reader = graph.ops[readers[0]]
        chain.append(readers[0])
        if reader.target == _RESHAPE:
            return chain if len(graph.tensors[reader.output].shape) > 2 else None
        if not _adds_bias(graph, reader, name):
            return None


def _adds_bias(graph: OpGraph, op: Op, name: str) -> bool:
    others = [other for other in op.inputs if other != name]
    return op.target == "aten.add.Tensor" and len(others) == 1 and len(graph.tensors[others[0]].shape) == 1


def _renamed_inputs(op: Op, renames: Mapping[str, str]) -> Op:
    if not any(name in renames for name in op.inputs):
        return op
    args = map_refs(op.args, lambda name: Ref(_final(name, renames)))
    kwargs = map_refs(dict(op.kwargs), lambda name: Ref(_final(name, renames)))
    return replace(op, args=args, kwargs=kwargs)


def _with_outputs(graph: OpGraph, renames: Mapping[str, str]) -> OpGraph:
    return replace(graph, outputs=tuple(_final(name, renames) for name in graph.outputs))


def _final(name: str, renames: Mapping[str, str]) -> str:
    while name in renames:
        name = renames[name]
    return name
