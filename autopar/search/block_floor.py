"""What a part of a model takes at least on a mesh axis: its part of the operator program, relaxed.

The ops of one unit keep their costs in the program of the whole axis (`autopar.search.block_ilp`), all others
do their work for nothing. Then only the rows matter in which something has a cost: leaving out the others can
but lower the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autopar.search.block_ilp import BlockIlp, Part
from autopar.search.effort import clocked
from autopar.search.runs import Array
from autopar.search.solver import LinearModel, solve


class _Paid(NamedTuple):
    """A variable that has a cost: its number in this program and in the whole one, and what it stands for."""

    number: int
    variable: int
    part: Part


class Trade(NamedTuple):
    """What may be kept at a `price` of seconds a byte, or else made again: the results of ops, for which each
    takes at least `again_s`, and of conversions."""

    price: float
    again_s: Mapping[int, float]


class BlockFloor:
    """The floor of ops `[start, stop)` of an axis's problem, one block or ops outside of all, with the sums
    of what they make and the other conversions of what they read, whatever is chosen anywhere."""

    def __init__(self, ilp: BlockIlp, start: int, stop: int) -> None:
        self.problem = ilp.problem
        self.effort = ilp.effort
        self.ilp = ilp
        self.start = start
        self.stop = stop
        graph = ilp.problem.graph
        self._ops = {graph.representative[index] for index in range(start, stop)}
        self._known_s: dict[bytes, float] = {}

    @cached_property
    def computed_s(self) -> float:
        """What the ops compute at least, whatever that communicates."""
        problem = self.problem
        return sum(problem.computed_s[index] / problem.instances[index] for index in sorted(self._ops))

    @clocked("operator floors")
    def least_s(self, trade: Trade | None = None, *, hides: bool = False) -> float:
        """What the ops take at least; with a `trade`, their results and those of conversions are kept, or
        made again, whichever costs less. Where something else `hides` what is communicated, it costs nothing,
        but for what is made again.
        """
        paid_s = self._computed_s if hides else self._time_s
        if trade is not None:
            ops_s = np.array([trade.again_s.get(paid.part.op, 0.0) for paid in self._paid])
            least_s = np.where(self._is_conversion, self._conversions_again_s, ops_s)
            paid_s = paid_s + np.minimum(trade.price * self._result_bytes, least_s)
        key = paid_s.tobytes()
        if key not in self._known_s:
            costs = np.zeros(len(self._model.costs))
            costs[[paid.number for paid in self._paid]] = paid_s
            solution = solve(self._model.priced(costs.tolist(), relaxed=True))
            self.effort.solved("operator floors", solution.size)
            self._known_s[key] = solution.bound
        return self._known_s[key]

    @cached_property
    def _made(self) -> tuple[LinearModel, tuple[_Paid, ...]]:
        ilp, graph = self.ilp, self.problem.graph
        read = {name for op in graph.ops[self.start : self.stop] for name in op.inputs}
        made = {name for op in graph.ops[self.start : self.stop] for name in op.outputs}
        parts = {
            variable: part
            for variable, part in ilp.parts.items()
            if part.op in self._ops
            and not (part.tensors and (made if part.is_made else read).isdisjoint(part.tensors.members))
        }
        rows = [row for row in ilp.model.rows if any(variable in parts for variable, _ in row[2])]
        touched = {variable for _, _, terms in rows for variable, _ in terms}
        numbers = {variable: number for number, variable in enumerate(sorted(touched))}
        model = LinearModel()
        for variable in numbers:
            model.variable(0.0, *ilp.model.bounds[variable])
        for lower, upper, terms in rows:
            model.row(lower, upper, [(numbers[variable], factor) for variable, factor in terms])
        return model, tuple(_Paid(numbers[variable], variable, part) for variable, part in parts.items())

    @property
    def _model(self) -> LinearModel:
        return self._made[0]

    @property
    def _paid(self) -> tuple[_Paid, ...]:
        return self._made[1]

    @cached_property
    def _time_s(self) -> Array:
        costs = self.ilp.model.costs
        return np.array([costs[paid.variable] / paid.part.num_instances for paid in self._paid])

    @cached_property
    def _computed_s(self) -> Array:
        seconds = self.ilp.op_computed_s
        return np.array([seconds.get(paid.variable, 0.0) / paid.part.num_instances for paid in self._paid])

    @cached_property
    def _result_bytes(self) -> Array:
        return np.array([paid.part.result_bytes for paid in self._paid])

    @cached_property
    def _is_conversion(self) -> Array:
        return np.array([paid.part.tensors is not None for paid in self._paid])

    @cached_property
    def _conversions_again_s(self) -> Array:
        """The forward of each conversion, 0 for ops."""
        again_s = self.problem.conversion_again_s
        parts = (paid.part for paid in self._paid)
        return np.array([again_s(part.tensors.name, *part.states) if part.tensors else 0.0 for part in parts])
