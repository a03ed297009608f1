"""What a part of a model takes at least on a mesh axis: its part of the operator program, relaxed.

The ops of one unit keep their costs in the program of the whole axis (`autopar.search.block_ilp`), all others
do their work for nothing. Then only the rows matter in which something has a cost: leaving out the others can
but lower the optimum. Blocks of one class share the rows in which any of them has a cost, and differ in costs
where they begin and end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.pricing import OpCost, total
from autopar.search.block_ilp import BlockIlp, Part
from autopar.search.block_rows import Around
from autopar.search.effort import clocked
from autopar.search.runs import Array
from autopar.search.solver import Relaxation

MOST_RELAXATIONS = 4
"""How many are kept at a time: they hold the solver's memory."""


class RunAgain(NamedTuple):
    """The ops that run again where a block computes again: `always`, and unless their `results` are kept."""

    always: frozenset[int]
    results: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        """Either."""
        return self.always | self.results


class Traded(NamedTuple):
    """What ops take at least that compute again, bytes that are kept paid for; and how many bytes that is."""

    seconds: float
    num_bytes: float


class Fastest(NamedTuple):
    """What ops take at least, and what it is made of under the strategies that reach it."""

    seconds: float
    cost: OpCost


RelaxationOf = Callable[[Around], Relaxation]


def relaxation(around: Around) -> Relaxation:
    """The relaxation of some rows of a program."""
    return Relaxation(around.model)


def kept_relaxations() -> RelaxationOf:
    """The same, each made once: problems of one form share those of a class of blocks, and begin where the
    last one ended."""
    return lru_cache(MOST_RELAXATIONS)(relaxation)


class BlockFloor:
    """The floor of ops `[start, stop)` of an axis's problem, one block or ops outside of all, with the sums
    of what they make and the other conversions of what they read, whatever is chosen anywhere; solved with
    what `relaxation_of` has for its rows."""

    def __init__(
        self, ilp: BlockIlp, start: int, stop: int, relaxation_of: RelaxationOf = relaxation
    ) -> None:
        self.problem = ilp.problem
        self.relaxation_of = relaxation_of
        self.effort = ilp.effort
        self.ilp = ilp
        self.start = start
        self.stop = stop
        graph = ilp.problem.graph
        self._ops = frozenset(graph.representative[index] for index in range(start, stop))

    def computed_s(self, forward_part: float = 1.0) -> float:
        """What the ops compute at least, whatever that communicates, if so much of the forward counts."""
        problem = self.problem
        return sum(
            min([forward_part * cost.forward_s + cost.backward_s for cost in problem.op_costs[index]])
            / problem.instances[index]
            for index in sorted(self._ops)
        )

    def least_s(self, arithmetic: float | None = None) -> float:
        """What the ops take at least.

        A forward and a backward that run side by side hide communication, but together take at least what
        they compute, and what the backward takes: so much `arithmetic` and the rest whole backwards.
        """
        return self.fastest.seconds if arithmetic is None else self._least(self._paid_s(arithmetic))[0]

    @cached_property
    def fastest(self) -> Fastest:
        """What they take at least where nothing hides communication, and what it is made of."""
        least_s, values = self._least(self._time_s)
        pairs = zip(self._variables, values.tolist(), strict=True)
        taken = [(variable, value) for variable, value in pairs if value]
        ops = total(self._op_cost(variable).times(value) for variable, value in taken)
        there_s = sum(value * self._conversion_again_s(variable) for variable, value in taken)
        back_s = max(0.0, least_s - ops.total_s - there_s)
        beside = OpCost(forward_communication_s=there_s, backward_communication_s=back_s)
        return Fastest(least_s, total((ops, beside)))

    def traded(self, price: float, again: RunAgain, arithmetic: float | None = None) -> Traded:
        """What the ops take at least, as `least_s`, if the backward runs these `again`, which nothing hides;
        or their results are kept at this price of a byte, whichever costs less. So it is with conversions for
        them; those for others, as of what the last of them makes, may not run again."""
        parts = self._parts
        chosen = np.array([part.op in (again.all if part.tensors else again.results) for part in parts])
        always = np.array([part.tensors is None and part.op in again.always for part in parts])
        kept_s, again_s = price * self._result_bytes, np.where(chosen, self._forward_s, 0.0)
        more_s = np.minimum(kept_s, again_s) + np.where(always, self._forward_s, 0.0)
        least_s, values = self._least(self._paid_s(arithmetic) + more_s)
        return Traded(least_s, float(values @ np.where(kept_s < again_s, self._result_bytes, 0.0)))

    def _paid_s(self, arithmetic: float | None) -> Array:
        if arithmetic is None:
            return self._time_s
        return arithmetic * self._computed_s + (1 - arithmetic) * (self._time_s - self._forward_s)

    @clocked("operator floors")
    def _least(self, paid_s: Array) -> tuple[float, Array]:
        """What the ops take at least where the variables that have a cost have this one, and their values."""
        relaxed = self.relaxation_of(self._around)
        costs = np.zeros(relaxed.size.variables)
        costs[self._numbers] = paid_s
        least_s, values = relaxed.least(costs.tolist())
        self.effort.solved("operator floors", relaxed.size)
        return least_s, np.array(values)[self._numbers]

    @cached_property
    def _variables(self) -> tuple[int, ...]:
        """The variables that have a cost."""
        graph = self.problem.graph
        read = {name for op in graph.ops[self.start : self.stop] for name in op.inputs}
        made = {name for op in graph.ops[self.start : self.stop] for name in op.outputs}
        return tuple(
            variable
            for variable, part in self.ilp.parts.items()
            if part.op in self._ops
            and not (part.tensors and (made if part.is_made else read).isdisjoint(part.tensors.members))
        )

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        """What they stand for."""
        return tuple([self.ilp.parts[variable] for variable in self._variables])

    @cached_property
    def _around(self) -> Around:
        """The rows in which a variable has a cost for any block of the class."""
        parts = self.ilp.parts.items()
        return self.ilp.rows.around(frozenset(variable for variable, part in parts if part.op in self._ops))

    @cached_property
    def _numbers(self) -> NDArray[np.intp]:
        """These variables, as the relaxation numbers them."""
        return self._around.numbers(self._variables)

    @cached_property
    def _time_s(self) -> Array:
        costs, parts = self.ilp.model.costs, self.ilp.parts
        return np.array([costs[variable] / parts[variable].num_instances for variable in self._variables])

    @cached_property
    def _computed_s(self) -> Array:
        return np.array([self._op_cost(variable).computed_s for variable in self._variables])

    @cached_property
    def _forward_s(self) -> Array:
        return np.array(
            [
                self._op_cost(variable).forward_total_s + self._conversion_again_s(variable)
                for variable in self._variables
            ]
        )

    @cached_property
    def _result_bytes(self) -> Array:
        return np.array([part.result_bytes for part in self._parts])

    def _op_cost(self, variable: int) -> OpCost:
        """What a variable costs in one instance, nothing for conversions."""
        cost = self.ilp.op_costs.get(variable)
        return OpCost() if cost is None else cost.times(1 / self.ilp.parts[variable].num_instances)

    def _conversion_again_s(self, variable: int) -> float:
        """The forward of a conversion, 0 for an op."""
        part = self.ilp.parts[variable]
        if part.tensors is None:
            return 0.0
        return self.problem.conversion_again_s(part.tensors.name, *part.states)
