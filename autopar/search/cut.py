"""The cheapest values to keep: a minimum cut of a small graph of what is computed from what."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf

Node = tuple[str, bool]
"""A value's near side (False), where what it is computed from arrives, or its far side (True)."""

_START: Node = ("", False)


def cheapest_cut(
    costs: Mapping[str, float], made_from: Mapping[str, Sequence[str]], wanted: Iterable[str]
) -> frozenset[str]:
    """The cheapest set of values from which all `wanted` ones can be computed.

    `costs` has a price for keeping each value; `made_from` says what a value is computed from, and values
    that it lacks are there only if they are kept. Of equally cheap sets the one nearest to those is taken.

    A minimum vertex cut: every value is an edge of its cost from its near to its far side, and augmenting
    paths (Edmonds and Karp, 1972) fill the cheapest of them.
    """
    room: dict[Node, dict[Node, float]] = {_START: {}}

    def connect(source: Node, target: Node, capacity: float) -> None:
        room.setdefault(source, {})[target] = capacity
        room.setdefault(target, {}).setdefault(source, 0.0)

    ends = {(name, True) for name in wanted}
    waiting = [name for name, _ in ends]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        connect((name, False), (name, True), costs[name])
        for source in made_from.get(name, ()):
            connect((source, True), (name, False), inf)
            if source not in seen:
                seen.add(source)
                waiting.append(source)
        if name not in made_from:
            connect(_START, (name, False), inf)
    while path := _augmenting_path(room, ends):
        filled = min(room[a][b] for a, b in path)
        for a, b in path:
            room[a][b] -= filled
            room[b][a] += filled
    reached = _reached(room)
    return frozenset(name for name in seen if (name, False) in reached and (name, True) not in reached)


def _augmenting_path(room: Mapping[Node, Mapping[Node, float]], ends: set[Node]) -> list[tuple[Node, Node]]:
    """The edges of a shortest path with room left from the start to an end; empty where there is none."""
    came_from = _reached(room)
    end = next((node for node in came_from if node in ends), None)
    path = []
    while end is not None and end != _START:
        path.append((came_from[end], end))
        end = came_from[end]
    return path


def _reached(room: Mapping[Node, Mapping[Node, float]]) -> dict[Node, Node]:
    """What can be reached from the start over edges with room left, with where it was reached from, nearest
    first."""
    came_from = {_START: _START}
    queue = deque([_START])
    while queue:
        node = queue.popleft()
        for other, left in room[node].items():
            if left > 0 and other not in came_from:
                came_from[other] = node
                queue.append(other)
    return came_from
