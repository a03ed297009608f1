"""Lines below frontiers of bytes and seconds, against the points that frontiers are made of."""

from __future__ import annotations

import random

import pytest

from autopar.search.frontier import Line, Reached, corners, lines_below

Point = tuple[float, float]
"""Bytes and seconds."""

HIGHEST_PRICE = 100.0


def points(seed: int) -> list[Point]:
    """One that keeps most and is fastest, and others that keep less and take longer."""
    rng = random.Random(seed)
    return [(10.0, 1.0), *((rng.uniform(0, 9), rng.uniform(1, 9)) for _ in range(rng.randint(1, 12)))]


def lines_of(found: list[Point], number: int) -> tuple[list[Line], list[float]]:
    """The lines below these points, and the prices that were asked for."""
    asked = []

    def reached(price: float) -> Reached:
        asked.append(price)
        num_bytes, seconds = min(found, key=lambda point: point[1] + price * point[0])
        return Reached(Line(price, seconds + price * num_bytes), num_bytes)

    most_bytes, least_s = found[0]
    most = Reached(Line(0.0, least_s), most_bytes)
    return lines_below(most, reached, HIGHEST_PRICE, number), asked


@pytest.mark.parametrize("seed", range(40))
def test_no_point_is_below_a_line(seed) -> None:
    found = points(seed)
    for number in (1, 2, 4, 8):
        lines, asked = lines_of(found, number)
        assert 1 <= len(asked) <= number
        for num_bytes, seconds in found:
            assert all(line.seconds_at(num_bytes) <= seconds + 1e-9 for line in lines)


@pytest.mark.parametrize("seed", range(40))
def test_with_prices_enough_the_lines_meet_at_the_hull_s_corners(seed) -> None:
    """Which were worked out from every pair of points: nothing is below the line through two of them."""
    found = points(seed)
    least_bytes = min(num_bytes for num_bytes, _ in found)
    lines, _ = lines_of(found, 100)
    for num_bytes, seconds in corners(lines, least_bytes, 10.0):
        between = [
            ((num_bytes - b) * s + (a - num_bytes) * t) / (a - b)
            for a, s in found
            for b, t in found
            if b <= num_bytes <= a and a > b
        ]
        hull_s = min([*between, *(s for a, s in found if a == num_bytes)])
        assert seconds == pytest.approx(hull_s, rel=3e-3)


def test_no_price_is_asked_for_where_nothing_is_between() -> None:
    """Where the dearest memory changes nothing, or where what computes again seems no slower."""
    for other in ((10.0, 1.0), (12.0, 1.0), (12.0, 3.0), (4.0, 0.9), (10.0, 0.5)):
        asked: list[float] = []

        def reached(price: float, point: Point = other, asked: list[float] = asked) -> Reached:
            asked.append(price)
            return Reached(Line(price, point[1] + price * point[0]), point[0])

        lines = lines_below(Reached(Line(0.0, 1.0), 10.0), reached, HIGHEST_PRICE, 8)
        assert asked == [HIGHEST_PRICE]
        assert all(line.seconds_at(other[0]) <= max(other[1], 1.0) for line in lines)


def test_corners_go_from_what_keeps_most_to_what_keeps_least() -> None:
    lines = [Line(0.0, 1.0), Line(1.0, 4.0), Line(3.0, 6.0), Line(2.0, 4.9)]
    assert corners(lines, 0.0, 10.0) == [(3.0, 1.0), (1.0, 3.0), (0.0, 6.0)]
    assert corners(lines, 2.0, 10.0) == [(3.0, 1.0), (2.0, 2.0)]
    assert corners(lines, 0.0, 3.0) == [(1.0, 3.0), (0.0, 6.0)]
