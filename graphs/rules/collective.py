"""Collectives and split ops of a program that has been localized over other mesh axes.

On a further axis a collective acts like the identity on every dimension that it does not move, and is linear.
A split lookup, loss or attention keeps the rule of the op it stands for, without the factor that is split
already.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from graphs.ir import Op, Tensor
from graphs.rules.attention import attention
from graphs.rules.build import make_rule, numbered, without
from graphs.rules.embedding import embedding
from graphs.rules.loss import cross_entropy
from graphs.rules.normalization import batch_norm
from graphs.rules.registry import register
from graphs.rules.rule import Rule

Tensors = tuple[Tensor, ...]

_COLLECTIVES = (
    "all_gather all_gather_replicated reduce_scatter all_reduce all_reduce_partial shard shard_partial"
    " all_to_all copy first_only first_grad"
)


@register(*(f"autopar.{name}" for name in _COLLECTIVES.split()))
def collective(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The identity on all dimensions but those it gathers or cuts, the integers after the tensor."""
    moved = [argument for argument in op.args[1:] if isinstance(argument, int)]
    dims = without(numbered(len(operands[0].shape)), moved, keep=True)
    linear = ((0,),) if operands[0].dtype.is_floating_point else ()
    return make_rule(operands, results, [dims], [dims], linear=linear)


@register("autopar.embedding")
def split_embedding(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A lookup in a table whose rows are split already."""
    rule = embedding(_plain(op, "aten.embedding.default", {"vocab_axis"}), operands, results)
    return _without_splitting(rule, {"v"})


@register("autopar.cross_entropy")
def split_cross_entropy(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A loss whose rows or classes are split already: the other of the two still can be."""
    rows = {f"d{index}" for index in range(len(operands[0].shape) - 1)}
    axes = {"row_axes": rows, "class_axis": {"c"}}
    rule = cross_entropy(_plain(op, "aten.cross_entropy_loss.default", axes.keys()), operands, results)
    return _without_splitting(rule, set().union(*(axes[axis] for axis in axes.keys() & op.kwargs.keys())))


@register("autopar.scaled_dot_product_attention")
def split_attention(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Causal attention whose rows are split already: samples and heads still can be."""
    plain = _plain(op, "aten.scaled_dot_product_attention.default", {"row_axis", "zigzag"})
    return attention(plain, operands, results)


@register("autopar.batch_norm")
def split_batch_norm(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A batch norm whose samples are split already: channels still can be."""
    rule = batch_norm(_plain(op, "aten.batch_norm.default", {"row_axis"}), operands, results)
    return _without_splitting(rule, {"n"})


def _plain(op: Op, target: str, axes: Collection[str]) -> Op:
    return replace(
        op, target=target, kwargs={key: value for key, value in op.kwargs.items() if key not in axes}
    )


def _without_splitting(rule: Rule, split: set[str]) -> Rule:
    return replace(
        rule,
        unsplittable=rule.unsplittable | (split & rule.sizes.keys()),
        reductions=rule.reductions - split,
        implemented={factor: form for factor, form in rule.implemented.items() if factor not in split},
        whole=rule.whole - split,
    )
