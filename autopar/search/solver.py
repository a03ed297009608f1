"""The seam to the mixed-integer solver: a model of ours in, an answer of ours out.

This is the only module that knows OR-Tools. The models of `block_ilp` are nearly always integral by
themselves, so the linear relaxation is solved first, by GLOP's simplex, and only where its corner is
fractional does SCIP branch. On one decoder layer's model (3,200 variables, 1,700 rows) that takes 0.02 s,
where HiGHS takes 0.07, SCIP 0.2 and CP-SAT 0.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ortools.linear_solver import pywraplp

Term = tuple[int, float]


@dataclass
class LinearModel:
    """Minimise a linear cost over bounded variables under linear rows, built up by `variable` and `row`."""

    costs: list[float] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, tuple[Term, ...]]] = field(default_factory=list)

    def variable(
        self, cost: float = 0.0, lower: float = 0.0, upper: float = 1.0, *, integer: bool = False
    ) -> int:
        """Adds a variable and returns its index."""
        self.costs.append(cost)
        self.bounds.append((lower, upper))
        self.integer.append(integer)
        return len(self.costs) - 1

    def row(self, lower: float, upper: float, terms: Iterable[Term]) -> None:
        """Requires `lower <= sum of coefficient * variable <= upper`."""
        self.rows.append((lower, upper, tuple(terms)))


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found: `objective` is the cost of `values`, and nothing can cost less than `bound`."""

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    objective: float
    bound: float
    values: tuple[float, ...]

    @property
    def gap(self) -> float:
        """How much of the objective is not proven necessary, as a fraction of it."""
        return 0.0 if self.objective <= 0 else max(0.0, 1 - self.bound / self.objective)


_LARGEST_COST = 1e4
"""The largest cost as the solver sees it, so that its absolute tolerances mean something to costs in
microseconds."""

_INTEGRAL = 1e-6


def solve(model: LinearModel, *, time_limit_s: float | None = None, relative_gap: float = 1e-6) -> Solution:
    """The best values of the model's variables, found by one thread without randomness.

    The same model gives the same answer, unless the time limit cuts the search short. `status` is "unknown"
    where the limit passed before any answer was found; then `values` is empty.
    """
    relaxed = _run(model, "GLOP", time_limit_s, relative_gap)
    if relaxed.status != "optimal":
        return relaxed
    whole = zip(relaxed.values, model.integer, strict=True)
    if all(abs(value - round(value)) <= _INTEGRAL for value, integer in whole if integer):
        return relaxed
    return _run(model, "SCIP", time_limit_s, relative_gap)


def _run(model: LinearModel, name: str, time_limit_s: float | None, relative_gap: float) -> Solution:
    is_relaxed = name == "GLOP"
    solver = pywraplp.Solver.CreateSolver(name)
    assert solver is not None, f"this build of OR-Tools has no {name}"
    if time_limit_s is not None:
        solver.SetTimeLimit(max(1, int(1000 * time_limit_s)))
    largest = max((abs(cost) for cost in model.costs), default=0.0)
    scale = _LARGEST_COST / largest if largest else 1.0
    objective = solver.Objective()
    variables = []
    for cost, (lower, upper), integer in zip(model.costs, model.bounds, model.integer, strict=True):
        variable = (
            solver.IntVar(lower, upper, "") if integer and not is_relaxed else solver.NumVar(lower, upper, "")
        )
        variables.append(variable)
        if cost:
            objective.SetCoefficient(variable, cost * scale)
    for lower, upper, terms in model.rows:
        row = solver.RowConstraint(lower, upper, "")
        for index, coefficient in terms:
            row.SetCoefficient(variables[index], coefficient)
    parameters = pywraplp.MPSolverParameters()
    parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, relative_gap)
    outcome = solver.Solve(parameters)
    if outcome == pywraplp.Solver.INFEASIBLE:
        return Solution("infeasible", float("inf"), float("inf"), ())
    if outcome not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        return Solution("unknown", float("inf"), float("-inf"), ())
    values = tuple(variable.solution_value() for variable in variables)
    cost = sum(cost * value for cost, value in zip(model.costs, values, strict=True))
    bound = cost if is_relaxed else min(cost, objective.BestBound() / scale)
    return Solution("optimal" if outcome == pywraplp.Solver.OPTIMAL else "feasible", cost, bound, values)
