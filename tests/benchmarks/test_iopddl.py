"""The contest's problems: the score by hand, the reductions and the program against brute force, and what is
proven of the instances that are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from math import inf, prod

import pytest

from benchmarks.iopddl.instances import DIRECTORY, NEVER, PROVEN, layered
from benchmarks.iopddl.network import Network
from benchmarks.iopddl.problem import Edge, Node, Problem, Score, is_within_limit, read, score, write
from benchmarks.iopddl.program import solve_problem

KEPT = json.loads((DIRECTORY / PROVEN).read_text())
TRIANGLE = Problem(
    "triangle",
    (
        Node(0, 4, (1, 5), (10, 2)),
        Node(2, 6, (2, 3, 4), (7, 7, 1)),
        Node(4, 6, (6,), (3,)),
    ),
    (
        Edge(0, 1, (0, 10, 20, 30, 40, 50)),
        Edge(2, 0, (100, 200)),
        Edge(1, 2, (3, 2, 1)),
    ),
    usage_limit=12,
)


def brute_force(problem: Problem) -> float:
    answers = product(*(range(len(node.costs)) for node in problem.nodes))
    scores = (score(problem, answer) for answer in answers)
    costs = (found.cost for found in scores if is_within_limit(problem, found))
    return min((cost for cost in costs if cost < NEVER), default=inf)


@pytest.mark.parametrize(
    ("answer", "cost", "peak_usage"),
    [
        ((0, 0, 0), 1 + 2 + 6 + 0 + 100 + 3, 10 + 7),
        ((0, 2, 0), 1 + 4 + 6 + 20 + 100 + 1, 10 + 1),
        ((1, 1, 0), 5 + 3 + 6 + 40 + 200 + 2, 7 + 3),  # the first node dies when the third is born
    ],
)
def test_the_score_by_hand(answer, cost, peak_usage) -> None:
    assert score(TRIANGLE, answer) == Score(cost, peak_usage)


@pytest.mark.parametrize(
    ("answer", "says"),
    [((0, 0), "2 strategies for 3 nodes"), ((0, 3, 0), "node 1 has no strategy 3; it has 3")],
)
def test_what_is_no_answer(answer, says) -> None:
    with pytest.raises(ValueError, match=says):
        score(TRIANGLE, answer)


@pytest.mark.parametrize(
    ("edge", "says"),
    [
        (Edge(0, 1, (1, 2)), "edge 0 has 2 costs for 6 pairs"),
        (Edge(0, 3, (1,)), "edge 0 leads to a node beyond 2"),
    ],
)
def test_what_is_no_problem(edge, says) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TRIANGLE, edges=(edge,))


@pytest.mark.parametrize("limit", [12, None])
def test_a_problem_survives_its_file(tmp_path, limit) -> None:
    problem = replace(TRIANGLE, usage_limit=limit)
    write(problem, tmp_path / "triangle.json")
    assert read(tmp_path / "triangle.json") == problem


@pytest.mark.parametrize("tightness", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force(seed, tightness) -> None:
    problem = layered("small", seed=seed, num_layers=3, width=2, tightness=tightness)
    found, best = solve_problem(problem), brute_force(problem)
    if best == inf:
        assert found.incumbent is None
        return
    assert found.incumbent == best
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert score(problem, found.answer).cost == found.incumbent
    assert is_within_limit(problem, score(problem, found.answer))


@pytest.mark.parametrize("seed", range(6))
def test_without_memory_most_of_a_problem_is_reduced_away(seed) -> None:
    problem = replace(layered("free", seed, num_layers=6, width=2, tightness=0), usage_limit=None)
    network = Network(problem)
    network.reduce()
    assert len(network.costs) < len(problem.nodes) / 2


@pytest.mark.parametrize("name", [name for name in KEPT if "30x4" not in name])
def test_kept_instances(name) -> None:
    """Bound, incumbent and what descent alone finds are no worse than they were."""
    problem, kept = read(DIRECTORY / f"{name}.json"), KEPT[name]
    found = solve_problem(problem, relative_gap=1e-9)
    assert found.incumbent == kept["incumbent"] <= found.first_incumbent <= kept["first_incumbent"]
    assert kept["bound"] * (1 - 1e-6) <= found.bound <= kept["incumbent"] * (1 + 1e-9)
    if prod(len(node.costs) for node in problem.nodes) < 20_000:
        assert found.incumbent == brute_force(problem)


@pytest.mark.parametrize("backend", ["highs", "scip", "cp-sat"])
def test_all_solvers_agree(backend) -> None:
    name = "layers-12x3"
    found = solve_problem(read(DIRECTORY / f"{name}.json"), backend=backend)
    assert found.incumbent == KEPT[name]["incumbent"]
    assert found.bound == pytest.approx(found.incumbent, rel=1e-5)


def test_a_limit_on_branching_leaves_an_honest_gap() -> None:
    name = "layers-30x4"
    found = solve_problem(read(DIRECTORY / f"{name}.json"), node_limit=1)
    assert found.bound <= KEPT[name]["incumbent"] * (1 + 1e-9)
    assert 1 <= found.incumbent / KEPT[name]["incumbent"] <= 1.05
