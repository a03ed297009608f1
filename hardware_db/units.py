"""Unit conversions, applied once, where data enters the library. Everything inside is in SI units."""

from __future__ import annotations


def bytes_per_s_from_gbit(gbit_per_s: float) -> float:
    """Bytes per second of a line rate in gigabits per second, as network cards are sold."""
    return gbit_per_s * 1e9 / 8
