"""Explain a plan: a view of it with every figure worked out, and renderers that only print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from autopar.errors import AutoparError
from autopar.plan import Plan
from autopar.report import json, text
from autopar.report.values import Report
from autopar.report.view import view

__all__ = ["FORMATS", "Report", "explain", "view"]

FORMATS: Mapping[str, Callable[[Report], str]] = MappingProxyType({"text": text.render, "json": json.render})
"""Renderer by name: a report as text that ends in a newline."""


def explain(plan: Plan, token_budget: float | None = None, format: str = "text") -> str:
    """The plan explained, as "text" or "json"; with `token_budget`, how long that many tokens take.

    Raises AutoparError for an unknown format or a budget that is not positive.
    """
    if format not in FORMATS:
        raise AutoparError(f"unknown report format {format!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format](view(plan, token_budget))
