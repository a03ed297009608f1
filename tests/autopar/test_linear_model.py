"""Linear models: their rows in columns, and what models share."""

from __future__ import annotations

from math import inf

import pytest

from autopar.search.linear_model import LinearModel, Size
from autopar.search.solver import solve


def two_of_three() -> LinearModel:
    """At least two of three, the last of which counts twice in another row."""
    model = LinearModel()
    x, y, z = (model.variable(cost, integer=True) for cost in (1.0, 2.0, 4.0))
    model.row(2, inf, [(z, 1.0), (x, 1.0), (y, 1.0)])
    model.row(-inf, 3, [(z, 1.0), (x, 1.0), (z, 1.0)])
    return model


def test_rows_are_what_was_added_by_variable() -> None:
    rows = [*two_of_three().constraints.rows()]
    assert rows == [(2, inf, ((0, 1.0), (1, 1.0), (2, 1.0))), (-inf, 3, ((0, 1.0), (2, 2.0)))]


def test_more_rows_leave_the_first_model_as_it_was() -> None:
    model = two_of_three()
    before = solve(model)
    more = model.with_rows([(-inf, 0, ((0, 1.0),))])
    assert solve(more).values == pytest.approx((0.0, 1.0, 1.0))
    assert (model.size, more.size) == (Size(3, 2, 3), Size(3, 3, 3))
    assert solve(model).values == before.values == pytest.approx((1.0, 1.0, 0.0))


def test_models_with_other_costs_share_all_else() -> None:
    model = two_of_three()
    other = model.priced([4.0, 2.0, 1.0])
    assert other.constraints is model.constraints
    assert solve(other).values == pytest.approx((0.0, 1.0, 1.0))
    assert solve(model).values == pytest.approx((1.0, 1.0, 0.0))


def test_what_is_shared_or_was_solved_stays_as_it_is() -> None:
    priced, solved = two_of_three(), two_of_three()
    priced.priced([0.0] * 3)
    solve(solved)
    for model in (priced, solved):
        with pytest.raises(AssertionError, match="bounds are shared"):
            model.variable()
        with pytest.raises(AssertionError, match="rows are shared"):
            model.row(0, 1, [(0, 1.0)])


@pytest.mark.parametrize(
    ("values", "is_met"),
    [((1, 1, 0), True), ((1, 0, 0), False), ((1, 0, 1), True), ((0.5, 1, 0.5), False), ((2, 0, 0), False)],
)
def test_values_keep_to_bounds_rows_and_whole_numbers(values: tuple[float, ...], is_met: bool) -> None:
    assert two_of_three().is_met_by(values) == is_met
