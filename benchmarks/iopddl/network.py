"""A contest problem made smaller without losing its best answers.

The problem is a graph of choices with costs on nodes and edges (a weighted constraint network). `reduce`
applies, until none does any more:

- a node with one strategy left is decided: its costs move to its neighbours            `_decide`
- a node whose strategy follows from a neighbour's is part of that neighbour            `_follow`
- a node with at most two neighbours whose memory cannot matter is answered for every
  pair of their strategies, which is one step of dynamic programming                    `_eliminate`
- a strategy that another beats at every choice of the neighbours, in memory too,
  is shaved off (dead-end elimination)                                                  `_shave`
- points of time that cannot reach the limit, and those whose live set is part of
  another's, are forgotten                                                              `_forget_slack_points`

Costs from `FORBIDDEN` up are infinite here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from benchmarks.iopddl.problem import FORBIDDEN, Problem

Vector = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass
class Load:
    """Memory held from point `start` to just before `end`, by strategy of the node that holds it."""

    start: int
    end: int
    usages: Vector

    @property
    def is_constant(self) -> bool:
        return bool((self.usages == self.usages[0]).all())


@dataclass(frozen=True)
class Step:
    """A node taken out: its strategy is `table` at the strategies of its `parents`."""

    node: int
    parents: tuple[int, ...]
    table: Indices


class Network:
    """What is left to choose: per node its strategies (`labels`: their numbers in the problem), costs, loads
    and edges.

    `room` is what each point of time has left for the loads; `constant` the cost of all that is decided.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.constant = 0.0
        self.steps: list[Step] = []
        self.costs = {index: _costs(node.costs) for index, node in enumerate(problem.nodes)}
        self.labels = {index: np.arange(len(node.costs)) for index, node in enumerate(problem.nodes)}
        self.edges: dict[int, dict[int, Vector]] = {index: {} for index in self.costs}
        for edge in problem.edges:
            shape = len(self.costs[edge.first]), len(self.costs[edge.second])
            costs = _costs(edge.costs).reshape(shape)
            if edge.first == edge.second:
                self.costs[edge.first] += costs.diagonal()
            else:
                self._join(edge.first, edge.second, costs)
        points = _fullest_points(problem)
        self.room = np.full(
            len(points), np.inf if problem.usage_limit is None else float(problem.usage_limit)
        )
        self.loads: dict[int, list[Load]] = {}
        for index, node in enumerate(problem.nodes):
            start, end = np.searchsorted(points, (node.start, node.end))
            load = Load(int(start), int(end), np.array(node.usages, dtype=float))
            self.loads[index] = [load] if start < end else []

    def _join(self, first: int, second: int, costs: Vector) -> None:
        """Adds costs to the edge between two nodes; an edge that costs nothing is none."""
        if second in self.edges[first]:
            costs = costs + self.edges[first][second]
        if costs.any():
            self.edges[first][second], self.edges[second][first] = costs, costs.T
        else:
            self._part(first, second)

    def _part(self, first: int, second: int) -> None:
        self.edges[first].pop(second, None)
        self.edges[second].pop(first, None)

    def reduce(self) -> None:
        """Applies every rule until none applies."""
        while True:
            before = (len(self.costs), sum(map(len, self.costs.values())))
            self._forget_slack_points()
            for node in list(self.costs):
                self._shave(node)
                if len(self.costs[node]) == 1:
                    self._decide(node)
                elif not self._follow(node):
                    self._eliminate(node)
            if (len(self.costs), sum(map(len, self.costs.values()))) == before:
                return

    def answer(self, chosen: Mapping[int, int]) -> tuple[int, ...]:
        """The problem's strategies, from the position of the chosen strategy of every node that is left."""
        found = {node: int(self.labels[node][k]) for node, k in chosen.items()}
        for step in reversed(self.steps):
            found[step.node] = int(step.table[tuple(found[parent] for parent in step.parents)])
        return tuple(found[index] for index in range(len(self.problem.nodes)))

    def _table(self, node: int, parents: Sequence[int], positions: Indices) -> None:
        """Records that `node` takes the strategy at `positions`, given by its parents' positions."""
        sizes = tuple(len(self.problem.nodes[parent].costs) for parent in parents)
        table = np.zeros(sizes, dtype=np.int64)
        table[np.ix_(*(self.labels[parent] for parent in parents))] = self.labels[node][positions]
        self.steps.append(Step(node, tuple(parents), table))

    def _remove(self, node: int) -> None:
        for other in list(self.edges[node]):
            self._part(node, other)
        for part in (self.costs, self.labels, self.edges, self.loads):
            del part[node]

    def _spend(self, node: int) -> None:
        """Takes loads that are the same under every strategy from the room."""
        for load in self.loads[node]:
            self.room[load.start : load.end] -= load.usages[0]
        self.loads[node] = []

    def _keep(self, node: int, kept: Indices) -> None:
        self.costs[node] = self.costs[node][kept]
        self.labels[node] = self.labels[node][kept]
        for load in self.loads[node]:
            load.usages = load.usages[kept]
        for other, costs in self.edges[node].items():
            self.edges[node][other] = costs[kept]
            self.edges[other][node] = costs[kept].T

    def _decide(self, node: int) -> None:
        self._spend(node)
        self._table(node, (), np.array(0))
        self.constant += float(self.costs[node][0])
        for other, costs in self.edges[node].items():
            self.costs[other] += costs[0]
        self._remove(node)

    def _follow(self, node: int) -> bool:
        leaders = (
            other for other, costs in self.edges[node].items() if (np.isfinite(costs).sum(axis=0) <= 1).all()
        )
        leader = next(leaders, None)
        if leader is None:
            return False
        costs = self.edges[node][leader]
        choice = np.isfinite(costs).argmax(axis=0)
        self._table(node, (leader,), choice)
        self.costs[leader] += self.costs[node][choice] + costs[choice, np.arange(len(choice))]
        held = [Load(load.start, load.end, load.usages[choice]) for load in self.loads[node]]
        self.loads[leader] = _disjoint([*self.loads[leader], *held])
        for other, matrix in self.edges[node].items():
            if other != leader:
                self._join(leader, other, matrix[choice])
        self._remove(node)
        return True

    def _eliminate(self, node: int) -> None:
        parents = tuple(self.edges[node])
        if len(parents) > 2 or not all(load.is_constant for load in self.loads[node]):
            return
        self._spend(node)
        matrices = [self.edges[node][parent] for parent in parents]
        total = self.costs[node]
        if matrices:
            total = total[:, None] + matrices[0]
        if len(matrices) == 2:
            total = total[:, :, None] + matrices[1][:, None, :]
        self._table(node, parents, total.argmin(axis=0))
        best = total.min(axis=0)
        self._remove(node)
        if not parents:
            self.constant += float(best)
        elif len(parents) == 1:
            self.costs[parents[0]] += best
        else:
            self._join(parents[0], parents[1], best)

    def _shave(self, node: int) -> None:
        """Drops strategies that cannot be had, then those another is never worse than."""
        edges = list(self.edges[node].values())
        possible = np.isfinite(self.costs[node])
        for costs in edges:
            possible &= np.isfinite(costs).any(axis=1)
        if not possible.all() and possible.any():
            self._keep(node, np.flatnonzero(possible))
            edges = list(self.edges[node].values())
        kept = np.ones(len(self.costs[node]), dtype=bool)
        for k in range(len(kept)):
            kept[k] = not self._is_beaten(node, k, kept, edges)
        if not kept.all():
            self._keep(node, np.flatnonzero(kept))

    def _is_beaten(self, node: int, k: int, kept: npt.NDArray[np.bool_], edges: list[Vector]) -> bool:
        """Whether some other strategy that is kept costs no more than `k`, whatever the neighbours do."""
        costs = self.costs[node]
        better = kept.copy()
        better[k] = False
        for load in self.loads[node]:
            better &= load.usages <= load.usages[k]
        if not better.any():
            return False
        others = np.flatnonzero(better)
        worst = costs[others] - costs[k]
        for matrix in edges:
            possible = np.isfinite(matrix[k])
            worst += (matrix[np.ix_(others, possible)] - matrix[k, possible]).max(axis=1)
        return bool((worst <= 0).any())

    def _forget_slack_points(self) -> None:
        """Keeps the points where the loads could exceed the room, and shifts the loads to them."""
        most = np.zeros(len(self.room) + 1)
        for loads in self.loads.values():
            for load in loads:
                most[load.start] += load.usages.max()
                most[load.end] -= load.usages.max()
        binding = np.cumsum(most)[:-1] > self.room
        place = np.concatenate([[0], np.cumsum(binding)])
        self.room = self.room[binding]
        for loads in self.loads.values():
            for load in loads:
                load.start, load.end = int(place[load.start]), int(place[load.end])
            loads[:] = [load for load in loads if load.start < load.end and load.usages.any()]


def _disjoint(loads: Sequence[Load]) -> list[Load]:
    """The same memory by stretches of time that do not overlap."""
    cuts = sorted({load.start for load in loads} | {load.end for load in loads})
    found = []
    for start, end in pairwise(cuts):
        inside = [load.usages for load in loads if load.start <= start and end <= load.end]
        if inside:
            found.append(Load(start, end, np.sum(inside, axis=0)))
    return found


def _costs(costs: Sequence[int]) -> Vector:
    found = np.array(costs, dtype=float)
    return np.where(found >= FORBIDDEN, np.inf, found)


def _fullest_points(problem: Problem) -> Indices:
    """Points of time such that every other point's live set is part of one of theirs: where a node begins to
    live before the next one ends."""
    lives = [(node.start, node.end) for node in problem.nodes if node.start < node.end]
    events = sorted({(start, 1) for start, _ in lives} | {(end, 0) for _, end in lives})
    pairs = zip(events, [*events[1:], (0, 0)], strict=True)
    return np.array(
        [time for (time, begins), (_, next_begins) in pairs if begins and not next_begins], dtype=int
    )
