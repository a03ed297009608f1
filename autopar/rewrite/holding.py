"""Which module of a stage holds which parameter and buffer, under the paths they have in the original
model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from autopar.rewrite.context import access, below, prefix
from autopar.rewrite.tree import Node
from graphs.ir import Op, OpGraph


class Holding:
    """The parameters and buffers of one stage.

    `paths` maps every path that the stage holds to its tensor. A tied parameter has several: a pipeline stage
    holds those that it uses, a whole model (`is_whole`) all of them.
    """

    def __init__(self, graph: OpGraph, ops: Sequence[Op], *, is_whole: bool) -> None:
        self.graph = graph
        self._holders = _holders(graph, ops)
        self._read = {name for op in ops for name in op.inputs}
        self.paths: dict[str, str] = {}
        for op in ops:
            for tensor in op.inputs:
                for path in (self._holders.get((tensor, None), ""), self.path(tensor, op)):
                    if path:
                        self.paths.setdefault(path, tensor)
        for parameter in graph.parameters:
            if is_whole and parameter.tensor in self._read:
                self.paths.update(dict.fromkeys((parameter.name, *parameter.aliases), parameter.tensor))

    def path(self, tensor: str, op: Op) -> str:
        """The path of a parameter or buffer as `op` reads it, `""` for other tensors."""
        return self._holders.get((tensor, op.module)) or self._holders.get((tensor, None), "")

    def directly_under(self, node: Node) -> Iterator[tuple[str, str]]:
        """Paths of parameters and buffers under a class and not under a child of it, with their tensors."""
        inside = prefix(node.path)
        for path, tensor in self.paths.items():
            if path.startswith(inside) and not path.startswith(_children(node)):
                yield path, tensor

    def reads(self, node: Node) -> dict[str, str]:
        """The tensors under a class that its ops read or its children need handed in, with the expression of
        each."""
        found: dict[str, str] = {}
        for item in node.items:
            inside_child = f"{item.path}." if isinstance(item, Node) else None
            for op in item.ops() if isinstance(item, Node) else (item,):
                for tensor in dict.fromkeys(op.inputs):
                    path = self.path(tensor, op)
                    if inside_child is not None and path.startswith(inside_child):
                        continue  # the child reads it itself
                    if path and path.startswith(prefix(node.path)):
                        found.setdefault(tensor, access(below(path, node.path)))
        return found

    def ties(self, node: Node) -> Mapping[str, str]:
        """The further paths of tied parameters with the first one, where this is the innermost class with
        both.
        """
        inside, children = prefix(node.path), _children(node)
        read = {name for op in node.ops() for name in op.inputs}
        ties = {}
        for parameter in self.graph.parameters:
            if parameter.tensor not in read:
                continue
            first = self._holders[parameter.tensor, None]
            for path in (parameter.name, *parameter.aliases):
                if path == first or path not in self.paths:
                    continue
                deeper = any(path.startswith(child) and first.startswith(child) for child in children)
                if path.startswith(inside) and first.startswith(inside) and not deeper:
                    ties[path] = first
        return ties


def _children(node: Node) -> tuple[str, ...]:
    return tuple(f"{item.path}." for item in node.items if isinstance(item, Node))


def _holders(graph: OpGraph, ops: Sequence[Op]) -> dict[tuple[str, str | None], str]:
    """The path of every parameter and buffer under `(tensor, None)`.

    Of a tied parameter it is the path that its first user has it under, and each further module that uses it
    has its own under `(tensor, module)`.
    """
    used: dict[str, list[str]] = {}
    for op in ops:
        for name in op.inputs:
            used.setdefault(name, []).append(op.module)
    holders: dict[tuple[str, str | None], str] = {}
    for parameter in graph.parameters:
        by_owner = {path.rpartition(".")[0]: path for path in (parameter.name, *parameter.aliases)}
        users = [module for module in used.get(parameter.tensor, ()) if module in by_owner]
        holders |= {(parameter.tensor, module): by_owner[module] for module in users}
        holders[parameter.tensor, None] = by_owner[users[0]] if users else parameter.name
    holders |= {(buffer.tensor, None): buffer.name for buffer in graph.buffers}
    return holders
