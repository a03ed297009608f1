"""One way to write each operator.

Arguments follow the schema: positional without trailing defaults, keyword-only ones by keyword, no devices,
dimensions counted from the front, slices with an explicit end. On top of that each function of `_FORMS`
rewrites one operator: everything that only gives a new shape is `aten.reshape.default`, biases are added
apart, conversions are `aten.to.dtype`, and what changes nothing disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch._ops import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Bound:
    """A call with every argument of the schema by name."""

    target: OpOverload
    arguments: Mapping[str, Any]

    @property
    def packet(self) -> str:
        return f"{self.target.namespace}.{self.target._opname}"

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Bound:
        """The same call with `function` applied to every tensor argument."""

        def apply(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return function(value)
            if isinstance(value, (tuple, list)):
                return type(value)(apply(item) for item in value)
            return value

        return Bound(self.target, {name: apply(value) for name, value in self.arguments.items()})


class Emitter(Protocol):
    """Where canonical calls go."""

    def emit(self, target: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        """Bring a call into canonical form and record it."""

    def record(self, call: Bound) -> Any:
        """Record a call as it is."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same value as a tensor of its own, which a later write to the original does not touch."""


_PLACEMENT_ARGUMENTS = frozenset({"device", "pin_memory", "layout", "non_blocking"})
_DIM_ARGUMENTS = frozenset({"dim", "dim0", "dim1", "dims", "start_dim", "end_dim", "source", "destination"})
_ADDS_A_DIM = frozenset({"aten.unsqueeze", "aten.stack"})


def bind(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bound:
    """A call with defaults filled in, dimensions counted from the front, and no word on devices."""
    schema = target._schema.arguments
    given = dict(kwargs)
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    given.update(zip(positional, args, strict=False))
    arguments = {argument.name: given.get(argument.name, argument.default_value) for argument in schema}
    for name in _PLACEMENT_ARGUMENTS & arguments.keys():
        arguments[name] = False if name == "non_blocking" else None
    call = Bound(target, arguments)
    rank = _rank(call)
    if rank is not None:
        for name in _DIM_ARGUMENTS & arguments.keys():
            arguments[name] = _from_front(arguments[name], rank)
    return call


def unbind(call: Bound) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments without trailing defaults, and keyword-only arguments that are not the default."""
    schema = call.target._schema.arguments
    positional = [argument for argument in schema if not argument.kwarg_only]
    while positional and _is_default(positional[-1], call[positional[-1].name]):
        positional.pop()
    keywords = {
        argument.name: call[argument.name]
        for argument in schema
        if argument.kwarg_only and not _is_default(argument, call[argument.name])
    }
    return tuple(call[argument.name] for argument in positional), keywords


def canonical_form(emitter: Emitter, call: Bound) -> Any:
    """Record a functional call in canonical form; returns its result, which may be one of its operands."""
    form = _FORMS.get(call.packet)
    result = form(emitter, call) if form is not None else None
    return emitter.record(call) if result is None else result


def reshape(emitter: Emitter, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor in another shape, itself where that is its shape."""
    sizes = list(shape)
    if -1 in sizes:
        known = prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = tensor.numel() // known if known else 0
    if tuple(sizes) == tuple(tensor.shape):
        return tensor
    result: torch.Tensor = emitter.record(bind(aten.reshape.default, (tensor, sizes), {}))
    return result


def convert(emitter: Emitter, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in another dtype, itself where that is its dtype."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    result: torch.Tensor = emitter.record(bind(aten.to.dtype, (tensor, dtype), {}))
    return result


def expand(emitter: Emitter, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor broadcast to a shape, itself where that is its shape."""
    missing = len(shape) - tensor.dim()
    sizes = [tensor.shape[index - missing] if size == -1 else size for index, size in enumerate(shape)]
    if tuple(sizes) == tuple(tensor.shape):
        return tensor
    result: torch.Tensor = emitter.record(bind(aten.expand.default, (tensor, sizes), {}))
    return result


def permute(emitter: Emitter, tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The tensor with its dimensions in another order; one swap is a `transpose`."""
    moved = [index for index, dim in enumerate(dims) if index != dim]
    if not moved:
        return tensor
    swap = len(moved) == 2
    target, args = (aten.transpose.int, tuple(moved)) if swap else (aten.permute.default, (list(dims),))
    result: torch.Tensor = emitter.record(bind(target, (tensor, *args), {}))
    return result


def _rank(call: Bound) -> int | None:
    for argument in call.target._schema.arguments:
        value = call[argument.name]
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, torch.Tensor):
            return first.dim() + (1 if call.packet in _ADDS_A_DIM else 0)
    return None


def _from_front(value: Any, rank: int) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value % rank if rank else value
    if isinstance(value, (list, tuple)):
        return [_from_front(item, rank) for item in value]
    return value


def _is_default(argument: torch.Argument, value: Any) -> bool:
    if not argument.has_default_value():
        return value is None and argument.kwarg_only
    default = argument.default_value
    return type(value) is type(default) and bool(value == default)


Form = Callable[[Emitter, Bound], Any]


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


def _squeeze(emitter: Emitter, call: Bound) -> Any:
    tensor = call["self"]
    dims = call.arguments.get("dim", range(tensor.dim()))
    dims = [dims] if isinstance(dims, int) else dims
    return None if any(tensor.shape[dim] == 1 for dim in dims) else tensor


def _slice(emitter: Emitter, call: Bound) -> Any:
    tensor, dim = call["self"], call["dim"]
    return slice_dim(emitter, tensor, dim, call["start"], call["end"], call["step"])


def slice_dim(
    emitter: Emitter, tensor: torch.Tensor, dim: int, start: int | None, end: int | None, step: int
) -> torch.Tensor:
    """Elements `start:end:step` of one dimension, the tensor itself where that is all of it."""
    size = tensor.shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    if (start, end, step) == (0, size, 1):
        return tensor
    result: torch.Tensor = emitter.record(
        bind(aten.slice.Tensor, (tensor, dim, start, max(start, end), step), {})
    )
    return result


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
    """In training the running statistics are not read; that they are updated is no part of the graph."""
    if not call["training"] or call["running_mean"] is None:
        return None
    without = {**call.arguments, "running_mean": None, "running_var": None}
    return emitter.record(Bound(call.target, without))


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
}
