"""Mixture of experts: products of rows with the matrix of their expert."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, make_rule
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


@register("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(op: Op, operands: Tensors, results: Tensors) -> Rule | None:
    """Mixture of experts: rows `[t, k]`, sorted by expert, times `[e, k, n]` of their expert -> `[t, n]`.

    Which rows belong to which expert is in the offsets, so neither rows nor experts can be split by shape
    alone.
    """
    args = arguments(op)
    if len(operands[0].shape) != 2 or len(operands[1].shape) != 3 or args.values.get("bias") is not None:
        return None
    offsets: list[list[Dim]] = [[WHOLE] * len(tensor.shape) for tensor in operands[2:]]
    return make_rule(
        operands,
        results,
        [[("t",), ("k",)], [("e",), ("k",), ("n",)], *offsets],
        [[("t",), ("n",)]],
        reductions=("k",),
        unsplittable=("t", "e"),
        linear=((0,), (1,)),
    )
