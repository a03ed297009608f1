"""Python expressions as text, and the arguments of an op as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs.ir import Op, Ref, Tensor

ATOM, POWER, UNARY, PRODUCT, SUM, SHIFT, AND, XOR, OR, COMPARE = range(10)
"""Binding strength, tightest first."""


@dataclass(frozen=True, slots=True)
class Expression:
    """Source text and how tightly its outermost operator binds."""

    text: str
    level: int = ATOM

    def within(self, level: int) -> str:
        """The text, in parentheses where it binds less tightly than `level` wants."""
        return self.text if self.level <= level else f"({self.text})"


Values = Mapping[str, Expression]


@dataclass(frozen=True)
class Call:
    """An op with its arguments as text."""

    op: Op
    values: Values
    tensors: Mapping[str, Tensor]
    sizes: Callable[[str], list[str]]

    def tensor(self, index: int, level: int = ATOM) -> str:
        """An operand, in parentheses where it binds less tightly than `level`."""
        return _operand(self.op.args[index], self.values, level)

    def arg(self, index: int, default: Any = None) -> Any:
        """An argument by position, or what it is when left out."""
        return self.op.args[index] if index < len(self.op.args) else default

    def dtype(self, index: int) -> torch.dtype:
        """The dtype of an operand."""
        return self.tensors[self.op.args[index].name].dtype

    def rest(self, start: int) -> list[str]:
        """Arguments from `start` on, and the keyword ones."""
        return arguments(self.op.args[start:], self.op.kwargs, self.values)


def tuple_of(items: Sequence[str]) -> str:
    """A tuple of expressions."""
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


MOST_EQUAL_ITEMS = 4
"""A list or tuple of more numbers, all equal, is written as a product."""


def literal(value: Any, values: Values) -> str:
    """A Python argument as source."""
    if isinstance(value, Ref):
        return values[value.name].text
    if isinstance(value, (list, tuple)):
        if len(value) > MOST_EQUAL_ITEMS and all(type(item) is int and item == value[0] for item in value):
            return f"{literal(value[:1], values)} * {len(value)}"
        items = ", ".join(literal(item, values) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'"{value}"'
    return str(value) if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) else repr(value)


def _operand(value: Any, values: Values, level: int) -> str:
    if isinstance(value, Ref):
        return values[value.name].within(level)
    text = literal(value, values)
    return f"({text})" if text.startswith("-") and level < SUM else text


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Values) -> list[str]:
    """Arguments of a call, the keyword ones last."""
    return [literal(arg, values) for arg in args] + [
        f"{key}={literal(arg, values)}" for key, arg in kwargs.items()
    ]


Writer = Callable[[Call], Expression | None]
"""Writes an op as an expression; None where its arguments are not what it knows."""
