"""Capture one instance of what repeats: shorten long runs of identical modules, and expand the graph again.

A run is a stretch of children of one container, each structurally identical to the one a period before. An
instance is one period of them: a layer of most models, or several where kinds of layers alternate. Only a few
instances are exported; where the graph shows that the second and the last of these do the same, each to what
the one before left, the second is cloned for every instance left out. `expanded` returns None where it does
not show that, and the whole model is exported instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from graphs.blocks import is_under, op_range
from graphs.identical import identical_modules, settings_repeat
from graphs.ir import Op, OpGraph, Ref
from graphs.leaves import with_leaves_of
from graphs.periods import MIN_INSTANCES, periodic
from graphs.tidy import NamedCopy

Paths = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Children of a container, by name in order: whole instances of `period` children each."""

    container: str
    children: tuple[str, ...]
    period: int = 1

    @property
    def length(self) -> int:
        """The number of instances."""
        return len(self.children) // self.period

    def paths(self, start: int, stop: int) -> Paths:
        """The children of some instances."""
        prefix = f"{self.container}." if self.container else ""
        return tuple(prefix + name for name in self.children[start * self.period : stop * self.period])

    def instance(self, index: int) -> Paths:
        """The children of one instance."""
        return self.paths(index, index + 1)


def find_runs(model: nn.Module) -> tuple[Run, ...]:
    """The outermost runs of at least `MIN_INSTANCES` identical instances in module lists and sequences."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = {key for key, count in owners.items() if count > 1}
    containers = [
        path for path, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    runs: list[Run] = []
    for path in containers:
        if not any(is_under(path, child) for run in runs for child in run.paths(0, run.length)):
            runs += _runs_in(model, path, shared)
    return tuple(runs)


def _runs_in(model: nn.Module, path: str, shared: set[int]) -> Iterator[Run]:
    """Runs of a container."""
    modules = model.get_submodule(path)._modules
    names = tuple(modules)
    children = [
        child if child is not None and not any(id(item) in shared for item in child.parameters()) else None
        for child in modules.values()
    ]

    def number_of(start: int, period: int) -> int:
        number = _num_instances(children, start, period)
        return number if number >= MIN_INSTANCES and settings_repeat(model, path, start, period) else 0

    for repeat in periodic(len(names), number_of):
        yield Run(path, names[repeat.start : repeat.stop], repeat.period)


def _num_instances(children: Sequence[nn.Module | None], start: int, period: int) -> int:
    """How many instances from `start` on are identical to the first and share no parameter with anything."""
    first = children[start : start + period]
    for index in range(start, len(children)):
        pattern, child = first[(index - start) % period], children[index]
        offset = (index - start) // period * period
        if pattern is None or child is None or not identical_modules(pattern, child, offset):
            return (index - start) // period
    return (len(children) - start) // period


@contextmanager
def shortened(model: nn.Module, runs: Sequence[Run], kept: int) -> Iterator[None]:
    """The model with all but the first `kept` instances of every run taken out, for the time of an export."""
    containers = [model.get_submodule(run.container) for run in runs]
    before = [dict(container._modules) for container in containers]
    try:
        for container, run in zip(containers, runs, strict=True):
            for name in run.children[kept * run.period :]:
                del container._modules[name]
        yield
    finally:
        for container, children in zip(reversed(containers), reversed(before), strict=True):
            container._modules.clear()
            container._modules.update(children)


class Place(NamedTuple):
    """A run in the graph of the shortened model: its first op, and the ops of each instance with those up to
    the next."""

    start: int
    run: Run
    segments: Sequence[Sequence[Op]]

    @property
    def stop(self) -> int:
        """The first op after it."""
        return self.start + sum(map(len, self.segments))


def expanded(graph: OpGraph, model: nn.Module, runs: Sequence[Run], kept: int) -> OpGraph | None:
    """The graph of the whole model from that of the shortened one, None where a run does not repeat."""
    places = [place for run in runs if (place := _place(graph, run, kept)) is not None]
    if len(places) < len(runs):
        return None
    copy = NamedCopy(graph)
    names = dict(copy.leaves)
    position = 0
    for place in sorted(places, key=lambda place: place.start):
        assert position <= place.start, "runs do not overlap"
        for op in graph.ops[position : place.start]:
            copy.add(op, names)
        _write_run(copy, place, names)
        position = place.stop
    for op in graph.ops[position:]:
        copy.add(op, names)
    return with_leaves_of(copy.graph(names), model)


def _place(graph: OpGraph, run: Run, kept: int) -> Place | None:
    """Where a run is, None where it does not repeat."""
    children = run.paths(0, kept)
    extents = [extent for child in children if (extent := op_range(graph, child)) is not None]
    if len(extents) < len(children) or extents != sorted(extents):
        return None
    starts, stop = [start for start, _ in extents[:: run.period]], extents[-1][1]
    segments = [graph.ops[start:end] for start, end in zip(starts, [*starts[1:], stop], strict=True)]
    if not _repeats(graph, run, segments) or _read_elsewhere(graph, run, starts[0], stop, segments):
        return None
    return Place(starts[0], run, segments)


def _write_run(copy: NamedCopy, place: Place, names: dict[str, str]) -> None:
    """Write a run with the second instance cloned for every one that was left out.

    Nothing but its successor reads an instance before the last. So from then on `names` may give the names of
    what the clone made as those of what the second made.
    """
    run, (first, second, *others) = place.run, place.segments
    missing = run.length - len(place.segments)
    for op in (*first, *second):
        copy.add(op, names)
    before, results = ([name for op in segment for name in op.outputs] for segment in (first, second))
    for index in range(2, 2 + missing):
        names.update(zip(before, [names[name] for name in results], strict=True))
        _write_instance(copy, second, names, run.instance(1), run.instance(index))
    for index, segment in enumerate(others, start=2):
        _write_instance(copy, segment, names, run.instance(index), run.instance(index + missing))


def _write_instance(
    copy: NamedCopy, segment: Sequence[Op], names: dict[str, str], source: Paths, destination: Paths
) -> None:
    """Write the ops of one instance as those of another: modules and leaves go by path."""
    leaves = {name for op in segment for name in op.inputs if name in copy.leaves}
    names.update({leaf: _moved(leaf, source, destination) for leaf in leaves})
    modules = {module: _moved(module, source, destination) for module in {op.module for op in segment}}
    for op in segment:
        copy.add(op, names, modules[op.module])


def _repeats(graph: OpGraph, run: Run, segments: Sequence[Sequence[Op]]) -> bool:
    """Whether every instance does to its predecessor's results what the second does to the first's."""
    first, second, *others = segments
    if any(len(segment) != len(first) for segment in (second, *segments[:-1])):
        return False
    alike = _correspond(graph, (run.instance(0), None, first), (run.instance(1), None, second))
    before: Sequence[Op] = second
    for index, segment in enumerate(others, start=2):
        alike = alike and _correspond(
            graph, (run.instance(1), first, second), (run.instance(index), before, segment)
        )
        before = segment
    return alike


Instance = tuple[Paths, Sequence[Op] | None, Sequence[Op]]
"""Its children, the ops of the instance before it, and its own ops with those up to the next instance."""


def _correspond(graph: OpGraph, left: Instance, right: Instance) -> bool:
    """Whether two instances do the same; where none precede, any tensors from outside may correspond."""
    (left_children, left_before, left_ops), (right_children, right_before, right_ops) = left, right
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
        moved = _moved(first, left_children, right_children)
        if moved != first:
            return second == moved
        return first == second or (anything_outside and _looks_like(graph, first, second))

    return all(
        a.target == b.target
        and _moved(a.module, left_children, right_children) == b.module
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


def _moved(path: str, source: Paths, destination: Paths) -> str:
    """A path below a child of one instance as that below its counterpart in another; other paths stay."""
    for old, new in zip(source, destination, strict=True):
        if is_under(path, old):
            return new + path[len(old) :]
    return path


def _read_elsewhere(
    graph: OpGraph, run: Run, start: int, stop: int, segments: Sequence[Sequence[Op]]
) -> bool:
    """Whether anything but its successor reads an instance before the last, or others read its parameters."""
    made = [{name for op in segment for name in op.outputs} for segment in segments]
    earlier = set().union(*made[:-1])
    leaves = [*(item.tensor for item in graph.parameters), *(item.tensor for item in graph.buffers)]
    children = run.paths(0, len(segments))
    own = {name for name in leaves if any(is_under(name, child) for child in children)}
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
