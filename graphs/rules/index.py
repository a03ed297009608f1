"""Ops that pick or place elements by index tensors: what is indexed stays whole, the indices may be split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, aligned, make_rule, numbered, without
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


@register("aten.index.Tensor")
def index(op: Op, operands: Tensors, results: Tensors) -> Rule | None:
    """`x[..., i, ...]`: the broadcast shape of the indices replaces the indexed dimensions, as in numpy."""
    layout = _indexed(operands[0], op.args[1], operands[1:])
    if layout is None:
        return None
    source, indices, result = layout
    return make_rule(operands, results, [source, *indices], [result], linear=((0,),))


@register("aten.index_put", "aten._unsafe_index_put")
def index_put(op: Op, operands: Tensors, results: Tensors) -> Rule | None:
    """Values placed at indices; only the dimensions that are not indexed can be split."""
    given = len(operands) - 2
    layout = _indexed(operands[0], op.args[1], operands[1 : 1 + given])
    if layout is None:
        return None
    source, indices, placed = layout
    names = {dim for dims in indices for dim in dims}
    placed = [WHOLE if dim in names else dim for dim in placed]
    unsplit: list[list[Dim]] = [[WHOLE] * len(dims) for dims in indices]
    values = aligned(placed, len(operands[-1].shape))
    return make_rule(
        operands, results, [source, *unsplit, values], [source], linear=((0, len(operands) - 1),)
    )


def _indexed(
    source: Tensor, given: Sequence[object], indices: Sequence[Tensor]
) -> tuple[list[Dim], list[list[Dim]], list[Dim]] | None:
    """Dimensions of `x`, of each index and of `x[indices]`; None for masks, which count their elements."""
    if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in indices):
        return None
    rank = len(source.shape)
    picked = [position for position, item in enumerate(given) if item is not None]
    dims = without(numbered(rank), picked, keep=True)
    broadcast: list[Dim] = [(f"i{axis}",) for axis in range(max((len(t.shape) for t in indices), default=0))]
    adjacent = bool(picked) and picked == list(range(picked[0], picked[-1] + 1))
    place = picked[0] if adjacent else 0
    kept = without(dims, picked)
    result = [*kept[:place], *broadcast, *kept[place:]]
    return dims, [aligned(broadcast, len(tensor.shape)) for tensor in indices], result


@register("aten.gather")
def gather(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`out[i, j] = x[index[i, j], j]`: a dimension j in which `index` is shorter than `x` stays whole."""
    dims, place = _same_elsewhere(op, operands)
    source = without(dims, [place], keep=True)
    return make_rule(operands, results, [source, dims], [dims], linear=((0,),))


@register("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`out[index[i, j], j] = src[i, j]`: the dimension along which is placed stays whole."""
    args = arguments(op)
    dims, place = _same_elsewhere(op, operands)
    dims = without(dims, [place], keep=True)
    linear: tuple[frozenset[int], ...] = ()
    if args.operand("src") is not None and not op.target.startswith("aten.scatter_reduce"):
        linear = args.linear_in(("self", "src")) if args.values.get("reduce") is None else ()
    return make_rule(
        operands, results, [dims[: len(tensor.shape)] for tensor in operands], [dims], linear=linear
    )


def _same_elsewhere(op: Op, operands: Tensors) -> tuple[list[Dim], int]:
    """Factors of the dimensions in which all operands agree, and of the one that is indexed."""
    rank = len(operands[0].shape)
    place = arguments(op)["dim"] % max(rank, 1)
    full = [tensor.shape for tensor in operands if len(tensor.shape) == rank]
    differing = [dim for dim in range(rank) if dim != place and len({shape[dim] for shape in full}) > 1]
    return without(numbered(rank), differing, keep=True), place


@register("aten.index_select")
def index_select(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Elements of one dimension by a list of indices."""
    dims, place = numbered(len(operands[0].shape)), arguments(op)["dim"]
    source = without(dims, [place % len(dims)], keep=True)
    return make_rule(operands, results, [source, [dims[place]]], [dims], linear=((0,),))


@register("aten.index_add", "aten.index_copy", "aten.index_fill", "aten.index_reduce")
def index_add(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Slices of one dimension added or placed by a list of indices; that dimension stays whole."""
    dims = numbered(len(operands[0].shape))
    kept = without(dims, [arguments(op)["dim"] % len(dims)], keep=True)
    slices = [kept if len(tensor.shape) == len(dims) else [] for tensor in operands[2:]]
    placed = ("aten.index_add", "aten.index_copy", "aten.index_fill.int_Tensor")
    linear = ((0, 2),) if op.target.startswith(placed) else ()
    return make_rule(
        operands, results, [kept, [WHOLE] * len(operands[1].shape), *slices], [kept], linear=linear
    )


@register("aten.one_hot")
def one_hot(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A new last dimension with one element for each class."""
    dims = numbered(len(operands[0].shape))
    return make_rule(operands, results, [dims], [[*dims, WHOLE]])
