"""In-place operators as functional ones.

A tensor that is written to gets a new version. Views remember how they were made, so that a write through a
view makes a new version of the base (`select_scatter` and its kin), and a view read after a write is made
anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.canonical import Bound, Emitter, bind, convert, expand, permute, reshape
from graphs.errors import UnsupportedOpError

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _View:
    """How a view was made: result `index` of `call`, whose argument `base` it looks at."""

    call: Bound
    base: torch.Tensor
    index: int


class Versions:
    """The newest version of every traced tensor."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._views: dict[int, _View] = {}
        self._newest: dict[int, torch.Tensor] = {}
        self._written = False

    def note_views(self, call: Bound, results: Sequence[torch.Tensor]) -> None:
        """Remember those results of a recorded call that share memory with its first operand."""
        base = call.arguments.get("self")
        if not isinstance(base, torch.Tensor):
            return
        for index, result in enumerate(results):
            if result.untyped_storage()._cdata == base.untyped_storage()._cdata:
                self._views[id(result)] = _View(call, base, index)

    def current(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is after every write so far."""
        if not self._written:
            return tensor
        while id(tensor) in self._newest:
            tensor = self._newest[id(tensor)]
        view = self._views.get(id(tensor))
        if view is None:
            return tensor
        base = self.current(view.base)
        if base is view.base:
            return tensor
        again = self._emitter.record(Bound(view.call.target, {**view.call.arguments, "self": base}))
        renewed: torch.Tensor = again if isinstance(again, torch.Tensor) else again[view.index]
        self._newest[id(tensor)] = renewed
        return renewed

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """From now on `tensor`, and all that shares its memory, reads as after `tensor.copy_(value)`."""
        tensor = self.current(tensor)
        if value is tensor:
            return
        self._written = True
        while (view := self._views.get(id(tensor))) is not None:
            value = _write_back(self._emitter, view, value)
            tensor = view.base
        if value is not tensor:
            self._newest[id(tensor)] = value


def is_in_place(target: OpOverload) -> bool:
    """Whether an operator writes to an argument."""
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in target._schema.arguments
    )


def functional_form(tracer: Any, call: Bound) -> torch.Tensor:
    """Record the functional form of an in-place call; its result is the newest version of what it writes."""
    written = [
        argument.name
        for argument in call.target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    target = call["self"] if written == ["self"] else None
    if target is None or not call.target._opname.endswith("_"):
        raise UnsupportedOpError(f"{call.target} writes to {', '.join(written)} and has no functional form")
    value = convert(tracer, expand(tracer, _functional_value(tracer, call), target.shape), target.dtype)
    tracer.versions.write(target, value)
    current: torch.Tensor = tracer.versions.current(target)
    return current


def _functional_value(emitter: Emitter, call: Bound) -> torch.Tensor:
    name = call.target._opname
    target = call["self"]
    if name == "copy_":
        value: torch.Tensor = call["src"]
        return value
    if name == "zero_":
        value = emitter.emit(aten.zeros_like.default, target)
        return value
    if name == "fill_" and not isinstance(call["value"], torch.Tensor):
        value = emitter.emit(aten.full_like.default, target, call["value"])
        return value
    if name == "detach_":
        value = emitter.emit(aten.detach.default, target)
        return value
    packet = getattr(getattr(torch.ops, call.target.namespace), name.removesuffix("_"), None)
    functional = getattr(packet, call.target._overloadname, None)
    if functional is None or is_in_place(functional):
        raise UnsupportedOpError(
            f"{call.target} writes to its operand and has no functional form",
            advice="write it without the in-place operator",
        )
    known = [argument.name for argument in functional._schema.arguments]
    named = {key: item for key, item in call.arguments.items() if key in known}
    value = emitter.emit(functional, **{known[0]: target, **named})  # which may not be called `self` there
    return value


def _write_back(emitter: Emitter, view: _View, value: torch.Tensor) -> torch.Tensor:
    """The base of a view after the view was overwritten by `value`."""
    call, base = view.call, view.base
    packet = call.packet
    if packet == "aten.select":
        return _scatter(emitter, aten.select_scatter.default, base, value, call["dim"], call["index"])
    if packet == "aten.slice":
        start, end, step = call["start"], call["end"], call["step"]
        return _scatter(emitter, aten.slice_scatter.default, base, value, call["dim"], start, end, step)
    if packet == "aten.split_with_sizes":
        start = sum(call["split_sizes"][: view.index])
        end = start + call["split_sizes"][view.index]
        return _scatter(emitter, aten.slice_scatter.default, base, value, call["dim"], start, end)
    if packet in ("aten.reshape", "aten.unsqueeze", "aten.squeeze"):
        return reshape(emitter, value, base.shape)
    if packet == "aten.transpose":
        order = list(range(base.dim()))
        order[call["dim0"]], order[call["dim1"]] = order[call["dim1"]], order[call["dim0"]]
        return permute(emitter, value, order)
    if packet == "aten.permute":
        dims = call["dims"]
        return permute(emitter, value, [dims.index(dim) for dim in range(base.dim())])
    raise UnsupportedOpError(
        f"an in-place operator writes through {call.target}",
        advice="write it without the in-place operator, for instance with torch.where or torch.cat",
    )


def _scatter(
    emitter: Emitter, target: OpOverload, base: torch.Tensor, value: torch.Tensor, *place: int
) -> torch.Tensor:
    result: torch.Tensor = emitter.record(bind(target, (base, value, *place), {}))
    return result
