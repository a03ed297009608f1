"""Finding the rule of an op, and registering rules for more ops.

from graphs import rules

@rules.register("mylib.scale_rows.default")
def scale_rows(op, operands, results):
    rows, columns = operands[0].shape
    matrix = ("r",), ("c",)
    return rules.Rule(
        sizes={"r": rows, "c": columns}, operands=(matrix, (("r",),)), results=(matrix,)
    )
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TypeVar

import torch

from graphs.errors import GraphError
from graphs.interpret import resolve
from graphs.ir import Op, OpGraph, Tensor
from graphs.rules.build import check
from graphs.rules.form import Call
from graphs.rules.rule import Rule

RuleFunction = Callable[[Op, tuple[Tensor, ...], tuple[Tensor, ...]], Rule | None]
F = TypeVar("F", bound=RuleFunction)

POINTWISE = "torch.Tag.pointwise"
"""The target that stands for all operators of any library with this tag and no rule of their own."""

_RULES: dict[str, RuleFunction] = {}  # filled by decorators while modules are imported, only read afterwards


class RuleError(GraphError):
    """A registered rule does not fit the op it was asked about."""


def register(*targets: str) -> Callable[[F], F]:
    """Decorator: the function gives the rule of ops with these targets.

    A target is an overload (`mylib.myop.default`) or all overloads of an operator (`mylib.myop`); the more
    special one wins, and a later registration replaces an earlier one. The function receives the op, its
    tensor operands in the order of `Op.inputs`, and its results; it returns the rule, or None where this form
    of the op has none. It is asked once for all ops that do the same (`graphs.rules.form`), so the rule may
    not depend on names, modules, operations or storages.
    """

    def decorate(function: F) -> F:
        for target in targets:
            _RULES[target] = function
        return function

    return decorate


def aten(names: str) -> tuple[str, ...]:
    """Targets of ATen operators from their names, separated by blanks."""
    return tuple(f"aten.{name}" for name in names.split())


def rule_for(op: Op, graph: OpGraph) -> Rule | None:
    """The sharding rule of an op of `graph`, None where none is known and the op can only be replicated.

    Raises `RuleError` where the registered rule disagrees with the shapes of the op's tensors.
    """
    function = _find(op.target)
    return None if function is None else _rule(function, Call.of(op, graph))


@lru_cache(maxsize=2048)
def _rule(function: RuleFunction, call: Call) -> Rule | None:
    op, operands, results = call.op, call.operands, call.results
    rule = function(op, operands, results)
    problem = check(rule, operands, results) if rule is not None else None
    if problem is not None:
        raise RuleError(
            f"the sharding rule of {op.target} does not fit {op.name}: {problem}; correct the rule"
        )
    return rule


def _find(target: str) -> RuleFunction | None:
    packet = target.rpartition(".")[0]
    function = _RULES.get(target) or _RULES.get(packet)
    return function or (_RULES.get(POINTWISE) if _is_pointwise(target) else None)


@cache
def _is_pointwise(target: str) -> bool:
    try:
        return torch.Tag.pointwise in resolve(target).tags
    except (AttributeError, ValueError):
        return False
