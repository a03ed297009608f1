"""The error the cost model raises for input that has no price.

ValueError
└── CostModelError
"""

from __future__ import annotations


class CostModelError(ValueError):
    """An impossible request: a group that does not fit its cluster, an unknown schedule or optimizer policy,
    a negative amount of work. The message gives the numbers and what to change."""
