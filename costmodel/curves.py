"""How the time of an algorithm depends on its payload: a line, or a measured table.

Between two points (S1, t1) and (S2, t2) of a table, time is the power of the payload that passes through
both, t = t1 (S / S1)^p with p = log(t2/t1) / log(S2/S1): a straight line where both axes are logarithmic.
Below the first point nothing but latency is left, so time is the first point's; above the last the rate stays
the last point's.

A table also says how far the lines are off on its level: `corrected` carries that over to what was not
measured there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import log

from hardware_db import MeasuredCollective


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to run a collective: seconds = latency_s + num_bytes · s_per_byte."""

    name: str
    latency_s: float
    s_per_byte: float

    def time_s(self, num_bytes: float) -> float:
        """Seconds for a payload of `num_bytes`, counted as `Collective` counts it."""
        return self.latency_s + num_bytes * self.s_per_byte


@dataclass(frozen=True, slots=True)
class MeasuredAlgorithm(Algorithm):
    """A measured table in the place of a line.

    `latency_s` is the time of the smallest payload, `s_per_byte` that of a byte of the largest. Above
    `sizes[i - 1]` the time is factors[i] · num_bytes ** exponents[i].
    """

    sizes: tuple[float, ...]
    factors: tuple[float, ...]
    exponents: tuple[float, ...]

    @staticmethod
    def of(table: MeasuredCollective, name: str = "measured") -> MeasuredAlgorithm:
        """The algorithm that takes what the table says."""
        first_s, (last_bytes, last_s) = table.points[0][1], table.points[-1]
        exponents = [log(t2 / t1) / log(s2 / s1) for (s1, t1), (s2, t2) in pairwise(table.points)]
        factors = [t / s**p for (s, t), p in zip(table.points, exponents, strict=False)]
        return MeasuredAlgorithm(
            name,
            first_s,
            last_s / last_bytes,
            tuple(size for size, _ in table.points),
            (first_s, *factors, last_s / last_bytes),
            (0.0, *exponents, 1.0),
        )

    def time_s(self, num_bytes: float) -> float:
        piece = bisect_right(self.sizes, num_bytes)
        return float(self.factors[piece] * num_bytes ** self.exponents[piece])


def corrected(
    lines: Sequence[Algorithm], table: MeasuredCollective, own_lines: Sequence[Algorithm]
) -> MeasuredAlgorithm:
    """`lines` times what `table` measured over what its `own_lines` say, at the table's payloads."""
    sizes = [size for size, _ in table.points]
    times = (
        min(line.time_s(size) for line in lines) * measured_s / min(line.time_s(size) for line in own_lines)
        for size, measured_s in table.points
    )
    points = tuple(zip(sizes, accumulate(times, max), strict=True))
    return MeasuredAlgorithm.of(replace(table, points=points), "corrected lines")


def lower_envelope(lines: Iterable[Algorithm]) -> tuple[Algorithm, ...]:
    """Those lines that are fastest for some payload, by rising latency: a planner evaluates fewer."""
    kept: list[Algorithm] = []
    for line in sorted(lines, key=lambda a: (a.latency_s, a.s_per_byte)):
        if kept and line.s_per_byte >= kept[-1].s_per_byte:
            continue
        while len(kept) > 1 and _crossing_bytes(kept[-2], line) <= _crossing_bytes(kept[-2], kept[-1]):
            kept.pop()
        kept.append(line)
    return tuple(kept)


def _crossing_bytes(early: Algorithm, late: Algorithm) -> float:
    """The payload from which `late`, of the lower slope, is the faster."""
    return (late.latency_s - early.latency_s) / (early.s_per_byte - late.s_per_byte)
