"""Ops that make a tensor from nothing. What is alike everywhere may be split, its size is then local."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.build import WHOLE, make_rule, numbered
from graphs.rules.registry import aten, register
from graphs.rules.rule import Rule

Tensors = tuple[Tensor, ...]


@register(*aten("full.default zeros.default ones.default empty.memory_format rand.default randn.default"))
def uniform(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Every dimension is a factor. (Ranks that split random numbers draw their own.)"""
    fill = [[WHOLE] * len(tensor.shape) for tensor in operands]
    return make_rule(operands, results, fill, [numbered(len(results[0].shape))])


@register(*aten("new_full.default new_zeros.default new_ones.default new_empty.default"))
def uniform_like(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The operand gives only dtype and device; dimensions that agree with the result's are split."""
    result = numbered(len(results[0].shape))
    operand = [
        dim if extent == made else WHOLE
        for dim, extent, made in zip(result, operands[0].shape, results[0].shape, strict=False)
    ]
    operand += [WHOLE] * (len(operands[0].shape) - len(operand))
    others = [[WHOLE] * len(tensor.shape) for tensor in operands[1:]]
    return make_rule(operands, results, [operand, *others], [result])


@register(
    *aten("arange linspace logspace eye scalar_tensor tril_indices triu_indices randint randperm hann_window")
)
def counting(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Elements differ by their position in the whole: nothing is split."""
    return make_rule(
        operands,
        results,
        [[WHOLE] * len(tensor.shape) for tensor in operands],
        [[WHOLE] * len(tensor.shape) for tensor in results],
    )


@register("aten.meshgrid.indexing", "aten.meshgrid")
def meshgrid(op: Op, operands: Tensors, results: Tensors) -> Rule | None:
    """Each 1-D operand is repeated along the dimensions of the others."""
    if op.target == "aten.meshgrid.indexing" and op.kwargs.get("indexing", op.args[-1]) != "ij":
        return None
    dims = numbered(len(operands))
    sides = [[dim] if tensor.shape else [] for dim, tensor in zip(dims, operands, strict=True)]
    return make_rule(operands, results, sides, [dims] * len(results))
