"""Ops that move, cut or repeat dimensions without computing."""

from __future__ import annotations

from collections.abc import Sequence

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, aligned, chosen_dims, make_rule, numbered, without
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


def _moved(operands: Tensors, results: Tensors, operand: Sequence[Dim], result: Sequence[Dim]) -> Rule:
    return make_rule(operands, results, [operand], [result] * len(results), linear=((0,),))


@register("aten.permute")
def permute(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Result dimension i is dimension `dims[i]`."""
    rank = len(operands[0].shape)
    dims = numbered(rank)
    return _moved(operands, results, dims, [dims[dim % rank] for dim in arguments(op)["dims"]])


@register("aten.transpose", "aten.swapaxes", "aten.swapdims")
def transpose(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Two dimensions change places."""
    dims = numbered(len(operands[0].shape))
    swapped = list(dims)
    if dims:
        first, second = (dim % len(dims) for dim in op.args[1:3])
        swapped[first], swapped[second] = swapped[second], swapped[first]
    return _moved(operands, results, dims, swapped)


@register("aten.t", "aten.mT", "aten.adjoint", "aten.numpy_T")
def matrix_transpose(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The last two dimensions change places, all of them in `numpy_T`."""
    dims = numbered(len(operands[0].shape))
    kept = 0 if op.target.startswith("aten.numpy_T") else max(len(dims) - 2, 0)
    return _moved(operands, results, dims, [*dims[:kept], *reversed(dims[kept:])])


@register("aten.movedim", "aten.moveaxis")
def movedim(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Some dimensions go elsewhere, the others keep their order."""
    rank = len(operands[0].shape)
    dims = numbered(rank)
    sources, targets = ([value] if isinstance(value, int) else value for value in op.args[1:3])
    moved = {target % rank: dims[source % rank] for source, target in zip(sources, targets, strict=True)}
    others = iter(without(dims, [source % rank for source in sources]))
    return _moved(
        operands, results, dims, [moved[index] if index in moved else next(others) for index in range(rank)]
    )


@register("aten.unsqueeze")
def unsqueeze(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A new dimension of size 1."""
    dims = numbered(len(operands[0].shape))
    place = op.args[1] % len(results[0].shape)
    return _moved(operands, results, dims, [*dims[:place], WHOLE, *dims[place:]])


@register("aten.squeeze")
def squeeze(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Dimensions of size 1 go, all or the named ones. Larger ones among them stay whole, lest they go."""
    shape = operands[0].shape
    named = chosen_dims(op.args[1] if len(op.args) > 1 else None, len(shape))
    dims = without(numbered(len(shape)), named, keep=True)
    return _moved(operands, results, dims, without(dims, [dim for dim in named if shape[dim] == 1]))


@register("aten.expand")
def expand(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Dimensions of size 1 and new ones on the left are repeated: factors that only the result holds."""
    dims = numbered(len(results[0].shape))
    return _moved(operands, results, aligned(dims, len(operands[0].shape)), dims)


@register("aten.repeat", "aten.tile")
def repeat(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Dimension d becomes (r, d), r copies of d after each other."""
    shape, target = operands[0].shape, results[0].shape
    padded = (1,) * (len(target) - len(shape)) + shape
    copies = {
        f"r{index}": out // size for index, (out, size) in enumerate(zip(target, padded, strict=True)) if size
    }
    dims = numbered(len(target))
    extents = dict(zip((dim[0] for dim in dims), padded, strict=True))
    return make_rule(
        operands,
        results,
        [aligned(dims, len(shape))],
        [[(f"r{index}", *dim) for index, dim in enumerate(dims)]]
        if 0 not in padded
        else [[WHOLE] * len(target)],
        sizes={**extents, **copies},
        unsplittable=copies if op.target.startswith("aten.tile") else (),
        linear=((0,),),
    )


@register("aten.repeat_interleave.self_int")
def repeat_interleave(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Dimension d becomes (d, r), r copies of each element; without `dim` of the flattened tensor."""
    args = arguments(op)
    shape = operands[0].shape
    dims = numbered(len(shape))
    sizes = {dim[0]: size for dim, size in zip(dims, shape, strict=True)} | {"r": args["repeats"]}
    if args["dim"] is None:
        result: list[Dim] = [(*(name for dim in dims for name in dim), "r")]
        repeated = {dim[0] for dim in dims}
    else:
        place = args["dim"] % len(shape)
        result = [(*dim, "r") if index == place else dim for index, dim in enumerate(dims)]
        repeated = set(dims[place])
    # `output_size` and `repeats` are numbers in the call: what they count stays whole.
    counted = {"r"} | (repeated if args["output_size"] is not None else set())
    return make_rule(operands, results, [dims], [result], sizes=sizes, unsplittable=counted, linear=((0,),))


@register("aten.select.int", "aten.unbind", "aten.diagonal")
def select(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """One element of a dimension, or every element on its own; `diagonal` of two, appended at the end."""
    args = arguments(op)
    dims = numbered(len(operands[0].shape))
    diagonal = op.target.startswith("aten.diagonal")
    gone = chosen_dims((args["dim1"], args["dim2"]) if diagonal else args["dim"], len(dims))
    result = [*without(dims, gone), *([WHOLE] if diagonal else [])]
    return _moved(operands, results, without(dims, gone, keep=True), result)


@register("aten.flip", "aten.roll")
def flip(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The dimensions along which elements change places stay whole; all of them where none is named."""
    dims = numbered(len(operands[0].shape))
    kept = without(dims, chosen_dims(arguments(op)["dims"], len(dims)), keep=True)
    return _moved(operands, results, kept, kept)


@register("aten.unfold")
def unfold(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Windows along a dimension become a new last one."""
    dims = numbered(len(operands[0].shape))
    kept = without(dims, chosen_dims(arguments(op)["dimension"], len(dims)), keep=True)
    return _moved(operands, results, kept, [*kept, WHOLE])


@register("aten.constant_pad_nd", "aten.pad")
def pad(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The padded dimensions stay whole. `pad` lists (before, after) from the last dimension on."""
    args = arguments(op)
    dims = numbered(len(operands[0].shape))
    amounts = args["pad"]
    padded = [len(dims) - 1 - index // 2 for index, amount in enumerate(amounts) if amount]
    kept = without(dims, padded, keep=True)
    zero = not args["value"] or args.values.get("mode", "constant") != "constant"
    return make_rule(operands, results, [kept], [kept], linear=((0,),) if zero else ())


@register("aten.view_as_complex")
def view_as_complex(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The last dimension holds real and imaginary part."""
    dims = numbered(len(results[0].shape))
    return _moved(operands, results, [*dims, WHOLE], dims)


@register("aten.view_as_real")
def view_as_real(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A new last dimension holds real and imaginary part."""
    dims = numbered(len(operands[0].shape))
    return _moved(operands, results, dims, [*dims, WHOLE])


@register("aten.tril", "aten.triu")
def triangle(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A triangle of every matrix."""
    rank = len(operands[0].shape)
    dims = [*numbered(rank - 2), WHOLE, WHOLE]
    return _moved(operands, results, dims, dims)


@register("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`[..., (c, p, q), h, w] -> [..., c, (h, p), (w, q)]`, and back: p and q are numbers in the call."""
    args = arguments(op)
    back = op.target.startswith("aten.pixel_unshuffle")
    fine, coarse = (operands[0], results[0]) if back else (results[0], operands[0])
    factor = args["downscale_factor" if back else "upscale_factor"]
    leading = numbered(len(fine.shape) - 3)
    images: list[Dim] = [*leading, ("c",), ("h", "p"), ("w", "q")]
    stacks: list[Dim] = [*leading, ("c", "p", "q"), ("h",), ("w",)]
    before, after = (images, stacks) if back else (stacks, images)
    sizes = {"c": fine.shape[-3], "h": coarse.shape[-2], "w": coarse.shape[-1], "p": factor, "q": factor}
    return make_rule(
        operands, results, [before], [after], sizes=sizes, unsplittable=("p", "q"), linear=((0,),)
    )
