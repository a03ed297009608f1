"""What a part of a model takes at least on a mesh axis: its part of the operator program, relaxed.

The ops of one unit keep their costs in the program of the whole axis (`autopar.search.block_ilp`), all others
do their work for nothing. Then only the rows matter in which something has a cost: leaving out the others can
but lower the optimum. Blocks of one class share the rows in which any of them has a cost, and differ in costs
where they begin and end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.search.block_ilp import BlockIlp, Part
from autopar.search.block_rows import Rows
from autopar.search.effort import clocked
from autopar.search.runs import Array
from autopar.search.solver import Relaxation

MOST_RELAXATIONS = 4
"""How many are kept at a time: they hold the solver's memory."""


class Trade(NamedTuple):
    """What may be kept at a `price` of seconds a byte, or else made again: the results of ops, for which each
    takes at least `again_s`, and of conversions."""

    price: float
    again_s: Mapping[int, float]


RelaxationOf = Callable[[Rows, frozenset[int]], Relaxation]


def relaxation(rows: Rows, variables: frozenset[int]) -> Relaxation:
    """The relaxation of the rows in which some of these variables are."""
    return Relaxation(rows.around(variables).model)


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
            ops_s = np.array([trade.again_s.get(part.op, 0.0) for part in self._parts.values()])
            least_s = np.where(self._is_conversion, self._conversions_again_s, ops_s)
            paid_s = paid_s + np.minimum(trade.price * self._result_bytes, least_s)
        key = paid_s.tobytes()
        if key not in self._known_s:
            relaxed = self.relaxation_of(self.ilp.rows, self._class)
            costs = np.zeros(relaxed.size.variables)
            costs[self._numbers] = paid_s
            self._known_s[key] = relaxed.least(costs.tolist())
            self.effort.solved("operator floors", relaxed.size)
        return self._known_s[key]

    @cached_property
    def _parts(self) -> Mapping[int, Part]:
        """What the variables that have a cost stand for."""
        graph = self.problem.graph
        read = {name for op in graph.ops[self.start : self.stop] for name in op.inputs}
        made = {name for op in graph.ops[self.start : self.stop] for name in op.outputs}
        return {
            variable: part
            for variable, part in self.ilp.parts.items()
            if part.op in self._ops
            and not (part.tensors and (made if part.is_made else read).isdisjoint(part.tensors.members))
        }

    @cached_property
    def _class(self) -> frozenset[int]:
        """The variables that have a cost for any block of the class."""
        return frozenset(variable for variable, part in self.ilp.parts.items() if part.op in self._ops)

    @cached_property
    def _numbers(self) -> NDArray[np.intp]:
        """Those that have one here, as the relaxation numbers them."""
        numbers = self.ilp.rows.around(self._class).numbers
        return np.array([numbers[variable] for variable in self._parts], dtype=np.intp)

    @cached_property
    def _time_s(self) -> Array:
        costs = self.ilp.model.costs
        return np.array([costs[variable] / part.num_instances for variable, part in self._parts.items()])

    @cached_property
    def _computed_s(self) -> Array:
        seconds = self.ilp.op_computed_s
        parts = self._parts.items()
        return np.array([seconds.get(variable, 0.0) / part.num_instances for variable, part in parts])

    @cached_property
    def _result_bytes(self) -> Array:
        return np.array([part.result_bytes for part in self._parts.values()])

    @cached_property
    def _is_conversion(self) -> Array:
        return np.array([part.tensors is not None for part in self._parts.values()])

    @cached_property
    def _conversions_again_s(self) -> Array:
        """The forward of each conversion, 0 for ops."""
        again_s = self.problem.conversion_again_s
        parts = self._parts.values()
        return np.array([again_s(part.tensors.name, *part.states) if part.tensors else 0.0 for part in parts])
