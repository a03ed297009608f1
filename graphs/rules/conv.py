"""Convolutions and other windows that slide over images: windows overlap, so images stay whole."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, make_rule, numbered
from graphs.rules.registry import aten, register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]

_LOCAL_GROUPS = frozenset({"aten.conv1d.default", "aten.conv2d.default"})
"""Overloads whose number of groups may be made local."""


@register(*aten("conv1d conv2d conv3d convolution"))
def convolution(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[n, (g, i), ...] w[(g, o), i, ...] -> [n, (g, o), ...]`, channels in g independent groups.

    Of an ungrouped convolution the input channels are a sum (not with a bias, which would be added
    repeatedly). Transposed ones have `w[(g, i), o, ...]`.
    """
    return _convolution(op, operands, results, transposed=bool(arguments(op).values.get("transposed")))


@register(*aten("conv_transpose1d conv_transpose2d conv_transpose3d"))
def transposed_convolution(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[n, (g, i), ...] w[(g, i), o, ...] -> [n, (g, o), ...]`."""
    return _convolution(op, operands, results, transposed=True)


def _convolution(op: Op, operands: Tensors, results: Tensors, *, transposed: bool) -> Rule:
    args = arguments(op)
    weight, groups = operands[1].shape, args["groups"]
    spatial: list[Dim] = [WHOLE] * (len(weight) - 2)
    batch: list[Dim] = [("n",)] if len(operands[0].shape) == len(weight) else []
    inputs: Dim = ("g", "i") if groups > 1 else ("i",)
    outputs: Dim = ("g", "o") if groups > 1 else ("o",)
    per_group = {
        "g": groups,
        "i": operands[0].shape[len(batch)] // groups,
        "o": results[0].shape[len(batch)] // groups,
    }
    weights: list[Dim] = [inputs, ("o",), *spatial] if transposed else [outputs, ("i",), *spatial]
    whole = set()
    if groups > 1:
        whole = {"i", "o"} if op.target in _LOCAL_GROUPS else {"g", "i", "o"}
    elif args["bias"] is not None:
        whole = {"i"}
    return make_rule(
        operands,
        results,
        [[*batch, inputs, *spatial], weights, *([[outputs]] if args["bias"] is not None else [])],
        [[*batch, outputs, *spatial]],
        sizes=per_group,
        reductions={"i"} - whole,
        unsplittable=whole,
        linear=args.linear_in(("input", "bias"), ("weight", "bias")),
    )


_WINDOWED = (
    "avg_pool max_pool adaptive_avg_pool adaptive_max_pool lp_pool reflection_pad replication_pad"
    " upsample_nearest"
)
_INTERPOLATIONS = {
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
}
_IMAGE_RANKS = {
    **{f"aten.{name}{rank}d": rank for name in _WINDOWED.split() for rank in (1, 2, 3)},
    **{f"aten.max_pool{rank}d_with_indices": rank for rank in (1, 2, 3)},
    **{f"aten.{name}": rank for name, rank in _INTERPOLATIONS.items()},
}
"""Operators that treat every image of a batch alike, with the rank of an image."""

_LINEAR = (
    "aten.avg_pool",
    "aten.adaptive_avg_pool",
    "aten.upsample",
    "aten.reflection_pad",
    "aten.replication_pad",
)


@register(*_IMAGE_RANKS)
def images(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Pooling, padding and interpolation: samples and channels are independent, images stay whole."""
    rank = _IMAGE_RANKS[op.target.rpartition(".")[0]]
    leading = numbered(len(operands[0].shape) - rank)

    def dims(tensor: Tensor) -> list[Dim]:
        return [*leading, *[WHOLE] * (len(tensor.shape) - len(leading))]

    return make_rule(
        operands,
        results,
        [dims(tensor) for tensor in operands],
        [dims(tensor) for tensor in results],
        linear=((0,),) if op.target.startswith(_LINEAR) else (),
    )
