"""The seam to the mixed-integer solver: a model of ours in, an answer of ours out.

This is the only module that knows OR-Tools. The solver behind it is HiGHS through MathOpt: on the models of
`block_ilp` it proves optimality faster than SCIP and, unlike CP-SAT, takes real coefficients as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from ortools.math_opt.python import mathopt

Term = tuple[int, float]


@dataclass
class LinearModel:
    """Minimise a linear cost over bounded variables under linear rows, built up by `variable` and `row`."""

    costs: list[float] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, tuple[Term, ...]]] = field(default_factory=list)

    def variable(self, cost: float = 0.0, lower: float = 0.0, upper: float = 1.0, *, integer: bool = False) -> int:
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


_OBJECTIVE_SCALE = 1e4
"""The largest cost as the solver sees it, so that its absolute tolerances mean something to costs in microseconds."""


def solve(model: LinearModel, *, time_limit_s: float | None = None, relative_gap: float = 1e-6) -> Solution:
    """The best values of the model's variables, with a fixed seed (HiGHS's search is sequential by default).

    The same model gives the same answer, unless the time limit cuts the search short. `status` is "unknown" where the
    limit passed before any answer was found; then `values` is empty.
    """
    largest = max((abs(cost) for cost in model.costs), default=0.0)
    scale = _OBJECTIVE_SCALE / largest if largest else 1.0
    built, variables = _build(model, scale)
    parameters = mathopt.SolveParameters(
        random_seed=0,
        relative_gap_tolerance=relative_gap,
        time_limit=None if time_limit_s is None else timedelta(seconds=time_limit_s),
    )
    result = mathopt.solve(built, mathopt.SolverType.HIGHS, params=parameters)
    reason = result.termination.reason
    if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        return Solution("infeasible", float("inf"), float("inf"), ())
    bound = result.termination.objective_bounds.dual_bound / scale
    if not result.has_primal_feasible_solution():
        return Solution("unknown", float("inf"), bound, ())
    assigned = result.variable_values()
    values = tuple(assigned[variable] for variable in variables)
    objective = sum(cost * value for cost, value in zip(model.costs, values, strict=True))
    is_optimal = reason == mathopt.TerminationReason.OPTIMAL
    return Solution("optimal" if is_optimal else "feasible", objective, min(bound, objective), values)


def _build(model: LinearModel, scale: float) -> tuple[mathopt.Model, list[mathopt.Variable]]:
    built = mathopt.Model()
    variables = [
        built.add_variable(lb=lower, ub=upper, is_integer=integer)
        for (lower, upper), integer in zip(model.bounds, model.integer, strict=True)
    ]
    for lower, upper, terms in model.rows:
        row = built.add_linear_constraint(lb=lower, ub=upper)
        for index, coefficient in terms:
            row.set_coefficient(variables[index], coefficient)
    built.objective.is_maximize = False
    for variable, cost in zip(variables, model.costs, strict=True):
        if cost:
            built.objective.set_linear_coefficient(variable, cost * scale)
    return built, variables
