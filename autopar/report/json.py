"""The report as JSON: every figure of the view under its name, units in the keys."""

from __future__ import annotations

import json
from dataclasses import asdict

from autopar.report.values import Report


def render(report: Report) -> str:
    """Indented JSON, the same bytes for the same report."""
    return json.dumps(asdict(report), indent=2, allow_nan=False) + "\n"
