"""Ops along dimensions: sums and means, which may be split, and what has to see a dimension whole."""

from __future__ import annotations

from collections.abc import Sequence

from graphs.ir import Op, Tensor
from graphs.rules.arguments import Arguments, arguments
from graphs.rules.build import WHOLE, chosen_dims, factors, make_rule, numbered, without
from graphs.rules.registry import aten, register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


@register("aten.sum", "aten.mean", "aten.nansum", "aten.count_nonzero")
def add_up(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Terms of a sum are added up over the ranks; those of a mean are divided by their number first."""
    dims, reduced, result = _reduced(op, operands)
    split = factors(dims[dim] for dim in reduced)
    mean = op.target.startswith("aten.mean")
    additive = op.target.startswith(("aten.sum", "aten.mean")) and operands[0].dtype.is_floating_point
    return make_rule(
        operands,
        results,
        [dims],
        [result],
        reductions=split,
        linear=((0,),) if additive else (),
        implemented=dict.fromkeys(split, "mean") if mean else {},
    )


_NOT_ADDITIVE = (
    "amax amin aminmax max min prod any all logsumexp var std var_mean std_mean argmax argmin norm"
    " linalg_vector_norm median nanmedian mode kthvalue nanmean frobenius_norm"
)


@register(*aten(_NOT_ADDITIVE))
def reduce_whole(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Reductions whose parts do not simply add up: the reduced dimensions stay whole."""
    dims, reduced, result = _reduced(op, operands)
    return make_rule(
        operands, results, [dims], [result] * len(results), unsplittable=factors(dims[d] for d in reduced)
    )


_ALONG = (
    "softmax _softmax log_softmax _log_softmax softmin cumsum cumprod logcumsumexp cummax cummin sort"
    " argsort topk fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2"
    " fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift"
)


@register(*aten(_ALONG))
def along(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Each result element needs all of a row, so rows stay whole, in operand and results."""
    args = arguments(op)
    rank = len(operands[0].shape)
    rows = chosen_dims(args["dim"], rank)
    if all(result.shape == operands[0].shape for result in results):
        dims = numbered(rank)
        unsplittable = factors(dims[dim] for dim in rows)
    else:
        dims = without(numbered(rank), rows, keep=True)
        unsplittable = frozenset()
    linear = ((0,),) if _is_linear_along(op, operands, results) else ()
    return make_rule(
        operands, results, [dims], [dims] * len(results), unsplittable=unsplittable, linear=linear
    )


def _is_linear_along(op: Op, operands: Tensors, results: Tensors) -> bool:
    inexact = all(t.dtype.is_floating_point or t.dtype.is_complex for t in (*operands, *results))
    return inexact and op.target.startswith(("aten.cumsum", "aten.fft_"))


def _reduced(op: Op, operands: Tensors) -> tuple[list[Dim], Sequence[int], list[Dim]]:
    """Dimensions of the operand, which of them are reduced, and the dimensions of the result."""
    args = arguments(op)
    rank = len(operands[0].shape)
    dims = numbered(rank)
    reduced = chosen_dims(args.values.get("dim"), rank)
    return dims, reduced, without(dims, reduced, keep=bool(args.values.get("keepdim")))


@register("aten.histc", "aten.bincount")
def count(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Counts of a whole tensor, which add up."""
    dims = numbered(len(operands[0].shape))
    others: list[list[Dim]] = [[WHOLE] * len(tensor.shape) for tensor in operands[1:]]
    ranges = op.target.startswith("aten.histc") and _fixed_range(arguments(op))
    summed = factors(dims) if ranges else frozenset()
    bins: list[Dim] = [WHOLE] * len(results[0].shape)
    return make_rule(
        operands, results, [dims, *others], [bins], reductions=summed, unsplittable=factors(dims) - summed
    )


def _fixed_range(args: Arguments) -> bool:
    """Without one, `histc` takes the range from the data."""
    return bool(args["min"] != args["max"])
