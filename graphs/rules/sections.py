"""Ops that cut a dimension into sections or join sections: each section is split, not their concatenation."""

from __future__ import annotations

from collections.abc import Sequence

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, make_rule, numbered
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


@register("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
def split(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """One dimension in pieces; its factor splits every piece."""
    dims = numbered(len(operands[0].shape))
    place = arguments(op)["dim"] % len(dims)
    if op.target.startswith("aten.tensor_split"):  # which takes positions of the whole dimension
        dims[place] = WHOLE
    pieces = [result.shape[place] for result in results]
    return make_rule(
        operands,
        results,
        [dims],
        [_whole_if_empty(dims, result) for result in results],
        linear=((0,),),
        sections={("operand", 0, place): pieces} if dims[place] else {},
    )


@register("aten.slice.Tensor", "aten.narrow.default")
def slice_dim(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A piece of one dimension: a split with the pieces before and after thrown away."""
    args = arguments(op)
    shape = operands[0].shape
    dims = numbered(len(shape))
    place = args["dim"] % len(shape)
    size, taken = shape[place], results[0].shape[place]
    start = slice(args["start"], None).indices(size)[0]
    if args.values.get("step", 1) != 1 or taken == 0:
        dims[place] = WHOLE
    pieces = (start, taken, size - start - taken)
    return make_rule(
        operands,
        results,
        [dims],
        [dims],
        linear=((0,),),
        sections={("operand", 0, place): pieces} if dims[place] else {},
    )


@register("aten.cat", "aten.concat", "aten.concatenate")
def cat(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """One dimension is the sections that the operands bring. (torch skips an operand of shape `[0]`.)"""
    dims = numbered(len(results[0].shape))
    place = arguments(op)["dim"] % len(dims)
    skipped = [tensor.shape == (0,) and len(dims) > 1 for tensor in operands]
    pieces = [0 if skip else tensor.shape[place] for tensor, skip in zip(operands, skipped, strict=True)]
    return make_rule(
        operands,
        results,
        [
            [WHOLE] if skip else _whole_if_empty(dims, tensor)
            for tensor, skip in zip(operands, skipped, strict=True)
        ],
        [dims],
        linear=(range(len(operands)),),
        sections={("result", 0, place): pieces},
    )


@register("aten.stack")
def stack(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A new dimension, one element for each operand."""
    dims = numbered(len(operands[0].shape))
    place = arguments(op)["dim"] % len(results[0].shape)
    result = [*dims[:place], WHOLE, *dims[place:]]
    return make_rule(operands, results, [dims] * len(operands), [result], linear=(range(len(operands)),))


@register("aten.glu")
def glu(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The first half of a dimension, gated by the second."""
    dims = numbered(len(operands[0].shape))
    place = arguments(op)["dim"] % len(dims)
    half = results[0].shape[place]
    return make_rule(operands, results, [dims], [dims], sections={("operand", 0, place): (half, half)})


@register("aten.select_scatter", "aten.slice_scatter")
def write_into(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A piece of one dimension is replaced; that dimension stays whole."""
    dims = numbered(len(operands[0].shape))
    place = arguments(op)["dim"] % len(dims)
    dims[place] = WHOLE
    piece = [*dims[:place], *dims[place + 1 :]] if op.target.startswith("aten.select") else dims
    return make_rule(operands, results, [dims, piece], [dims], linear=((0, 1),))


def _whole_if_empty(dims: Sequence[Dim], tensor: Tensor) -> list[Dim]:
    """An empty piece holds no factor."""
    return [WHOLE if extent == 0 else dim for dim, extent in zip(dims, tensor.shape, strict=True)]
