"""A picture of predicted against measured step times, as SVG that needs nothing but a browser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from autopar.records.metrics import Accuracy, Row

SIDE, LEFT, TOP, BOTTOM, LEGEND = 640, 70, 40, 50, 280
BAND = 0.10
"""How far the shaded band reaches to either side of equality."""

TITLE = f"predicted step time, against measured (band: {100 * BAND:.0f} % either way)"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; groups beyond it change shape."""

SHAPES = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.3L4,3.2H-4z",
    "M0,-4.6L4.6,0L0,4.6L-4.6,0z",
)

Point = tuple[float, float]


def scatter_svg(accuracy: Accuracy) -> str:
    """Logarithmic axes, a mark for each row (its id and error on hover), colour and shape for each group."""
    rows = [row for row in accuracy.rows if _times_s(row) is not None]
    names = [group.name for group in accuracy.groups]
    times_s = [time_s for row in rows for time_s in _times_s(row) or ()]
    low = math.floor(math.log10(min(times_s, default=1.0)))
    high = max(math.ceil(math.log10(max(times_s, default=10.0))), low + 1)
    width, height = LEFT + SIDE + LEGEND, TOP + SIDE + BOTTOM
    body = [
        *_axes(low, high),
        *(_mark(row, names.index(row.record.group), low, high) for row in rows),
        *_legend(names),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _times_s(row: Row) -> Point | None:
    """Measured and predicted; for a row that tells no step time, of the step that was priced."""
    predicted_s, error = row.prediction.step_time_s, row.error
    return None if predicted_s is None or error is None else (predicted_s / (1 + error), predicted_s)


def _place(point: Point, low: int, high: int) -> Point:
    """Pixels of a point in seconds."""
    across, up = ((math.log10(value) - low) / (high - low) * SIDE for value in point)
    return LEFT + across, TOP + SIDE - up


def _axes(low: int, high: int) -> Iterator[str]:
    yield f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/></clipPath>'
    ends = 10.0**low, 10.0**high
    corners = [(ends[0], ends[0] * (1 + BAND)), (ends[1], ends[1] * (1 + BAND))]
    corners += [(ends[1], ends[1] * (1 - BAND)), (ends[0], ends[0] * (1 - BAND))]
    yield f'<polygon points="{_points(corners, low, high)}" fill="#e8e8e8" clip-path="url(#frame)"/>'
    yield f'<polyline points="{_points([(end, end) for end in ends], low, high)}" stroke="#999"/>'
    for power in range(low, high + 1):
        x, y = _place((10.0**power, 10.0**power), low, high)
        label = f"{10.0**power:g} s"
        yield f'<path d="M{x:.1f},{TOP}v{SIDE}M{LEFT},{y:.1f}h{SIDE}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{TOP + SIDE + 18}" text-anchor="middle">{label}</text>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    middle = LEFT + SIDE / 2
    yield f'<text x="{middle}" y="{TOP + SIDE + 40}" text-anchor="middle">measured step time</text>'
    yield f'<text x="{middle}" y="{TOP - 16}" text-anchor="middle" font-size="14">{TITLE}</text>'


def _points(points: Sequence[Point], low: int, high: int) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(point, low, high) for point in points))


def _mark(row: Row, group: int, low: int, high: int) -> str:
    x, y = _place(_times_s(row) or (1.0, 1.0), low, high)
    hover = f"{row.record.id}: {100 * (row.error or 0.0):+.1f} %"
    return (
        f'<path transform="translate({x:.1f},{y:.1f})" {_style(group)}><title>{escape(hover)}</title></path>'
    )


def _style(group: int) -> str:
    shape = SHAPES[group // len(COLOURS) % len(SHAPES)]
    return f'd="{shape}" fill="{COLOURS[group % len(COLOURS)]}" fill-opacity="0.7"'


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = LEFT + SIDE + 24
    for group, name in enumerate(names):
        y = TOP + 12 + 20 * group
        yield f'<path transform="translate({x},{y})" {_style(group)}/>'
        yield f'<text x="{x + 12}" y="{y + 4}">{escape(name)}</text>'
