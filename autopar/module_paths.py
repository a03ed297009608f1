"""Paths of modules as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def module_ranges(paths: Iterable[str]) -> tuple[str, ...]:
    """Paths with runs of consecutive numbers written as ranges: `model.layers.0-15`. The root's own ops go
    unnamed."""
    found: list[tuple[str, int, int, str]] = []
    for path in dict.fromkeys(paths):
        match = re.fullmatch(r"(.*?)(\d+)", path)
        if match is None:
            if path:
                found.append((path, -1, -1, ""))
            continue
        prefix, number = match[1], int(match[2])
        if found and found[-1][0] == prefix and found[-1][2] == number - 1:
            found[-1] = (prefix, found[-1][1], number, "")
        else:
            found.append((prefix, number, number, ""))
    return tuple(
        prefix if first < 0 else f"{prefix}{first}" if first == last else f"{prefix}{first}-{last}"
        for prefix, first, last, _ in found
    )
