"""Lines below a frontier of bytes and seconds: what keeps less takes longer.

If a byte costs λ seconds, nothing costs less than h(λ), so what keeps b bytes takes at least h(λ) - λ b. Each
such line touches the frontier's convex hull somewhere; few of them follow it closely if the next price is
always the one at which two known points cost alike (Eisner and Severance, J. ACM 23, 1976).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

_ROUNDING = 1e-9

_CLOSE = 1e-3
"""How far lines may be below the hull to be close enough, as a part of the seconds."""


class Line(NamedTuple):
    """What keeps b bytes takes at least `seconds` - `price` b."""

    price: float
    seconds: float

    def seconds_at(self, num_bytes: float) -> float:
        return self.seconds - self.price * num_bytes


class Reached(NamedTuple):
    """A line, and the bytes with which something reaches it."""

    line: Line
    num_bytes: float

    @property
    def seconds(self) -> float:
        return self.line.seconds_at(self.num_bytes)


def lines_below(
    most: Reached, reached: Callable[[float], Reached], highest_price: float, number: int
) -> list[Line]:
    """Lines below the frontier between what keeps `most` and what is reached at the highest price, for which,
    and for `number` prices in all at most, it is asked what is `reached`."""
    least = reached(highest_price)
    found = [most.line, least.line]
    spans = [(most, least)]
    while len(found) <= number:
        span = max(spans, key=_slack_s)
        more, less = span
        if _slack_s(span) <= _CLOSE * less.seconds:
            break
        spans.remove(span)
        price = (less.seconds - more.seconds) / (more.num_bytes - less.num_bytes)
        between = reached(price)
        found.append(between.line)
        spans += [(more, between), (between, less)]
    return found


def _slack_s(span: tuple[Reached, Reached]) -> float:
    """How far two lines may be below the hull between where they are reached: where they cross."""
    more, less = span
    if more.num_bytes <= less.num_bytes or more.line.price >= less.line.price:
        return 0.0
    crossing = _crossing(more.line, less.line)
    price = (less.seconds - more.seconds) / (more.num_bytes - less.num_bytes)
    return more.seconds + price * (more.num_bytes - crossing) - more.line.seconds_at(crossing)


def _crossing(one: Line, other: Line) -> float:
    return (other.seconds - one.seconds) / (other.price - one.price)


def corners(lines: Iterable[Line], least: float, most: float) -> list[tuple[float, float]]:
    """Bytes and seconds where the highest of the lines cross between so many bytes, and at the `least`, from
    what keeps most to what keeps least."""
    lines = tuple(lines)

    def seconds(num_bytes: float) -> float:
        return max(line.seconds_at(num_bytes) for line in lines)

    found = {least}
    for one, other in combinations(lines, 2):
        if one.price == other.price:
            continue
        crossing = _crossing(one, other)
        if least < crossing < most and seconds(crossing) <= one.seconds_at(crossing) * (1 + _ROUNDING):
            found.add(crossing)
    return [(num_bytes, seconds(num_bytes)) for num_bytes in sorted(found, reverse=True)]
