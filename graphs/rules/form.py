"""What an op does, whatever its tensors are called: ops of one form have one rule."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphs.ir import Op, OpGraph, Ref, Tensor

_PLAIN = frozenset({int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
"""Types of arguments that are compared by themselves."""

_PRINTED = frozenset({float, complex})
"""Types that are compared by how they print, as nan does not equal itself. All others are like nothing else.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """An op with its tensors, operands in the order of `Op.inputs`. Those of one form are equal: the same
    target, arguments, `rows` and `window`, for operands and results of the same shapes, dtypes and gradients.
    """

    form: Hashable
    op: Op = field(compare=False)
    operands: tuple[Tensor, ...] = field(compare=False)
    results: tuple[Tensor, ...] = field(compare=False)

    @staticmethod
    def of(op: Op, graph: OpGraph) -> Call:
        """The call that an op of `graph` is."""
        operands = tuple([graph.tensors[name] for name in op.inputs])
        results = tuple([graph.tensors[name] for name in op.outputs])
        form: list[object] = [op.target, op.rows, op.window]
        numbers: dict[str, int] = {}
        _describe(op.args, numbers, form)
        _describe(op.kwargs, numbers, form)
        for tensor in (*operands, *results):
            form += tensor.shape, tensor.dtype, tensor.requires_grad
        return Call(tuple(form), op, operands, results)


def _describe(value: Any, numbers: dict[str, int], form: list[object]) -> None:
    """Add nested arguments to a form, tensors by their numbers in order of appearance."""
    kind = type(value)
    if kind in _PLAIN:
        form += kind, value
    elif kind is Ref:
        form += Ref, numbers.setdefault(value.name, len(numbers))
    elif isinstance(value, (tuple, list)):
        form += kind, len(value)
        for item in value:
            _describe(item, numbers, form)
    elif isinstance(value, Mapping):
        form += dict, len(value)
        for key, item in value.items():
            form.append(key)
            _describe(item, numbers, form)
    elif kind in _PRINTED:
        form += kind, str(value)
    else:
        form.append(object())
