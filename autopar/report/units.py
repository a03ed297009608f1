"""Numbers as people read them, at three significant digits."""

from __future__ import annotations

_TIMES = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days"))


def seconds(value: float) -> str:
    """A duration: `87.5 us`, `12.3 ms`, `4.56 s`, then minutes from two, hours from two, days from two."""
    size, unit = _TIMES[0]
    for next_size, next_unit in _TIMES[1:]:
        if value < next_size * (1 if next_size <= 1 else 2):
            break
        size, unit = next_size, next_unit
    return f"{number(value / size)} {unit}" if value else "0 s"


def gigabytes(value: float) -> str:
    """Memory: `79.6 GB` of 10^9 bytes, as devices are sold; below that in MB."""
    return f"{value / 1e9:.1f} GB" if abs(value) >= 1e9 else f"{value / 1e6:.1f} MB"


def count(value: float) -> str:
    """A large number: `8.03 B` parameters, `1.5 T` tokens."""
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{number(value / size)}{suffix}"
    return number(value)


def flops_per_s(value: float) -> str:
    """A rate of arithmetic, in TFLOP/s, or GFLOP/s where that is small."""
    return f"{number(value / 1e12)} TFLOP/s" if value >= 1e12 else f"{number(value / 1e9)} GFLOP/s"


def bytes_per_s(value: float) -> str:
    """A bandwidth, in TB/s or GB/s."""
    return f"{number(value / 1e12)} TB/s" if value >= 1e12 else f"{number(value / 1e9)} GB/s"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """Three significant digits without an exponent; whole digits are never dropped."""
    if value == 0:
        return "0"
    digits = max(0, 3 - len(f"{abs(value):.0f}")) if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"
    return f"{value:,.0f}" if digits == 0 else text
