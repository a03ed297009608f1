"""Repeated blocks of a model, found by isomorphism.

Siblings in the module tree whose ops do the same to corresponding tensors are instances of one block class.
The
outermost level that repeats is taken: a transformer's layers, not their projections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import groupby, pairwise
from typing import Any

from graphs.ir import Block, OpGraph, Ref

Range = tuple[int, int]
_MIN_LEAVES = 3
_PLAIN = frozenset({int, bool, str, type(None)})
"""Types of arguments that are compared by themselves; others are by how they print, as floats, of which nan
does not equal itself."""


def find_blocks(graph: OpGraph) -> tuple[Block, ...]:
    """Instances of repeated blocks in the order of their ops; classes are numbered by appearance.

    The ops of an instance are contiguous. It depends on the graph alone, so it serves rewritten graphs too.
    """
    found: list[tuple[Range, str, int]] = []
    _collect(graph, _module_tree(graph), "", {}, found)
    found.sort()
    classes: dict[int, int] = {}
    return tuple(
        Block(path, classes.setdefault(form, len(classes)), start, stop)
        for (start, stop), path, form in found
    )


def op_range(graph: OpGraph, path: str) -> Range | None:
    """First and one past the last op under a module, None where it has none or where others lie between."""
    inside = [index for index, op in enumerate(graph.ops) if is_under(op.module, path)]
    if not inside or inside[-1] - inside[0] + 1 != len(inside):
        return None
    return inside[0], inside[-1] + 1


def is_under(path: str, ancestor: str) -> bool:
    """Whether a dotted path is `ancestor` or below it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def _module_tree(graph: OpGraph) -> dict[str, dict[str, list[int]]]:
    """For every module its children by path, each with the indices of the ops below it."""
    tree: dict[str, dict[str, list[int]]] = {}
    for module, run in groupby(range(len(graph.ops)), key=lambda index: graph.ops[index].module):
        indices = list(run)
        parts = module.split(".") if module else []
        for depth in range(len(parts)):
            parent, child = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
            tree.setdefault(parent, {}).setdefault(child, []).extend(indices)
    return tree


def _collect(
    graph: OpGraph,
    tree: Mapping[str, Mapping[str, list[int]]],
    parent: str,
    numbers: dict[Hashable, int],
    found: list[tuple[Range, str, int]],
) -> None:
    """Add the repeated children of a module, and look inside those that are not.

    Only children with as many ops as another can have the form of another. Forms go by number: they are long,
    and take their time to compare.
    """
    children = tree.get(parent, {})
    ranges = {
        child: (indices[0], indices[-1] + 1)
        for child, indices in children.items()
        if indices[-1] - indices[0] + 1 == len(indices)
    }
    sizes = Counter(stop - start for start, stop in ranges.values())
    forms = {
        child: numbers.setdefault(canonical_form(graph, child, extent), len(numbers))
        for child, extent in ranges.items()
        if sizes[extent[1] - extent[0]] > 1
    }
    counts = Counter(forms.values())
    repeated = {form for form, count in counts.items() if count > 1}
    for form in list(repeated):
        members = [child for child in forms if forms[child] == form]
        if not _is_a_sequence(graph, members, ranges):
            repeated.discard(form)
    for child in children:
        if forms.get(child) in repeated:
            found.append((ranges[child], child, forms[child]))
        else:
            _collect(graph, tree, child, numbers, found)


def _is_a_sequence(graph: OpGraph, members: list[str], ranges: Mapping[str, Range]) -> bool:
    """Whether siblings that do the same are blocks: numbered ones, or a chain of named ones.

    A chain leaves out a query, key and value; a pair of leaf modules, such as two norms, is no block either.
    """
    containers = {path.rpartition(".")[0] for path in graph.modules}
    composite = all(child in containers for child in members)
    if all(child.rpartition(".")[2].isdigit() for child in members):
        return composite or len(members) >= _MIN_LEAVES
    return composite and all(
        _depends(graph, ranges[first], ranges[second]) for first, second in pairwise(members)
    )


def _depends(graph: OpGraph, first: Range, second: Range) -> bool:
    reached = {name for op in graph.ops[slice(*first)] for name in op.outputs}
    for op in graph.ops[first[1] : second[1]]:
        if not reached.isdisjoint(op.inputs):
            reached.update(op.outputs)
    return any(name in reached for op in graph.ops[slice(*second)] for name in op.outputs)


def canonical_form(graph: OpGraph, path: str, extent: Range) -> Hashable:
    """What a range of ops does, whatever its tensors and modules are called.

    Two ranges with equal forms do the same, op for op, to tensors of the same shapes and dtypes.
    """
    numbers: dict[str, tuple[Hashable, ...]] = {}
    local = 0

    def describe(value: Any) -> Hashable:
        if type(value) in _PLAIN:
            return (type(value), value)
        if isinstance(value, Ref):
            if value.name not in numbers:
                numbers[value.name] = (
                    "outside",
                    len(numbers),
                    *_kind(graph, value.name, path),
                    *spec(value.name),
                )
            return numbers[value.name]
        if isinstance(value, (tuple, list)):
            return tuple([describe(item) for item in value])
        if isinstance(value, (dict, Mapping)):
            return tuple([(key, describe(item)) for key, item in sorted(value.items())])
        return (type(value), str(value))

    def spec(name: str) -> tuple[Hashable, ...]:
        tensor = graph.tensors[name]
        return tensor.shape, tensor.dtype, tensor.requires_grad

    lines: list[Hashable] = []
    for op in graph.ops[slice(*extent)]:
        arguments = describe(op.args), describe(op.kwargs)
        results: list[Hashable] = []
        for name in op.outputs:
            numbers[name] = ("inside", local)
            local += 1
            results.append(spec(name))
        lines.append((op.target, arguments, tuple(results), op.window, op.module[len(path) :]))
    return tuple(lines)


def _kind(graph: OpGraph, name: str, path: str) -> Iterable[Hashable]:
    """Parameters of the block go by their path inside it."""
    parameter = graph.parameter_tensors.get(name)
    if parameter is None:
        return ("value",)
    return ("parameter", parameter.name[len(path) :] if is_under(parameter.name, path) else "elsewhere")
