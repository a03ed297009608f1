from __future__ import annotations

import pytest

from costmodel import Algorithm, MeasuredAlgorithm
from costmodel.curves import corrected, lower_envelope
from hardware_db import HardwareError, MeasuredCollective
from hardware_db.transport import bus_factor

TABLE = MeasuredCollective("all_reduce", (8,), ((1e6, 1e-4), (1e7, 1e-4), (1e8, 1e-3), (1e9, 1e-2)))


def test_a_table_is_met_at_its_points_and_straight_between_their_logarithms() -> None:
    curve = MeasuredAlgorithm.of(TABLE)
    for size, seconds in TABLE.points:
        assert curve.time_s(size) == pytest.approx(seconds)
    assert curve.time_s(3e6) == pytest.approx(1e-4)
    assert curve.time_s(3e7) == pytest.approx(3e-4)
    steep = MeasuredAlgorithm.of(MeasuredCollective("all_reduce", (8,), ((1.0, 1.0), (100.0, 10.0))))
    assert steep.time_s(10.0) == pytest.approx(10**0.5)


def test_outside_a_table_latency_and_rate_stay() -> None:
    curve = MeasuredAlgorithm.of(TABLE)
    assert curve.time_s(0) == curve.time_s(1) == curve.latency_s == 1e-4
    assert curve.time_s(1e12) == pytest.approx(1e12 * curve.s_per_byte) == pytest.approx(10.0)


def test_a_correction_carries_the_error_of_the_lines_over() -> None:
    own = [Algorithm("ring", 5e-5, 1e-11)]
    (half,) = [Algorithm("smaller ring", 2.5e-5, 0.5e-11)]
    curve = corrected([half], TABLE, own)
    assert [curve.time_s(size) for size, _ in TABLE.points[1:]] == pytest.approx([0.5e-4, 0.5e-3, 0.5e-2])
    assert corrected(own, TABLE, own).time_s(5e7) == pytest.approx(MeasuredAlgorithm.of(TABLE).time_s(5e7))


def test_the_envelope_has_the_fastest_line_for_every_payload_and_no_other() -> None:
    lines = [
        Algorithm(f"{a}", a * 1e-6, b * 1e-12)
        for a, b in [(1, 9), (3, 8), (4, 4), (20, 3.9), (30, 1), (30, 5)]
    ]
    kept = lower_envelope(lines)
    sizes = [10.0**exponent for exponent in range(12)]
    for size in sizes:
        assert min(a.time_s(size) for a in kept) == min(a.time_s(size) for a in lines)
    assert [a.name for a in kept] == ["1", "4", "30"]


def test_bus_bandwidth_becomes_seconds() -> None:
    table = MeasuredCollective.from_bus_bandwidth("all_reduce", (8, 4), ((1e6, 1e9), (1e9, 400e9)))
    assert table.points[1][1] == pytest.approx(2 * 31 / 32 * 1e9 / 400e9)
    assert bus_factor("all_gather", 8) == 7 / 8
    assert bus_factor("broadcast", 8) == 1


def test_noise_never_makes_a_larger_payload_cheaper() -> None:
    table = MeasuredCollective.from_bus_bandwidth("broadcast", (8,), ((1e6, 1e9), (1.1e6, 2e9), (1e9, 2e9)))
    assert table.points[1][1] == table.points[0][1] == 1e-3


@pytest.mark.parametrize("points", [((1.0, 1.0),), ((2.0, 1.0), (1.0, 2.0)), ((1.0, 2.0), (2.0, 1.0))])
def test_a_table_rises(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(HardwareError, match="payloads above 0 that rise"):
        MeasuredCollective("all_reduce", (8,), points)
