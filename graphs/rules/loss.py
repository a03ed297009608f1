"""Losses: the terms of a sum may be split; a mean needs their number, a cross-entropy its normalizer."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import aligned, factors, make_rule, numbered
from graphs.rules.registry import aten, register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]

NONE, MEAN, SUM = 0, 1, 2
"""torch's numbers of the reductions (`torch.nn._reduction`)."""


@register("aten.cross_entropy_loss.default")
def cross_entropy(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`logits[n, c, ...], target[n, ...]`.

    Of a mean over rows only those count whose target is not ignored, so ranks share that count. With the
    classes split, ranks share maximum and sum of exponentials of each row, and all of them get the whole
    loss. Both forms know plain class indices without class weights, the second only classes that come last.
    """
    args = arguments(op)
    logits, target = operands[0], operands[1]
    indices = not target.dtype.is_floating_point
    rows = numbered(len(logits.shape) - 1)
    class_dim: list[Dim] = [("c",)]
    dims = [*rows[:1], *class_dim, *rows[1:]] if rows else class_dim
    plain = indices and args.operand("weight") is None and len(logits.shape) > 1
    form: dict[str, str] = {}
    if plain and args["reduction"] != NONE:
        if len(logits.shape) == 2:
            form["c"] = "vocab_parallel_cross_entropy"
        if args["reduction"] == MEAN:
            form |= dict.fromkeys(factors(rows), "cross_entropy_rows")
    return make_rule(
        operands,
        results,
        args.in_order({"self": dims, "target": rows if indices else dims, "weight": class_dim}),
        [rows if args["reduction"] == NONE else []],
        reductions=factors(rows) if args["reduction"] == SUM or "d0" in form else (),
        unsplittable=({"c"} - form.keys())
        | (factors(rows) if args["reduction"] == MEAN and not plain else set()),
        implemented=form,
        whole=form.keys() & {"c"},
    )


@register("aten.nll_loss_nd", "aten.nll_loss", "aten.nll_loss2d")
def nll_loss(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`log_probabilities[n, c, ...], target[n, ...]`; a mean counts what is not ignored."""
    args = arguments(op)
    rows = numbered(len(operands[0].shape) - 1)
    dims: list[Dim] = [*rows[:1], ("c",), *rows[1:]]
    reduction = args["reduction"]
    return make_rule(
        operands,
        results,
        args.in_order({"self": dims, "target": rows, "weight": [("c",)]}),
        [rows if reduction == NONE else []],
        reductions=factors(rows) if reduction == SUM else (),
        unsplittable={"c"} | (set(factors(rows)) if reduction == MEAN else set()),
        linear=args.linear_in(("self",)),
    )


_ELEMENTWISE = (
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div"
    " soft_margin_loss poisson_nll_loss hinge_embedding_loss"
)


@register(*aten(_ELEMENTWISE))
def elementwise_loss(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A term for each element of the broadcast operands, then none, mean or sum."""
    reduction = arguments(op)["reduction"]
    dims = numbered(max(len(tensor.shape) for tensor in operands))
    reduced = frozenset[str]() if reduction == NONE else factors(dims)
    return make_rule(
        operands,
        results,
        [aligned(dims, len(tensor.shape)) for tensor in operands],
        [dims if reduction == NONE else []],
        reductions=reduced,
        implemented=dict.fromkeys(reduced, "mean") if reduction == MEAN else {},
    )
