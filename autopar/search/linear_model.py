"""Linear programs with integers, held a column at a time: models of one form that differ in costs share the
rest, and a search keeps hundreds of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

Term = tuple[int, float]

Row = tuple[float, float, tuple[Term, ...]]
"""Limits, and the terms whose sum they are for."""

_TOLERANCE = 1e-6
"""How far a value may be from whole, and, in units of its largest term, a row from its limits."""


def _floats() -> array[float]:
    return array("d")


def _ints() -> array[int]:
    return array("i")


@dataclass(frozen=True, slots=True)
class Size:
    """How big a model is: its variables, its rows, and how many of the variables are integer."""

    variables: int
    rows: int
    integer: int


@dataclass
class Constraints:
    """The bounds of variables, `lower` and `upper`, and the rows: their limits, how many terms each has, and
    the terms of all, one row after the other, in each by variable. Once `is_closed` nothing can be added."""

    lower: array[float] = field(default_factory=_floats)
    upper: array[float] = field(default_factory=_floats)
    row_lower: array[float] = field(default_factory=_floats)
    row_upper: array[float] = field(default_factory=_floats)
    lengths: array[int] = field(default_factory=_ints)
    variables: array[int] = field(default_factory=_ints)
    coefficients: array[float] = field(default_factory=_floats)
    is_closed: bool = field(default=False, compare=False)
    compiled: object = field(default=None, compare=False, repr=False)
    """What a solver made of them, for the next time."""

    def add_variable(self, lower: float, upper: float) -> None:
        assert not self.is_closed, "bounds are shared"
        self.lower.append(lower)
        self.upper.append(upper)

    def add_row(self, lower: float, upper: float, terms: Sequence[Term]) -> None:
        assert not self.is_closed, "rows are shared"
        ordered = _in_order(terms)
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        self.lengths.append(len(ordered))
        self.variables.extend([variable for variable, _ in ordered])
        self.coefficients.extend([coefficient for _, coefficient in ordered])

    def rows(self) -> Iterator[Row]:
        """All rows, in the order in which they were added."""
        terms = zip(self.variables, self.coefficients, strict=True)
        for lower, upper, length in zip(self.row_lower, self.row_upper, self.lengths, strict=True):
            yield lower, upper, tuple([next(terms) for _ in range(length)])

    def opened(self) -> Constraints:
        """A copy to which more can be added."""
        return Constraints(
            self.lower[:], self.upper[:], self.row_lower[:], self.row_upper[:], self.lengths[:],
            self.variables[:], self.coefficients[:],
        )  # fmt: skip

    def are_met_by(self, values: Sequence[float]) -> bool:
        """Whether the values keep to all bounds and rows."""
        within = all(
            lower - _TOLERANCE <= value <= upper + _TOLERANCE
            for value, lower, upper in zip(values, self.lower, self.upper, strict=True)
        )
        return within and all(_is_within(row, values) for row in self.rows())


@dataclass
class LinearModel:
    """Minimise a linear cost over bounded variables under linear rows, built up by `variable` and `row` until
    it is solved or shares what it has."""

    costs: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    constraints: Constraints = field(default_factory=Constraints)

    def variable(
        self, cost: float = 0.0, lower: float = 0.0, upper: float = 1.0, *, integer: bool = False
    ) -> int:
        """Adds a variable and returns its index."""
        self.constraints.add_variable(lower, upper)
        self.costs.append(cost)
        self.integer.append(integer)
        return len(self.costs) - 1

    def row(self, lower: float, upper: float, terms: Iterable[Term]) -> None:
        """Requires `lower <= sum of coefficient * variable <= upper`; terms of one variable add up."""
        self.constraints.add_row(lower, upper, tuple(terms))

    def priced(self, costs: Sequence[float], *, relaxed: bool = False) -> LinearModel:
        """The same rows at other costs; no variable need be whole where `relaxed`. Bounds and rows are
        shared, so neither model can be added to any more."""
        self.constraints.is_closed = True
        integer = [False] * len(costs) if relaxed else self.integer
        return replace(self, costs=list(costs), integer=integer)

    def with_rows(self, rows: Iterable[Row]) -> LinearModel:
        """The same with more rows."""
        constraints = self.constraints.opened()
        for row in rows:
            constraints.add_row(*row)
        return replace(self, costs=list(self.costs), integer=list(self.integer), constraints=constraints)

    @property
    def size(self) -> Size:
        return Size(len(self.costs), len(self.constraints.lengths), sum(self.integer))

    def cost_of(self, values: Sequence[float]) -> float:
        return sum(cost * value for cost, value in zip(self.costs, values, strict=True))

    def is_met_by(self, values: Sequence[float]) -> bool:
        """Whether the values keep to all bounds and rows, and are whole where they must be."""
        return self.is_whole(values) and self.constraints.are_met_by(values)

    def is_whole(self, values: Sequence[float]) -> bool:
        """Whether they are whole where they must be."""
        pairs = zip(values, self.integer, strict=True)
        return all(abs(value - round(value)) <= _TOLERANCE for value, integer in pairs if integer)


def _in_order(terms: Sequence[Term]) -> list[Term]:
    """The terms of a row by variable, each once."""
    if len({index for index, _ in terms}) == len(terms):
        return sorted(terms)
    sums: dict[int, float] = {}
    for index, coefficient in terms:
        sums[index] = sums.get(index, 0.0) + coefficient
    return sorted(sums.items())


def _is_within(row: Row, values: Sequence[float]) -> bool:
    lower, upper, terms = row
    parts = [coefficient * values[index] for index, coefficient in terms]
    slack = _TOLERANCE * max((1.0, *map(abs, parts)))
    return lower - slack <= sum(parts) <= upper + slack
