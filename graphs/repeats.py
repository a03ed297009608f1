"""Capture one instance of what repeats: shorten long runs of identical modules, and expand the graph again.

A run is a stretch of structurally identical children of one container. Only a few of them are exported; where
the graph shows that the second and the last of these do the same, each to what the one before left, the
second is cloned for every child left out. `expanded` returns None where it does not show that, and the whole
model is exported instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graphs.blocks import is_under, op_range
from graphs.identical import identical_modules, uniform_settings
from graphs.ir import Op, OpGraph, Ref, map_refs
from graphs.leaves import with_leaves_of

MIN_RUN = 5
"""Shorter runs are not worth shortening."""


@dataclass(frozen=True, slots=True)
class Run:
    """Identical children of a container, by name in order."""

    container: str
    children: tuple[str, ...]

    def path(self, index: int) -> str:
        return f"{self.container}.{self.children[index]}" if self.container else self.children[index]


def find_runs(model: nn.Module) -> tuple[Run, ...]:
    """The outermost runs of at least `MIN_RUN` identical children in module lists and sequences."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = {key for key, count in owners.items() if count > 1}
    runs: list[Run] = []
    for path, module in model.named_modules():
        if any(is_under(path, run.path(index)) for run in runs for index in range(len(run.children))):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            runs += [
                Run(path, names)
                for names in _stretches(module, shared)
                if uniform_settings(
                    model, path, len(module), [list(module._modules).index(name) for name in names]
                )
            ]
    return tuple(runs)


def _stretches(container: nn.Module, shared: set[int]) -> Iterator[tuple[str, ...]]:
    """Names of neighbouring children that are identical and share no parameter with anything."""
    names = list(container._modules)
    children = [
        child if child is not None and not any(id(item) in shared for item in child.parameters()) else None
        for child in container._modules.values()
    ]
    start = 0
    for end in range(1, len(names) + 1):
        first, other = children[start], children[end] if end < len(names) else None
        if first is None or other is None or not identical_modules(first, other, end - start):
            if end - start >= MIN_RUN:
                yield tuple(names[start:end])
            start = end


@contextmanager
def shortened(model: nn.Module, runs: Sequence[Run], kept: int) -> Iterator[None]:
    """The model with all but the first `kept` children of every run taken out, for the time of an export."""
    containers = [model.get_submodule(run.container) for run in runs]
    before = [dict(container._modules) for container in containers]
    try:
        for container, run in zip(containers, runs, strict=True):
            for name in run.children[kept:]:
                del container._modules[name]
        yield
    finally:
        for container, children in zip(reversed(containers), reversed(before), strict=True):
            container._modules.clear()
            container._modules.update(children)


def expanded(graph: OpGraph, model: nn.Module, runs: Sequence[Run], kept: int) -> OpGraph | None:
    """The graph of the whole model from that of the shortened one, None where a run does not repeat."""
    for run in runs:
        longer = _expand_run(graph, run, kept)
        if longer is None:
            return None
        graph = longer
    return with_leaves_of(graph, model)


def _expand_run(graph: OpGraph, run: Run, kept: int) -> OpGraph | None:
    extents = [op_range(graph, run.path(index)) for index in range(kept)]
    found = [extent for extent in extents if extent is not None]
    starts = [start for start, _ in found]
    if len(found) < kept or starts != sorted(starts):
        return None
    stop = found[-1][1]
    segments = [graph.ops[start:end] for start, end in zip(starts, [*starts[1:], stop], strict=True)]
    if not _repeats(graph, run, segments) or _read_elsewhere(graph, run, starts[0], stop, segments):
        return None
    return _with_clones(graph, run, segments, starts[0], stop)


def _with_clones(
    graph: OpGraph, run: Run, segments: Sequence[Sequence[Op]], start: int, stop: int
) -> OpGraph:
    """The graph with the second instance cloned for every child that was left out."""
    first, second, *others = segments
    missing = len(run.children) - len(segments)
    following = {
        old: new
        for a, b in zip(first, second, strict=True)
        for old, new in zip(a.outputs, b.outputs, strict=True)
    }
    tensors = dict(graph.tensors)
    ops = [*first, *second]

    def append(segment: Sequence[Op], source: int, destination: int, names: Mapping[str, str]) -> None:
        """Add the ops of one child as those of another: leaves go by their path, other tensors by `names`."""
        old, new = run.path(source), run.path(destination)

        def rename(name: str) -> str:
            return names.get(name, name) if name in graph.producer else _moved(name, old, new)

        for op in segment:
            ops.append(_clone(op, rename, _moved(op.module, old, new)))
            for name in op.outputs:
                tensor = graph.tensors[name]
                tensors[rename(name)] = replace(tensor, name=rename(name), storage=rename(tensor.storage))

    for copy in range(missing):
        names = {old: _copy_name(new, copy - 1) for old, new in following.items()}
        names |= {name: _copy_name(name, copy) for name in following.values()}
        append(second, 1, 2 + copy, names)
    names = {name: _copy_name(name, missing - 1) for name in following.values()}
    for index, segment in enumerate(others, start=2):
        append(segment, index, index + missing, names)
    return replace(graph, ops=(*graph.ops[:start], *ops, *graph.ops[stop:]), tensors=tensors)


def _copy_name(name: str, copy: int) -> str:
    return name if copy < 0 else f"{name}+{copy}"


def _repeats(graph: OpGraph, run: Run, segments: Sequence[Sequence[Op]]) -> bool:
    """Whether every instance does to its predecessor's results what the second does to the first's."""
    first, second, *others = segments
    if any(len(segment) != len(first) for segment in segments[:-1]):
        return False
    alike = _correspond(graph, (run.path(0), None, first), (run.path(1), None, second))
    before: Sequence[Op] = second
    for index, segment in enumerate(others, start=2):
        alike = alike and _correspond(graph, (run.path(1), first, second), (run.path(index), before, segment))
        before = segment
    return alike


Instance = tuple[str, Sequence[Op] | None, Sequence[Op]]
"""Path of a child, the ops of the instance before it, and its own ops with those up to the next instance."""


def _correspond(graph: OpGraph, left: Instance, right: Instance) -> bool:
    """Whether two instances do the same; where none precede, any tensors from outside may correspond."""
    (left_path, left_before, left_ops), (right_path, right_before, right_ops) = left, right
    if len(right_ops) > len(left_ops):
        return False
    pairs: dict[str, str] = {}
    for before, after in ((left_before or (), right_before or ()), (left_ops, right_ops)):
        for first, second in zip(before, after, strict=False):
            pairs.update(zip(first.outputs, second.outputs, strict=False))
    anything_outside = left_before is None

    def same_tensor(first: str, second: str) -> bool:
        if first in pairs:
            return pairs[first] == second
        if is_under(first, left_path):
            return second == right_path + first[len(left_path) :]
        return first == second or (anything_outside and _looks_like(graph, first, second))

    return all(
        a.target == b.target
        and _moved(a.module, left_path, right_path) == b.module
        and _same_value((a.args, a.kwargs), (b.args, b.kwargs), same_tensor)
        and all(_looks_like(graph, x, y) for x, y in zip(a.outputs, b.outputs, strict=True))
        for a, b in zip(left_ops, right_ops, strict=False)
    )


def _looks_like(graph: OpGraph, first: str, second: str) -> bool:
    a, b = graph.tensors[first], graph.tensors[second]
    return (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)


def _same_value(first: Any, second: Any, same_tensor: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, Ref):
        return bool(same_tensor(first.name, second.name))
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(
            _same_value(a, b, same_tensor) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(
            _same_value(value, second[key], same_tensor) for key, value in first.items()
        )
    return bool(first == second)


def _moved(path: str, source: str, destination: str) -> str:
    return destination + path[len(source) :] if is_under(path, source) else path


def _read_elsewhere(
    graph: OpGraph, run: Run, start: int, stop: int, segments: Sequence[Sequence[Op]]
) -> bool:
    """Whether anything but its successor reads an instance before the last, or others read its parameters."""
    made = [{name for op in segment for name in op.outputs} for segment in segments]
    earlier = set().union(*made[:-1])
    leaves = [*(item.tensor for item in graph.parameters), *(item.tensor for item in graph.buffers)]
    own = {name for name in leaves if any(is_under(name, run.path(index)) for index in range(len(segments)))}
    outside = [*graph.ops[:start], *graph.ops[stop:]]
    if not earlier.isdisjoint(graph.outputs) or any(
        not (earlier | own).isdisjoint(op.inputs) for op in outside
    ):
        return True
    return any(
        not made[other].isdisjoint(op.inputs)
        for index, segment in enumerate(segments)
        for op in segment
        for other in range(index - 1)
    )


def _clone(op: Op, rename: Callable[[str], str], module: str) -> Op:
    return replace(
        op,
        args=map_refs(op.args, lambda name: Ref(rename(name))),
        kwargs=map_refs(dict(op.kwargs), lambda name: Ref(rename(name))),
        outputs=tuple(rename(name) for name in op.outputs),
        module=module,
        saved=tuple(rename(name) for name in op.saved),
    )
