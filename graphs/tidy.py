"""Drop what nothing reads, and give everything its final name."""

from __future__ import annotations

import keyword
from collections import Counter
from dataclasses import replace

from graphs.ir import Op, OpGraph
from graphs.simplify import simplified


def tidied(graph: OpGraph) -> OpGraph:
    """The graph simplified, without dead ops, all named after operators: `linear`, `linear_1`, ..."""
    return renamed(without_dead_ops(simplified(without_dead_ops(graph))))


def without_dead_ops(graph: OpGraph) -> OpGraph:
    """The graph without ops and buffers that no output needs."""
    needed = set(graph.outputs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if not needed.isdisjoint(op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    kept.reverse()
    buffers = tuple(buffer for buffer in graph.buffers if buffer.tensor in needed)
    ops = tuple(kept)
    named = [*graph.inputs, *(item.tensor for item in graph.parameters), *(item.tensor for item in buffers)]
    named += [name for op in ops for name in op.outputs]
    return replace(graph, ops=ops, buffers=buffers, tensors={name: graph.tensors[name] for name in named})


def renamed(graph: OpGraph) -> OpGraph:
    """The graph with ops named after their operator in order; the result of an op has the op's name.

    Names of inputs, parameters and buffers stay.
    """
    made = {name for op in graph.ops for name in op.outputs}
    taken = {name for name in graph.tensors if name not in made}
    numbers: Counter[str] = Counter()
    names = {name: name for name in taken}
    ops = []
    for op in graph.ops:
        base = _short(op.target)
        name = _free(base, numbers, taken)
        results = (
            [name] if len(op.outputs) == 1 else [f"{name}_part{index}" for index in range(len(op.outputs))]
        )
        taken.update(results)
        names.update(zip(op.outputs, results, strict=True))
        ops.append(op.with_tensors(names.__getitem__, name=name))
    tensors = {
        names[name]: tensor.renamed(names[name], names.get(tensor.storage, names[name]))
        for name, tensor in graph.tensors.items()
        if name in names
    }
    return replace(
        graph,
        ops=tuple(ops),
        tensors=tensors,
        outputs=tuple(names[name] for name in graph.outputs),
        loss=None if graph.loss is None else names[graph.loss],
    )


def _short(target: str) -> str:
    """A name after the operator that may be one of Python's variables."""
    name = target.split(".")[1].strip("_")
    return f"{name}_op" if keyword.iskeyword(name) else name


def _free(base: str, numbers: Counter[str], taken: set[str]) -> str:
    while True:
        number = numbers[base]
        numbers[base] += 1
        name = f"{base}_{number}" if number else base
        if name not in taken:
            taken.add(name)
            return name
