"""The seam to the mixed-integer solvers: a model of ours in, an answer of ours out.

This is the only module that knows OR-Tools. The models of `block_ilp` are nearly always integral by
themselves, so the linear relaxation is solved first, by GLOP's dual simplex, and only where its corner is
fractional does SCIP branch. Where the relaxation alone is asked for, at many costs, a `Relaxation` goes on
from one to the next by the primal simplex. Models are handed over as MathOpt protocol buffers, filled a
column at a time: that takes half the time of a call per coefficient, solving included. `docs/solvers.md`
compares the solvers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal, get_args

import numpy as np
from ortools.math_opt import (
    callback_pb2,
    model_parameters_pb2,
    model_pb2,
    model_update_pb2,
    parameters_pb2,
    result_pb2,
    sparse_containers_pb2,
)
from ortools.math_opt.core.python import solver as mathopt

from autopar.search.linear_model import Constraints, LinearModel, Size

Rounding = Callable[[Sequence[float]], Sequence[float] | None]
"""Makes an answer from the values of the relaxation, or gives up with None."""

Status = Literal["optimal", "feasible", "infeasible", "unknown"]

Backend = Literal["glop+scip", "highs", "scip", "cp-sat"]
"""Who solves. CP-SAT knows whole numbers alone: ask it only where some best answer has no others."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found: `objective` is the cost of `values`, and nothing can cost less than `bound`.

    `size` is that of the model, `cpu_s` the processor time of building and solving it.
    """

    status: Status
    objective: float
    bound: float
    values: tuple[float, ...]
    size: Size
    cpu_s: float = field(compare=False)

    @property
    def gap(self) -> float:
        """How much of the objective is not proven necessary, as a fraction of it."""
        return 0.0 if self.objective <= 0 else max(0.0, 1 - self.bound / self.objective)


_LARGEST_COST = 1e4
"""The largest cost as the solver sees it, so that its absolute tolerances mean something to costs in
microseconds."""


def solve(
    model: LinearModel,
    *,
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    relative_gap: float = 1e-6,
    backend: Backend = "glop+scip",
    hint: Sequence[float] | None = None,
    rounding: Rounding | None = None,
) -> Solution:
    """The best values of the model's variables, found by one thread without randomness.

    The same model gives the same answer, unless the time limit cuts the search short; `node_limit`, of
    branches (CP-SAT: of conflicts), cuts it short at the same place every time. `status` is "unknown" where a
    limit passed before any answer was found; then `values` is empty. `hint` gives every variable a value: an
    answer already at hand, or a guess; `rounding` makes one where the relaxation, which only "glop+scip"
    looks at, is fractional. Raises ValueError for an unknown backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"no solver is called {backend!r}; there are {', '.join(get_args(Backend))}")
    start_s = time.process_time()
    limits = _Limits(time_limit_s, node_limit, relative_gap)
    if backend == "glop+scip":
        found = _relax_then_branch(model, limits, hint, rounding)
    else:
        found = _run(model, _SOLVERS[backend], limits, hint)
    return Solution(
        found.status,
        found.objective,
        min(found.bound, found.objective),
        found.values,
        model.size,
        time.process_time() - start_s,
    )


class Relaxation:
    """The relaxation of a model at one cost after the other: the rows stay, so each begins in the corner
    where the last one ended, which is a quarter of the work.

    The last digits of what is found depend on what was asked before.
    """

    def __init__(self, model: LinearModel) -> None:
        self._model = model
        self.size = replace(model.size, integer=0)
        self._solver: mathopt.Solver | None = None

    def least(self, costs: Sequence[float]) -> tuple[float, list[float]]:
        """What nothing can cost less than, and the values of variables that cost that."""
        model, parameters = self._model.priced(costs, relaxed=True), _parameters(_GLOP, _UNLIMITED)
        scale = _scale(model)
        if self._solver is None:
            proto = _model_proto(model, scale, is_relaxed=True, is_whole=False)
            self._solver = mathopt.new(_GLOP, proto, _DEFAULTS)
        else:
            update = model_update_pb2.ModelUpdateProto()
            everywhere = range(len(costs))
            _add_costs(update.objective_updates.linear_coefficients, model, everywhere, scale)
            updated = self._solver.update(update)
            assert updated, "GLOP takes other costs"
            # At any costs the corner keeps to all rows, which is what the primal simplex begins with.
            parameters.lp_algorithm = parameters_pb2.LP_ALGORITHM_PRIMAL_SIMPLEX
        found = self._solver.solve(parameters, _hinted(None), *_UNWATCHED)
        if found.termination.reason == result_pb2.TERMINATION_REASON_OPTIMAL:
            bound = float(found.termination.objective_bounds.dual_bound) / scale
            return bound, _values(found, len(costs))
        self._solver = None  # numbers went astray on the way
        alone = solve(model)
        assert alone.values, "every problem has an answer"
        return alone.bound, list(alone.values)


@dataclass(frozen=True, slots=True)
class _Limits:
    time_s: float | None
    nodes: int | None
    relative_gap: float


_UNLIMITED = _Limits(None, None, 0.0)


@dataclass(frozen=True, slots=True)
class _Found:
    """What one solver says."""

    status: Status
    objective: float = float("inf")
    bound: float = float("-inf")
    values: tuple[float, ...] = ()


_DEFAULTS = parameters_pb2.SolverInitializerProto()
_UNWATCHED = None, callback_pb2.CallbackRegistrationProto(), None, None
"""How every call of a solver ends: messages, what to call back for, what to call, what interrupts."""

_GLOP = parameters_pb2.SOLVER_TYPE_GLOP
_SOLVERS = {
    "highs": parameters_pb2.SOLVER_TYPE_HIGHS,
    "scip": parameters_pb2.SOLVER_TYPE_GSCIP,
    "cp-sat": parameters_pb2.SOLVER_TYPE_CP_SAT,
}
_STATUS: dict[int, Status] = {
    result_pb2.TERMINATION_REASON_OPTIMAL: "optimal",
    result_pb2.TERMINATION_REASON_FEASIBLE: "feasible",
    result_pb2.TERMINATION_REASON_INFEASIBLE: "infeasible",
    # Presolve does not always look which of the two it is; costs are bounded below in every model of ours.
    result_pb2.TERMINATION_REASON_INFEASIBLE_OR_UNBOUNDED: "infeasible",
}


def _relax_then_branch(
    model: LinearModel, limits: _Limits, hint: Sequence[float] | None, rounding: Rounding | None
) -> _Found:
    start_s = time.monotonic()
    relaxed = _run(model, _GLOP, limits)
    if relaxed.status == "infeasible":
        return relaxed
    if relaxed.status == "optimal":
        if model.is_whole(relaxed.values):
            return relaxed
        rounded = rounding(relaxed.values) if rounding else None
        answers = [answer for answer in (hint, rounded) if answer is not None and model.is_met_by(answer)]
        if answers:
            hint = min(answers, key=model.cost_of)
            incumbent = model.cost_of(hint)
            if incumbent - relaxed.bound <= limits.relative_gap * abs(incumbent):
                return _Found("optimal", incumbent, relaxed.bound, tuple(hint))
    if limits.time_s is not None:
        limits = replace(limits, time_s=limits.time_s - (time.monotonic() - start_s))
    branched = _run(model, _SOLVERS["scip"], limits, hint)
    return replace(branched, bound=max(relaxed.bound, branched.bound))


def _run(model: LinearModel, solver: int, limits: _Limits, hint: Sequence[float] | None = None) -> _Found:
    if limits.time_s is not None and limits.time_s <= 0:
        return _Found("unknown")
    scale = _scale(model)
    proto = _model_proto(model, scale, is_relaxed=solver == _GLOP, is_whole=solver == _SOLVERS["cp-sat"])
    hinted = _hinted(hint if solver != _GLOP else None)
    result = mathopt.solve(proto, solver, _DEFAULTS, _parameters(solver, limits), hinted, *_UNWATCHED)
    reason = result.termination.reason
    assert reason != result_pb2.TERMINATION_REASON_UNBOUNDED, "costs must be bounded below"
    status: Status = _STATUS.get(reason, "unknown")
    if status == "infeasible":
        return _Found(status, bound=float("inf"))
    bound = result.termination.objective_bounds.dual_bound / scale
    if status == "unknown" or not result.solutions:
        return _Found("unknown", bound=bound)
    values = _values(result, len(model.costs))
    cost = model.cost_of(values)
    return _Found(status, cost, cost if solver == _GLOP else bound, tuple(values))


def _values(result: result_pb2.SolveResultProto, number: int) -> list[float]:
    """What the variables of the best answer are, so many of them."""
    answer = result.solutions[0].primal_solution.variable_values
    values = [0.0] * number
    for index, value in zip(answer.ids, answer.values, strict=True):
        values[index] = value
    return values


def _constraints_proto(constraints: Constraints) -> model_pb2.ModelProto:
    """Bounds and rows as the solver takes them, made once for all models that share them."""
    if isinstance(constraints.compiled, model_pb2.ModelProto):
        return constraints.compiled
    proto = model_pb2.ModelProto()
    proto.variables.ids.extend(range(len(constraints.lower)))
    proto.variables.lower_bounds.extend(constraints.lower)
    proto.variables.upper_bounds.extend(constraints.upper)
    numbers = range(len(constraints.row_lower))
    proto.linear_constraints.ids.extend(numbers)
    proto.linear_constraints.lower_bounds.extend(constraints.row_lower)
    proto.linear_constraints.upper_bounds.extend(constraints.row_upper)
    matrix = proto.linear_constraint_matrix
    matrix.row_ids.extend(np.repeat(numbers, constraints.lengths).tolist())
    matrix.column_ids.extend(constraints.variables)
    matrix.coefficients.extend(constraints.coefficients)
    constraints.is_closed, constraints.compiled = True, proto
    return proto


def _model_proto(
    model: LinearModel, scale: float, *, is_relaxed: bool, is_whole: bool
) -> model_pb2.ModelProto:
    proto = model_pb2.ModelProto()
    proto.CopyFrom(_constraints_proto(model.constraints))
    integer = [False] * len(model.costs) if is_relaxed else [is_whole or each for each in model.integer]
    proto.variables.integers.extend(integer)
    priced = [index for index, cost in enumerate(model.costs) if cost]
    _add_costs(proto.objective.linear_coefficients, model, priced, scale)
    return proto


def _scale(model: LinearModel) -> float:
    """What costs are multiplied with for the solver."""
    largest = max((abs(cost) for cost in model.costs), default=0.0)
    return _LARGEST_COST / largest if largest else 1.0


def _add_costs(
    costs: sparse_containers_pb2.SparseDoubleVectorProto,
    model: LinearModel,
    variables: Sequence[int],
    scale: float,
) -> None:
    """Add the costs of these variables, as the solver sees them."""
    costs.ids.extend(variables)
    costs.values.extend([scale * model.costs[variable] for variable in variables])


def _parameters(solver: int, limits: _Limits) -> parameters_pb2.SolveParametersProto:
    found = parameters_pb2.SolveParametersProto()
    if limits.time_s is not None and isfinite(limits.time_s):
        found.time_limit.FromMicroseconds(max(1, int(1e6 * limits.time_s)))
    if solver == _GLOP:
        found.lp_algorithm = parameters_pb2.LP_ALGORITHM_DUAL_SIMPLEX
        # Both take longer than they save on programs like ours, whose costs have been scaled.
        found.presolve = found.scaling = parameters_pb2.EMPHASIS_OFF
        return found
    found.relative_gap_tolerance = limits.relative_gap
    if solver != _SOLVERS["highs"]:  # which takes no number of threads, and uses one
        found.threads = 1
    if solver == _SOLVERS["cp-sat"]:
        found.cp_sat.linearization_level = 2  # our rows are tight: all of them belong in its relaxation
        if limits.nodes is not None:
            found.cp_sat.max_number_of_conflicts = limits.nodes
    elif limits.nodes is not None:
        found.node_limit = limits.nodes
    return found


def _hinted(hint: Sequence[float] | None) -> model_parameters_pb2.ModelSolveParametersProto:
    found = model_parameters_pb2.ModelSolveParametersProto()
    if hint is not None:
        values = found.solution_hints.add().variable_values
        values.ids.extend(range(len(hint)))
        values.values.extend(hint)
    return found
