"""The solver seam: every backend against enumeration, and what hints and limits may change."""

from __future__ import annotations

import random
from itertools import product
from math import inf, isclose

import pytest
from ortools.math_opt import result_pb2

from autopar.search.linear_model import LinearModel, Size
from autopar.search.solver import Relaxation, Solution, solve

BACKENDS = ("glop+scip", "highs", "scip", "cp-sat")


def knapsack(seed: int, items: int = 10) -> LinearModel:
    """Take as much worth as two limits allow, some items only together; its relaxation is fractional."""
    rng = random.Random(seed)
    model = LinearModel()
    take = [model.variable(-rng.randint(5, 40) * 1e-6, integer=True) for _ in range(items)]
    for _ in range(2):
        weights = [rng.randint(3, 30) for _ in take]
        model.row(-inf, sum(weights) // 3, zip(take, map(float, weights), strict=True))
    model.row(0, 0, [(take[0], 1.0), (take[1], -1.0)])
    return model


def best_by_enumeration(model: LinearModel) -> float:
    candidates = product((0.0, 1.0), repeat=len(model.costs))
    return min(model.cost_of(values) for values in candidates if model.is_met_by(values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_enumeration(seed, backend) -> None:
    model = knapsack(seed)
    found = solve(model, backend=backend)
    assert found.status == "optimal"
    assert model.is_met_by(found.values)
    assert isclose(found.objective, best_by_enumeration(model), rel_tol=1e-6)
    assert isclose(found.bound, found.objective, rel_tol=1e-5)
    assert found.size == Size(variables=10, rows=3, integer=10)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("quality", ["best", "poor", "wrong"])
def test_a_hint_changes_the_way_and_not_the_answer(seed, quality) -> None:
    """A hint that breaks a row, and would cost less than any answer, must not be believed."""
    model = knapsack(seed)
    best = solve(model)
    hint = {"best": best.values, "poor": (0.0,) * 10, "wrong": (1.0,) * 10}[quality]
    found = solve(model, hint=hint)
    assert found.status == "optimal"
    assert isclose(found.objective, best.objective, rel_tol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_model_gives_the_same_answer(backend) -> None:
    model = knapsack(3, items=14)
    assert solve(model, backend=backend) == solve(model, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_contradict(backend) -> None:
    model = LinearModel()
    x, y = model.variable(1.0, integer=True), model.variable(2.0, integer=True)
    model.row(2, inf, [(x, 1.0), (y, 1.0)])
    model.row(-inf, 1, [(x, 1.0), (y, 1.0)])
    found = solve(model, backend=backend)
    assert (found.status, found.values) == ("infeasible", ())


def test_terms_of_one_variable_add_up() -> None:
    model = LinearModel()
    x = model.variable(1.0, upper=10.0)
    model.row(6, inf, [(x, 1.0), (x, 2.0)])
    assert solve(model).values == pytest.approx((2.0,))


def test_a_relaxation_with_whole_corners_is_not_branched_on() -> None:
    """Continuous variables may be fractional in the answer."""
    model = LinearModel()
    x, y = model.variable(3.0, integer=True), model.variable(1.0)
    model.row(1, 1, [(x, 1.0)])
    model.row(0.25, inf, [(x, -0.25), (y, 1.0)])
    assert solve(model).values == pytest.approx((1.0, 0.5))


@pytest.mark.parametrize("seed", range(6))
def test_one_relaxation_after_the_other_finds_what_each_does_alone(seed) -> None:
    model, rng = knapsack(seed, items=40), random.Random(seed)
    relaxation = Relaxation(model)
    for scale in (1e-6, 1e-6, 1.0, 1e3, 0.0, 1e-6):
        costs = [scale * rng.choice((0.0, rng.uniform(-40, 5))) for _ in model.costs]
        alone = solve(model.priced(costs, relaxed=True))
        bound, values = relaxation.least(costs)
        assert bound == pytest.approx(alone.bound, rel=1e-9, abs=1e-15)
        assert model.priced(costs).cost_of(values) == pytest.approx(bound, rel=1e-9, abs=1e-15)
    assert relaxation.size == Size(40, 3, 0)


def test_a_relaxation_that_goes_astray_is_solved_anew() -> None:
    class Astray:
        def update(self, _: object) -> bool:
            return True

        def solve(self, *_: object) -> result_pb2.SolveResultProto:
            return result_pb2.SolveResultProto()

    model = knapsack(0)
    relaxation, bound = Relaxation(model), solve(model.priced(model.costs, relaxed=True)).bound
    relaxation._solver = Astray()
    found, values = relaxation.least(model.costs)
    assert found == pytest.approx(bound) == model.cost_of(values)
    assert relaxation._solver is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_limit_leaves_an_honest_gap(backend) -> None:
    model = knapsack(1, items=40)
    found, best = solve(model, node_limit=1, backend=backend), solve(model)
    assert found.bound <= best.objective * (1 - 1e-9) or found.status == "optimal"
    assert best.objective <= found.objective + 1e-12
    assert solve(model, node_limit=1, backend=backend) == found


def test_no_time_no_answer() -> None:
    found = solve(knapsack(0), time_limit_s=0.0)
    assert (found.status, found.values, found.bound) == ("unknown", (), -inf)


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no solver is called 'cplex'; there are glop\+scip, highs"):
        solve(knapsack(0), backend="cplex")  # type: ignore[arg-type]  # wrong on purpose


def test_the_gap_is_a_fraction_of_the_objective() -> None:
    assert Solution("feasible", 4.0, 3.0, (1.0,), Size(1, 0, 0), 0.0).gap == 0.25
