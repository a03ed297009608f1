"""Calls of operators in a normal form, and the rewrites that many of them share.

Arguments follow the schema: positional without trailing defaults, keyword-only ones by keyword, no devices,
dimensions counted from the front.
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
