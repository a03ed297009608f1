"""Drop what nothing reads, and give everything its final name."""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Mapping
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
    copy = NamedCopy(graph)
    names = dict(copy.leaves)
    for op in graph.ops:
        copy.add(op, names)
    return copy.graph(names)


class NamedCopy:
    """A graph written anew from ops of another one, each named after its operator and a number.

    Attributes:
        leaves: the names of inputs, parameters and buffers, which stay, by themselves.
    """

    def __init__(self, graph: OpGraph) -> None:
        self._source = graph
        self._ops: list[Op] = []
        made = {name for op in graph.ops for name in op.outputs}
        self.leaves = {name: name for name in graph.tensors if name not in made}
        self._tensors = {name: graph.tensors[name] for name in self.leaves}
        self._taken = set(self.leaves)
        self._numbers: Counter[str] = Counter()

    def add(self, op: Op, names: dict[str, str], module: str | None = None) -> None:
        """Write an op of the source as the next one; `names` are those of what it reads, and get those of its
        results."""
        name = self._free(_short(op.target))
        count = len(op.outputs)
        results = [name] if count == 1 else [f"{name}_part{index}" for index in range(count)]
        self._taken.update(results)
        names.update(zip(op.outputs, results, strict=True))
        self._ops.append(op.with_tensors(names.__getitem__, name=name, module=module))
        for old, new in zip(op.outputs, results, strict=True):
            tensor = self._source.tensors[old]
            self._tensors[new] = tensor.renamed(new, names.get(tensor.storage, new))

    def graph(self, names: Mapping[str, str]) -> OpGraph:
        """What was written; `names` are those of the results."""
        source = self._source
        return replace(
            source,
            ops=tuple(self._ops),
            tensors=self._tensors,
            outputs=tuple(names[name] for name in source.outputs),
            loss=None if source.loss is None else names[source.loss],
        )

    def _free(self, base: str) -> str:
        """The next name that nothing has."""
        while True:
            number = self._numbers[base]
            self._numbers[base] += 1
            name = f"{base}_{number}" if number else base
            if name not in self._taken:
                self._taken.add(name)
                return name


def _short(target: str) -> str:
    """A name after the operator that may be one of Python's variables."""
    name = target.split(".")[1].strip("_")
    return f"{name}_op" if keyword.iskeyword(name) else name
