"""One way to write each operator.

Each function rewrites one operator: everything that only gives a new shape is `aten.reshape.default`, slices
have an explicit end, biases are added apart, conversions are `aten.to.dtype`, and what changes nothing
disappears. It returns the result, or None where the call is fine as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.canonical import Bound, Emitter, bind, convert, expand, permute, reshape, slice_dim

aten = torch.ops.aten

Form = Callable[[Emitter, Bound], Any]


def canonical_form(emitter: Emitter, call: Bound) -> Any:
    """Record a functional call in canonical form; returns its result, which may be one of its operands."""
    form = _FORMS.get(call.packet)
    result = form(emitter, call) if form is not None else None
    return emitter.record(call) if result is None else result


def _view(emitter: Emitter, call: Bound) -> Any:
    if "size" not in call.arguments:  # view.dtype reinterprets bits
        return None
    return reshape(emitter, call["self"], call["size"])


def _reshape(emitter: Emitter, call: Bound) -> Any:
    return reshape(emitter, call["self"], call["shape"])


def _reshape_as(emitter: Emitter, call: Bound) -> Any:
    return reshape(emitter, call["self"], call["other"].shape)


def _flatten(emitter: Emitter, call: Bound) -> Any:
    tensor, start, end = call["self"], call["start_dim"], call["end_dim"]
    if tensor.dim() == 0:
        return reshape(emitter, tensor, (1,))
    shape = tensor.shape
    return reshape(emitter, tensor, (*shape[:start], prod(shape[start : end + 1]), *shape[end + 1 :]))


def _unflatten(emitter: Emitter, call: Bound) -> Any:
    tensor, dim, sizes = call["self"], call["dim"], list(call["sizes"])
    if -1 in sizes:
        sizes[sizes.index(-1)] = tensor.shape[dim] // prod(size for size in sizes if size != -1)
    return reshape(emitter, tensor, (*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]))


def _expand(emitter: Emitter, call: Bound) -> Any:
    return expand(emitter, call["self"], call["size"])


def _expand_as(emitter: Emitter, call: Bound) -> Any:
    return expand(emitter, call["self"], call["other"].shape)


def _broadcast_tensors(emitter: Emitter, call: Bound) -> Any:
    tensors = call["tensors"]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return [expand(emitter, tensor, shape) for tensor in tensors]


def _squeeze(emitter: Emitter, call: Bound) -> Any:
    """Dimensions are named: one that happens to have size 1 on some rank is not meant."""
    tensor = call["self"]
    given = call.arguments.get("dim", range(tensor.dim()))
    dims = [dim for dim in ([given] if isinstance(given, int) else given) if tensor.shape[dim] == 1]
    if not dims:
        return tensor
    if len(dims) == 1:
        return emitter.record(bind(aten.squeeze.dim, (tensor, dims[0]), {}))
    return emitter.record(bind(aten.squeeze.dims, (tensor, dims), {}))


def _slice(emitter: Emitter, call: Bound) -> Any:
    tensor, dim = call["self"], call["dim"]
    return slice_dim(emitter, tensor, dim, call["start"], call["end"], call["step"])


def _narrow(emitter: Emitter, call: Bound) -> Any:
    start = call["start"]
    if isinstance(start, torch.Tensor):
        return None
    start %= max(call["self"].shape[call["dim"]], 1)
    return slice_dim(emitter, call["self"], call["dim"], start, start + call["length"], 1)


def _select(emitter: Emitter, call: Bound) -> Any:
    if call.target is not aten.select.int or call["index"] >= 0:
        return None
    return emitter.emit(
        call.target, call["self"], call["dim"], call["index"] + call["self"].shape[call["dim"]]
    )


def _split(emitter: Emitter, call: Bound) -> Any:
    tensor, dim = call["self"], call["dim"]
    size = tensor.shape[dim]
    if call.packet == "aten.chunk":
        piece = -(-size // call["chunks"])
    elif call.target is aten.split.Tensor:
        piece = call["split_size"]
    else:
        return emitter.record(bind(aten.split_with_sizes.default, (tensor, call["split_size"], dim), {}))
    sizes = [min(piece, size - start) for start in range(0, size, piece)] if piece else [size]
    if len(sizes) == 1:
        return [tensor]
    return emitter.record(bind(aten.split_with_sizes.default, (tensor, sizes, dim), {}))


def _permute(emitter: Emitter, call: Bound) -> Any:
    return permute(emitter, call["self"], call["dims"])


def _transpose(emitter: Emitter, call: Bound) -> Any:
    tensor = call["self"]
    names = [name for name in ("dim0", "dim1", "axis0", "axis1") if name in call.arguments]
    rank = max(tensor.dim(), 1)
    first, second = (call[name] % rank for name in names) if names else (0, 1)
    order = list(range(tensor.dim()))
    if tensor.dim() < 2:
        return tensor
    order[first], order[second] = order[second], order[first]
    return permute(emitter, tensor, order)


def _matrix_transpose(emitter: Emitter, call: Bound) -> Any:
    tensor = call["self"]
    order = list(range(tensor.dim()))
    return permute(emitter, tensor, [*order[:-2], *reversed(order[-2:])])


def _reverse_dims(emitter: Emitter, call: Bound) -> Any:
    return permute(emitter, call["self"], list(reversed(range(call["self"].dim()))))


def _move_dims(emitter: Emitter, call: Bound) -> Any:
    tensor = call["self"]
    sources, destinations = (
        [value] if isinstance(value, int) else list(value) for value in (call["source"], call["destination"])
    )
    order = [dim for dim in range(tensor.dim()) if dim not in sources]
    for destination, source in sorted(zip(destinations, sources, strict=True)):
        order.insert(destination, source)
    return permute(emitter, tensor, order)


def _convert(emitter: Emitter, call: Bound) -> Any:
    tensor, other = call["self"], call.arguments.get("other")
    converted = convert(emitter, tensor, other.dtype if other is not None else call["dtype"])
    copies = call.packet == "aten._to_copy" or call.arguments.get("copy")
    return emitter.copy(tensor) if copies and converted is tensor else converted


def _clone(emitter: Emitter, call: Bound) -> Any:
    tensor, layout = call["self"], call["memory_format"]
    layout = torch.contiguous_format if layout == 0 else layout  # a schema's default is a bare number
    if layout in (None, torch.preserve_format) or tensor.is_contiguous(memory_format=layout):
        return tensor if call.packet == "aten.contiguous" else emitter.copy(tensor)
    return emitter.record(bind(aten.clone.default, (tensor,), {"memory_format": layout}))


def _copy(emitter: Emitter, call: Bound) -> Any:
    return emitter.copy(call["self"])


def _itself(emitter: Emitter, call: Bound) -> Any:
    return call["self"]


def _detach(emitter: Emitter, call: Bound) -> Any:
    return None if call["self"].requires_grad else call["self"]


def _dropout(emitter: Emitter, call: Bound) -> Any:
    return None if call["train"] and call["p"] > 0 else call["input"]


def _linear(emitter: Emitter, call: Bound) -> Any:
    if call["bias"] is None:
        return None
    product = emitter.record(bind(aten.linear.default, (call["input"], call["weight"]), {}))
    return emitter.record(bind(aten.add.Tensor, (product, call["bias"]), {}))


def _addmm(emitter: Emitter, call: Bound) -> Any:
    if call["beta"] != 1 or call["alpha"] != 1:
        return None
    target = aten.mm.default if call.packet == "aten.addmm" else aten.bmm.default
    first, second = ("mat1", "mat2") if call.packet == "aten.addmm" else ("batch1", "batch2")
    product = emitter.record(bind(target, (call[first], call[second]), {}))
    return emitter.record(bind(aten.add.Tensor, (product, call["self"]), {}))


def _bitwise(target: OpOverload) -> Form:
    """Of `x & y`, which torch records under the name of Python's operator."""

    def form(emitter: Emitter, call: Bound) -> Any:
        other = call["other"]
        return emitter.emit(target, call["self"], other) if isinstance(other, torch.Tensor) else None

    return form


def _pad(emitter: Emitter, call: Bound) -> Any:
    if call["mode"] != "constant":
        return None
    value = 0 if call["value"] is None else call["value"]
    return emitter.record(bind(aten.constant_pad_nd.default, (call["self"], call["pad"], value), {}))


def _neutral_operand(emitter: Emitter, call: Bound) -> Any:
    """Plus zero, minus zero, times one, over one: nothing, unless it changes the dtype."""
    tensor, other = call["self"], call["other"]
    neutral = 0 if call.packet in ("aten.add", "aten.sub") else 1
    if isinstance(other, torch.Tensor) or other != neutral or call.arguments.get("rounding_mode") is not None:
        return None
    keeps = tensor.is_floating_point() or (isinstance(other, int) and call.packet != "aten.div")
    return emitter.copy(tensor) if keeps and tensor.dtype is not torch.bool else None


def _batch_norm(emitter: Emitter, call: Bound) -> Any:
    """In training the running statistics are not read; that they are updated is no part of the graph, and
    only by a momentum of 0 can be told that there are none."""
    if not call["training"] or (call["running_mean"] is None and call["momentum"] == 0.0):
        return None
    momentum = 0.0 if call["running_mean"] is None else call["momentum"]
    without = {"running_mean": None, "running_var": None, "momentum": momentum}
    return emitter.record(Bound(call.target, {**call.arguments, **without}))


_FORMS: Mapping[str, Form] = {
    "aten.view": _view,
    "aten._unsafe_view": _view,
    "aten._reshape_alias": _view,
    "aten.reshape": _reshape,
    "aten.view_as": _reshape_as,
    "aten.reshape_as": _reshape_as,
    "aten.flatten": _flatten,
    "aten.unflatten": _unflatten,
    "aten.expand": _expand,
    "aten.expand_as": _expand_as,
    "aten.broadcast_to": _expand,
    "aten.broadcast_tensors": _broadcast_tensors,
    "aten.squeeze": _squeeze,
    "aten.slice": _slice,
    "aten.narrow": _narrow,
    "aten.select": _select,
    "aten.chunk": _split,
    "aten.split": _split,
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.swapaxes": _transpose,
    "aten.swapdims": _transpose,
    "aten.t": _transpose,
    "aten.mT": _matrix_transpose,
    "aten.numpy_T": _reverse_dims,
    "aten.movedim": _move_dims,
    "aten.moveaxis": _move_dims,
    "aten.to": _convert,
    "aten._to_copy": _convert,
    "aten.type_as": _convert,
    "aten.clone": _clone,
    "aten.contiguous": _clone,
    "aten.alias": _itself,
    "aten.lift_fresh": _itself,
    "aten.lift_fresh_copy": _copy,
    "aten.positive": _itself,
    "aten.detach": _detach,
    "aten.dropout": _dropout,
    "aten.linear": _linear,
    "aten.addmm": _addmm,
    "aten.baddbmm": _addmm,
    "aten.pad": _pad,
    "aten.add": _neutral_operand,
    "aten.sub": _neutral_operand,
    "aten.mul": _neutral_operand,
    "aten.div": _neutral_operand,
    "aten.batch_norm": _batch_norm,
    "aten.__and__": _bitwise(aten.bitwise_and.Tensor),
    "aten.__or__": _bitwise(aten.bitwise_or.Tensor),
    "aten.__xor__": _bitwise(aten.bitwise_xor.Tensor),
}
