"""What the rows of an axis's program depend on: which states are alike, not what they are.

Problems of one graph at several microbatch sizes mostly differ in prices alone. Then their forms are equal,
and so are their rows (`autopar.search.block_ilp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from autopar.placements import RP, RR, Partial, Shard, State
from autopar.search.axis_problem import AxisProblem, TensorClass
from autopar.strategies import Conversion

WHOLE, WHOLE_PARTIAL = 0, 1
"""The numbers of `RR` and `RP`."""

NO_MOVE, FREE, PAID = 0, 1, 2
"""Whether a tensor can be brought from one state to another, and for nothing."""


STAY = Conversion("stay", None, None)
"""Of a tensor that is in the wanted state already."""

Numbers = tuple[int, ...]
"""States by number."""


class Moves(NamedTuple):
    """The moves from some states to others: the time of each, None where there is no way, and its kind."""

    seconds: Sequence[float | None]
    kinds: tuple[int, ...]


class Slot(NamedTuple):
    """Column `column` of the strategies of the op at `place` among the representative ones: one of its
    operands, or after these one of its results."""

    place: int
    column: int


class Carried(NamedTuple):
    """A class of tensors: what makes it, unless the graph starts from it; in which states it may be stored if
    it is a parameter; who reads it. `moves` leads from each state `given` to each one that is `wanted`."""

    producer: Slot | None
    stored: Numbers | None
    readers: tuple[Slot, ...]
    given: Numbers
    wanted: Numbers
    moves: tuple[int, ...]


@dataclass(frozen=True)
class AxisForm:
    """What the rows depend on.

    States go by number. `choices` has the strategies of each representative op, each with the states of all
    operands and results, and `tensors` what is made and read; `shards` are the states that are shards,
    `partial_gradients` those with terms of a gradient.
    """

    choices: tuple[tuple[Numbers, ...], ...]
    tensors: tuple[Carried, ...]
    shards: frozenset[int]
    partial_gradients: frozenset[int]


class FormedProblem:
    """A problem by its `form`, with the `states` by number and for each class of tensors the time of every
    move."""

    def __init__(self, problem: AxisProblem) -> None:
        self._problem = problem
        self._numbers: dict[State, int] = {RR: WHOLE, RP: WHOLE_PARTIAL}
        self._places = {index: place for place, index in enumerate(problem.instances)}
        choices = tuple([self._choices(index) for index in problem.instances])
        self._distinct = [
            [tuple(dict.fromkeys(column)) for column in zip(*strategies, strict=True)]
            for strategies in choices
        ]
        stored = {
            tensors.name: tuple([self._number(state) for state in problem.stored_states(tensors)])
            for tensors in problem.parameter_classes
        }
        self.states: Sequence[State] = tuple(self._numbers)
        self._conversions: dict[tuple[bool, Numbers, Numbers], tuple[Conversion | None, ...]] = {}
        self._moves: dict[tuple[int, bool, Numbers, Numbers], Moves] = {}
        self.moves_s: list[Sequence[float | None]] = []
        carried = [self._carried(tensors, stored.get(tensors.name)) for tensors in problem.tensor_classes]
        self.form = AxisForm(
            choices,
            tuple(carried),
            frozenset(n for n, state in enumerate(self.states) if isinstance(state.value, Shard)),
            frozenset(n for n, state in enumerate(self.states) if isinstance(state.grad, Partial)),
        )

    def _number(self, state: State) -> int:
        return self._numbers.setdefault(state, len(self._numbers))

    def _choices(self, index: int) -> tuple[Numbers, ...]:
        number = self._number
        return tuple(
            [
                tuple([number(state) for state in (*strategy.operands, *strategy.results)])
                for strategy in self._problem.offered[index]
            ]
        )

    def _carried(self, tensors: TensorClass, stored: Numbers | None) -> Carried:
        ops, producer = self._problem.graph.ops, None
        if tensors.producer is not None:
            index, result = tensors.producer
            producer = Slot(self._places[index], len(ops[index].inputs) + result)
        readers = tuple([Slot(self._places[reader.op], reader.position) for reader in tensors.readers])
        given = stored or (self._distinct[producer.place][producer.column] if producer else (WHOLE,))
        asked = [number for slot in readers for number in self._distinct[slot.place][slot.column]]
        wanted = tuple(dict.fromkeys(asked))
        moves = self._moves_of(tensors.name, given, wanted)
        self.moves_s.append(moves.seconds)
        return Carried(producer, stored, readers, given, wanted, moves.kinds)

    def _moves_of(self, name: str, given: Numbers, wanted: Numbers) -> Moves:
        """The moves of a tensor, the same for all like it."""
        tensor = self._problem.graph.tensors[name]
        alike = tensor.num_bytes, tensor.requires_grad, given, wanted
        if alike not in self._moves:
            conversions = self._conversions_of(*alike[1:])
            seconds_of: dict[Conversion | None, float | None] = {None: None, STAY: 0.0}
            for how in conversions:
                if how is not None and how not in seconds_of:
                    seconds_of[how] = self._problem.move_s(how, tensor.num_bytes)
            seconds = tuple([seconds_of[how] for how in conversions])
            kinds = tuple([NO_MOVE if cost is None else PAID if cost else FREE for cost in seconds])
            self._moves[alike] = Moves(seconds, kinds)
        return self._moves[alike]

    def _conversions_of(
        self, requires_grad: bool, given: Numbers, wanted: Numbers
    ) -> tuple[Conversion | None, ...]:
        """How to get from each state to each other."""
        alike = requires_grad, given, wanted
        if alike not in self._conversions:
            of, states = self._problem.conversion, self.states
            self._conversions[alike] = tuple(
                [
                    STAY if p == q else of(states[p], states[q], requires_grad)
                    for p, q in product(given, wanted)
                ]
            )
        return self._conversions[alike]
