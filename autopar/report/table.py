"""Aligned columns in plain text."""

from __future__ import annotations

from collections.abc import Sequence

INDENT = "  "

Row = Sequence[str]


def table(rows: Sequence[Row], *, right: Sequence[int] = (), indent: str = INDENT) -> list[str]:
    """The rows as lines with aligned columns, those in `right` to the right; no trailing blanks."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths, right, indent) for row in rows]


def _line(row: Row, widths: Sequence[int], right: Sequence[int], indent: str) -> str:
    cells = (
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return (indent + "  ".join(cells)).rstrip()
