"""Problems of the ASPLOS/EuroSys 2025 contest on intra-operator parallelism (IOPDDL), read, written, scored.

A node takes one of its strategies, each with a cost and a usage of memory; an edge costs what the pair of its
ends' strategies costs; at no point of time may the usages of the nodes that live then exceed the limit.
Format and meaning: github.com/google/iopddl and github.com/asplos-contest/2025. The score below is computed
from these definitions alone, and shares nothing with the solver.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

FORBIDDEN = 10**15
"""From here on a cost means never: real costs of the contest's problems are orders smaller, this kind's near
10^18."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one operator may do: the cost and the usage of each strategy, in the problem's own units.

    It lives from `start` to just before `end`.
    """

    start: int
    end: int
    costs: tuple[int, ...]
    usages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """What it costs that two nodes meet, by pair of strategies; the second node's changes fastest."""

    first: int
    second: int
    costs: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One instance; `usage_limit` is None where memory is no matter."""

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    usage_limit: int | None

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            if not node.costs or len(node.costs) != len(node.usages):
                raise ValueError(
                    f"{self.name}: node {index} has {len(node.costs)} costs and {len(node.usages)} usages; "
                    "it needs one of each per strategy"
                )
        for index, edge in enumerate(self.edges):
            if max(edge.first, edge.second) >= len(self.nodes):
                raise ValueError(f"{self.name}: edge {index} leads to a node beyond {len(self.nodes) - 1}")
            pairs = len(self.nodes[edge.first].costs) * len(self.nodes[edge.second].costs)
            if len(edge.costs) != pairs:
                raise ValueError(
                    f"{self.name}: edge {index} has {len(edge.costs)} costs for {pairs} pairs of strategies"
                )


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer costs, and the most memory that it uses at any point."""

    cost: int
    peak_usage: int


def score(problem: Problem, answer: Sequence[int]) -> Score:
    """The score of one strategy per node, by exact integers; raises ValueError for what is no answer."""
    if len(answer) != len(problem.nodes):
        raise ValueError(f"{problem.name}: {len(answer)} strategies for {len(problem.nodes)} nodes")
    cost = 0
    changes: dict[int, int] = {}
    for index, (node, strategy) in enumerate(zip(problem.nodes, answer, strict=True)):
        if not 0 <= strategy < len(node.costs):
            raise ValueError(
                f"{problem.name}: node {index} has no strategy {strategy}; it has {len(node.costs)}"
            )
        cost += node.costs[strategy]
        if node.start < node.end:
            changes[node.start] = changes.get(node.start, 0) + node.usages[strategy]
            changes[node.end] = changes.get(node.end, 0) - node.usages[strategy]
    for edge in problem.edges:
        width = len(problem.nodes[edge.second].costs)
        cost += edge.costs[answer[edge.first] * width + answer[edge.second]]
    return Score(cost, max(accumulate(changes[time] for time in sorted(changes)), default=0))


def is_within_limit(problem: Problem, found: Score) -> bool:
    return problem.usage_limit is None or found.peak_usage <= problem.usage_limit


def read(path: Path) -> Problem:
    """The problem in a JSON file, which may be compressed by gzip."""
    data = path.read_bytes()
    document = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["problem"]
    nodes, edges = document["nodes"], document["edges"]
    parts = zip(nodes["intervals"], nodes["costs"], nodes["usages"], strict=True)
    pairs = zip(edges["nodes"], edges["costs"], strict=True)
    return Problem(
        document["name"],
        tuple(Node(start, end, tuple(costs), tuple(usages)) for (start, end), costs, usages in parts),
        tuple(Edge(first, second, tuple(costs)) for (first, second), costs in pairs),
        document.get("usage_limit"),
    )


def write(problem: Problem, path: Path) -> None:
    """Writes the problem to a JSON file; `read` gives it back."""
    document: dict[str, object] = {
        "name": problem.name,
        "nodes": {
            "intervals": [[node.start, node.end] for node in problem.nodes],
            "costs": [node.costs for node in problem.nodes],
            "usages": [node.usages for node in problem.nodes],
        },
        "edges": {
            "nodes": [[edge.first, edge.second] for edge in problem.edges],
            "costs": [edge.costs for edge in problem.edges],
        },
    }
    if problem.usage_limit is not None:
        document["usage_limit"] = problem.usage_limit
    path.write_text(json.dumps({"problem": document}, separators=(",", ":")) + "\n")
