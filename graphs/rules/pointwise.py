"""Pointwise ops: result and operands, broadcast from the right, share a factor per dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graphs.ir import Op, Ref, Tensor
from graphs.rules.arguments import Arguments, arguments
from graphs.rules.build import WHOLE, aligned, make_rule, numbered
from graphs.rules.registry import POINTWISE, aten, register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]
LinearSets = tuple[frozenset[int], ...]

# Ops that act on elements but lack torch's tag.
_UNTAGGED = (
    "where clone contiguous detach alias lift_fresh to _to_copy rsub hardswish log_sigmoid floor_divide"
    " __and__ __or__ __xor__ __lshift__ __rshift__ subtract multiply divide true_divide special_expm1 real"
    " imag conj complex polar fill zeros_like ones_like full_like empty_like rand_like randn_like"
    " randint_like bernoulli dropout native_dropout alpha_dropout masked_fill nan_to_num rrelu positive"
    " conj_physical resolve_conj resolve_neg max.other min.other"
)


@register(POINTWISE, *aten(_UNTAGGED))
def pointwise(op: Op, operands: Tensors, results: Tensors) -> Rule | None:
    """Every dimension of the result is a factor; an operand lacks those in which it broadcasts."""
    if not all(_broadcasts(tensor.shape, results[0].shape) for tensor in (*operands, *results)):
        return None
    dims = numbered(len(results[0].shape))
    return make_rule(
        operands,
        results,
        [aligned(dims, len(tensor.shape)) for tensor in operands],
        [dims] * len(results),
        linear=_linear(op, operands, results),
    )


def _broadcasts(shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    missing = len(result) - len(shape)
    return missing >= 0 and all(size in (1, out) for size, out in zip(shape, result[missing:], strict=True))


@register("aten.copy", "aten.type_as", "aten.to.other")
def first_shape(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`type_as` reads only the dtype of its second operand, `copy` only the shape of its first."""
    dims = numbered(len(results[0].shape))
    second: list[Dim] = [WHOLE] * len(operands[1].shape)
    read = 0
    if op.target.startswith("aten.copy"):
        second, read = aligned(dims, len(operands[1].shape)), 1
    inexact = all(t.dtype.is_floating_point or t.dtype.is_complex for t in (operands[read], results[0]))
    return make_rule(operands, results, [dims, second], [dims], linear=((read,),) if inexact else ())


@register("aten.feature_dropout", "aten.feature_alpha_dropout")
def feature_dropout(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[n, c, ...]`: a channel of a sample is dropped as one."""
    rank = len(results[0].shape)
    dims = [*numbered(min(rank, 2)), *[WHOLE] * (rank - 2)]
    return make_rule(operands, results, [dims], [dims])


@register("aten.prelu")
def prelu(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[n, c, ...]` with one slope for each channel, or one for all."""
    dims = numbered(len(results[0].shape))
    slopes = aligned(dims[:2], len(operands[1].shape))
    return make_rule(operands, results, [dims, slopes], [dims])


@register("aten.bucketize.Tensor", "aten.isin.Tensor_Tensor")
def compared_with_all(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Each element of the first operand is compared with all of the second."""
    dims = numbered(len(results[0].shape))
    return make_rule(operands, results, [dims, [WHOLE] * len(operands[1].shape)], [dims])


def _linear(op: Op, operands: Tensors, results: Tensors) -> LinearSets:
    packet = op.target.rpartition(".")[0].removeprefix("aten.")
    find = _LINEAR.get(packet)
    if find is None or not all(
        tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in results
    ):
        return ()
    # A bool or integer operand has no partial sums to speak of.
    inexact = {
        index
        for index, tensor in enumerate(operands)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex
    }
    return tuple(members for members in find(arguments(op)) if members and members <= inexact)


def _sum(args: Arguments) -> LinearSets:
    if not isinstance(args["other"], Ref):
        return ()
    return args.linear_in(("self", "other"))


def _product(args: Arguments) -> LinearSets:
    return () if args["self"] == args["other"] else args.linear_in(("self",), ("other",))


def _quotient(args: Arguments) -> LinearSets:
    rounded = args.values.get("rounding_mode") is not None
    return () if rounded or args["self"] == args["other"] else args.linear_in(("self",))


def _only(args: Arguments) -> LinearSets:
    return args.linear_in(("self",))


def _where(args: Arguments) -> LinearSets:
    constants = [value for value in (args["self"], args["other"]) if not isinstance(value, Ref)]
    return () if any(constants) else args.linear_in(("self", "other"))


def _masked_fill(args: Arguments) -> LinearSets:
    if isinstance(args["value"], Ref):
        return args.linear_in(("self", "value"))
    return () if args["value"] else args.linear_in(("self",))


def _parts(args: Arguments) -> LinearSets:
    return args.linear_in(("real", "imag"))


_LINEAR: Mapping[str, Callable[[Arguments], LinearSets]] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), _sum),
    **dict.fromkeys(("mul", "multiply"), _product),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    **dict.fromkeys(
        (
            *("neg", "positive", "clone", "contiguous", "detach", "alias", "to", "_to_copy"),
            *("real", "imag", "conj", "conj_physical", "resolve_conj", "resolve_neg"),
        ),
        _only,
    ),
    "where": _where,
    "masked_fill": _masked_fill,
    "complex": _parts,
}
