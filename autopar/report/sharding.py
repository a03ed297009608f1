"""What is split: how parameters lie on the mesh, and which factor of each op an axis splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from autopar.module_paths import module_ranges
from autopar.plan import Plan
from autopar.report.values import Block, Operation, Placement


def blocks(plan: Plan) -> tuple[Block, ...]:
    """Parameters by block, where there are pools for each of them."""
    if not plan.pools:
        return group_placements(plan.placements)
    return tuple(
        Block(f"{pool.cluster.id}: {block.path}", block.placements)
        for pool in plan.pools
        for block in group_placements(pool.placements)
    )


def operations(plan: Plan) -> tuple[Operation, ...]:
    """Distinct ops counted by kind and strategies, in the order of the graph, where there are pools for each
    of them."""
    parts = [(f"{pool.cluster.id}: ", pool.strategies) for pool in plan.pools] or [("", plan.strategies)]
    axes = list(dict.fromkeys(axis for _, strategies in parts for axis in strategies))
    alike = Counter(
        (
            pool + _kind(name),
            tuple((axis, strategies.get(axis, {}).get(name, "replicate")) for axis in axes),
        )
        for pool, strategies in parts
        for name in dict.fromkeys(name for by_op in strategies.values() for name in by_op)
    )
    return tuple(Operation(kind, count, strategies) for (kind, strategies), count in alike.items())


def group_placements(placements: Mapping[str, str]) -> tuple[Block, ...]:
    """Parameters by block; those whose names differ in the block's number alone are one where they agree,
    and blocks where all of theirs do."""
    by_pattern: dict[str, set[str]] = {}
    for name, placement in placements.items():
        by_pattern.setdefault(_pattern(name), set()).add(placement)
    groups: dict[str, dict[str, str]] = {}
    for name, placement in placements.items():
        pattern = _pattern(name)
        shown = pattern if len(by_pattern[pattern]) == 1 else name
        path = _container(shown)
        groups.setdefault(path, {})[shown.removeprefix(f"{path}.")] = placement
    alike: dict[object, list[str]] = {}
    for path, group in groups.items():
        alike.setdefault((_pattern(path), *group.items()), []).append(path)
    return tuple(
        Block(
            ", ".join(module_ranges(paths)),
            tuple(Placement(name, placement) for name, placement in groups[paths[0]].items()),
        )
        for paths in alike.values()
    )


def _pattern(parameter: str) -> str:
    """The name with `*` for the numbers of repeated blocks."""
    return ".".join("*" if part.isdigit() else part for part in parameter.split("."))


def _container(parameter: str) -> str:
    """The outermost numbered block that a parameter belongs to, else its module."""
    parts = parameter.split(".")
    ends = [index + 1 for index, part in enumerate(parts) if part == "*" or part.isdigit()]
    return ".".join(parts[: ends[0]] if ends else parts[:-1])


def _kind(op: str) -> str:
    """`linear_12` is a `linear`."""
    stem, _, number = op.rpartition("_")
    return stem if stem and number.isdigit() else op
