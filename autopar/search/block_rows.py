"""The rows of an axis's program, without its costs: those that `autopar.search.block_ilp` states, made once
for all problems of a form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.search.axis_form import (
    FREE,
    NO_MOVE,
    PAID,
    WHOLE,
    WHOLE_PARTIAL,
    AxisForm,
    Carried,
    Slot,
)
from autopar.search.linear_model import LinearModel, Term


class Move(NamedTuple):
    """A variable that pays for a move, by its `number` among those of a class of tensors, for one of its
    readers or, if all share it, the first."""

    variable: int
    tensors: int
    reader: int
    number: int


@dataclass(frozen=True, eq=False)
class Around:
    """Some rows of a program, and their `variables`, in order, by their numbers in the whole."""

    model: LinearModel
    variables: NDArray[np.intp]

    def numbers(self, variables: Sequence[int]) -> NDArray[np.intp]:
        """The numbers that variables of the whole have here, where all of them are."""
        found = np.searchsorted(self.variables, variables)
        assert np.array_equal(self.variables.take(found, mode="clip"), variables)
        return found


@dataclass(frozen=True, eq=False)
class Rows:
    """The program of a form, without its costs; nothing may be added to `model`. `x` are the variables of
    each op, which come first, `y` those of each parameter by state."""

    model: LinearModel
    x: Sequence[range]
    y: Sequence[Mapping[int, int]]
    moves: Sequence[Move]
    _around: dict[frozenset[int], Around] = field(default_factory=dict, repr=False)

    def around(self, variables: frozenset[int]) -> Around:
        """The rows in which some of these variables are: made once, as blocks of a model are few."""
        if variables not in self._around:
            constraints = self.model.constraints
            rows = [row for row in constraints.rows() if any(variable in variables for variable, _ in row[2])]
            touched = sorted({variable for _, _, terms in rows for variable, _ in terms})
            numbers = {variable: number for number, variable in enumerate(touched)}
            model = LinearModel()
            for variable in touched:
                model.variable(0.0, constraints.lower[variable], constraints.upper[variable])
            for lower, upper, terms in rows:
                model.row(lower, upper, [(numbers[variable], factor) for variable, factor in terms])
            self._around[variables] = Around(model, np.array(touched, dtype=np.intp))
        return self._around[variables]


@lru_cache(maxsize=16)
def rows_of(form: AxisForm) -> Rows:
    """The rows of all problems that have this form."""
    made = _RowMaker(form)
    return Rows(made.model, made.x, tuple(made.y.values()), made.moves)


class _RowMaker:
    """A program as it is made: its variables and rows by op, then by parameter, then by what is carried."""

    def __init__(self, form: AxisForm) -> None:
        self.form = form
        self.model = LinearModel()
        self.x = [self._choose(len(strategies)) for strategies in form.choices]
        self.slots: dict[Slot, dict[int, list[int]]] = {}
        self.y = {
            number: self._store(tensors, tensors.stored)
            for number, tensors in enumerate(form.tensors)
            if tensors.stored is not None
        }
        self.moves: list[Move] = []
        for number, tensors in enumerate(form.tensors):
            self._carry(number, tensors)

    def _choose(self, count: int) -> range:
        variables = range(len(self.model.costs), len(self.model.costs) + count)
        for _ in variables:
            self.model.variable(integer=True)
        self.model.row(1, 1, [(variable, 1.0) for variable in variables])
        return variables

    def _store(self, tensors: Carried, states: tuple[int, ...]) -> dict[int, int]:
        found = {state: self.model.variable(integer=True) for state in states}
        self.model.row(1, 1, [(variable, 1.0) for variable in found.values()])
        self._store_as_asked(tensors, found)
        return found

    def _store_as_asked(self, tensors: Carried, stored: Mapping[int, int]) -> None:
        """The rule of `autopar.strategies.stored_state` as rows: a shard if all ask it, and a partial
        gradient if, and only if, some reader gives one."""
        asks = [self._by_state(reader) for reader in tensors.readers]
        for state, variable in stored.items():
            if state in self.form.shards:
                for ask in asks:
                    self.model.row(0, 1, [*((x, 1.0) for x in ask.get(state, ())), (variable, -1.0)])
        if WHOLE_PARTIAL not in stored:
            return
        giving = self.form.partial_gradients
        partial = [[x for state, xs in ask.items() if state in giving for x in xs] for ask in asks]
        everyone = ((x, 1.0) for xs in partial for x in xs)
        self.model.row(0, len(asks), [*everyone, (stored[WHOLE_PARTIAL], -1.0)])
        for xs in partial:
            self.model.row(0, 1, [(stored[WHOLE], 1.0), *((x, 1.0) for x in xs)])

    def _carry(self, number: int, tensors: Carried) -> None:
        give = self._give(number, tensors)
        if all(move == FREE for move in tensors.moves):
            return  # every state can be had for nothing
        asks = [self._by_state(reader) for reader in tensors.readers]
        numbers = {pair: at for at, pair in enumerate(product(tensors.given, tensors.wanted))}
        shared: dict[int, int] = {}
        if len(asks) > 1:
            for at, move in enumerate(tensors.moves):
                if move == PAID:
                    shared[at] = self._paid(number, 0, at)
        for reader, ask in enumerate(asks):
            out: dict[int, list[Term]] = {state: [(x, -1.0) for x in xs] for state, xs in give.items()}
            into: dict[int, list[Term]] = {state: [(x, -1.0) for x in xs] for state, xs in ask.items()}
            for made, state in product(give, ask):
                at = numbers[made, state]
                if tensors.moves[at] == NO_MOVE:
                    continue
                is_paid = tensors.moves[at] == PAID and at not in shared
                flow = self._paid(number, reader, at) if is_paid else self.model.variable()
                out[made].append((flow, 1.0))
                into[state].append((flow, 1.0))
                if at in shared:
                    self.model.row(0, 1, [(shared[at], 1.0), (flow, -1.0)])
            for terms in (*out.values(), *into.values()):
                self.model.row(0, 0, terms)

    def _paid(self, tensors: int, reader: int, number: int) -> int:
        variable = self.model.variable()
        self.moves.append(Move(variable, tensors, reader, number))
        return variable

    def _give(self, number: int, tensors: Carried) -> Mapping[int, Sequence[int]]:
        if number in self.y:
            return {state: (variable,) for state, variable in self.y[number].items()}
        if tensors.producer is None:
            return {WHOLE: (self.model.variable(lower=1.0),)}
        return self._by_state(tensors.producer)

    def _by_state(self, slot: Slot) -> Mapping[int, Sequence[int]]:
        """The variables of an op by the state of an operand or result."""
        if slot not in self.slots:
            found: dict[int, list[int]] = {}
            for states, variable in zip(self.form.choices[slot.place], self.x[slot.place], strict=True):
                found.setdefault(states[slot.column], []).append(variable)
            self.slots[slot] = found
        return self.slots[slot]
