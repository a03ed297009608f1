"""Sharding rules: how each op may be split.

`rule_for(op, graph)` answers; `register` adds rules for more ops. Each module holds the rules of one kind of
op.
"""

from __future__ import annotations

from graphs.rules import (
    attention,
    collective,
    conv,
    embedding,
    factory,
    index,
    loss,
    matmul,
    moe,
    normalization,
    pointwise,
    recurrent,
    reduce,
    reshape,
    sections,
    view,
)
from graphs.rules.registry import RuleError, register, rule_for
from graphs.rules.rule import Dim, Rule

__all__ = ["Dim", "Rule", "RuleError", "register", "rule_for"]

_RULES_OF = (  # importing a module registers its rules
    attention,
    collective,
    conv,
    embedding,
    factory,
    index,
    loss,
    matmul,
    moe,
    normalization,
    pointwise,
    recurrent,
    reduce,
    reshape,
    sections,
    view,
)
