"""Ops whose arguments name sizes: what these are on one rank of an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.placements import Shard
from autopar.strategies import Strategy
from graphs.ir import Op, Tensor


@dataclass(frozen=True)
class Sizes:
    """What a size argument may be computed from."""

    op: Op
    strategy: Strategy
    tensors: Mapping[str, Tensor]
    axis_size: int

    def result_shape(self) -> list[int]:
        """The shape of the first result, as this rank has it."""
        return list(self.tensors[self.op.outputs[0]].shape)

    def cut(self, dim: int) -> bool:
        """Whether dimension `dim` of the first operand is split."""
        value = self.strategy.operands[0].value
        rank = len(self.tensors[self.op.inputs[0]].shape)
        return isinstance(value, Shard) and value.dim == dim % max(1, rank)

    def position(self, index: int, dim: int) -> int:
        """Where a position along dimension `dim` of the whole first operand is in each rank's part."""
        extent = self.tensors[self.op.inputs[0]].shape[dim]
        return (index if index >= 0 else index + extent * self.axis_size) // self.axis_size


def _with_arg(op: Op, index: int, value: Any) -> Op:
    if op.args[index : index + 1] == (value,):
        return op
    return replace(op, args=(*op.args[:index], value, *op.args[index + 1 :]))


def _shape_argument(index: int) -> Callable[[Op, Sizes], Op]:
    return lambda op, sizes: _with_arg(op, index, sizes.result_shape())


def _split(op: Op, sizes: Sizes) -> Op:
    """The size of each part, or the list of them; the number of parts of a `tensor_split` stays."""
    if not sizes.cut(op.args[2] if len(op.args) > 2 else 0):
        return op
    parts = op.args[1]
    if isinstance(parts, int):
        return _with_arg(op, 1, parts // sizes.axis_size)
    return _with_arg(op, 1, [part // sizes.axis_size for part in parts])


def _slice(op: Op, sizes: Sizes) -> Op:
    dim, start = op.args[1] if len(op.args) > 1 else 0, op.args[2] if len(op.args) > 2 else None
    if not sizes.cut(dim):
        return op
    local = sizes.position(start or 0, dim)
    return replace(op, args=(op.args[0], dim, local, local + sizes.result_shape()[dim]))


def _narrow(op: Op, sizes: Sizes) -> Op:
    _, dim, start, length = op.args
    if not sizes.cut(dim):
        return op
    return replace(op, args=(op.args[0], dim, sizes.position(start, dim), length // sizes.axis_size))


def _repeat(op: Op, sizes: Sizes) -> Op:
    local_in = sizes.tensors[op.inputs[0]].shape
    result = sizes.result_shape()
    padded = [1] * (len(result) - len(local_in)) + list(local_in)
    return _with_arg(op, 1, [out // size for out, size in zip(result, padded, strict=True)])


def _output_size(op: Op, sizes: Sizes) -> Op:
    if op.kwargs.get("output_size") is None:
        return op
    dim = op.args[2] if len(op.args) > 2 else op.kwargs["dim"]
    return replace(op, kwargs={**op.kwargs, "output_size": sizes.result_shape()[dim]})


def _groups(index: int) -> Callable[[Op, Sizes], Op]:
    """Groups of channels are split as a whole; where channels are split inside each, all groups stay."""

    def resize(op: Op, sizes: Sizes) -> Op:
        if sizes.strategy.factor != "g" or len(op.args) <= index:
            return op
        return _with_arg(op, index, op.args[index] // sizes.axis_size)

    return resize


SIZE_ARGUMENTS: Mapping[str, Callable[[Op, Sizes], Op]] = {
    "aten.reshape.default": _shape_argument(1),
    "aten.expand.default": _shape_argument(1),
    "aten.full.default": _shape_argument(0),
    "aten.zeros.default": _shape_argument(0),
    "aten.ones.default": _shape_argument(0),
    "aten.empty.memory_format": _shape_argument(0),
    "aten.rand.default": _shape_argument(0),
    "aten.randn.default": _shape_argument(0),
    "aten.new_zeros.default": _shape_argument(1),
    "aten.new_ones.default": _shape_argument(1),
    "aten.new_full.default": _shape_argument(1),
    "aten.new_empty.default": _shape_argument(1),
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.tensor_split.indices": _split,
    "aten.repeat.default": _repeat,
    "aten.tile.default": _repeat,
    "aten.repeat_interleave.self_int": _output_size,
    "aten.group_norm.default": _groups(1),
    "aten.conv1d.default": _groups(6),
    "aten.conv2d.default": _groups(6),
    "aten.conv3d.default": _groups(6),
    "aten.convolution.default": _groups(8),
    "aten.conv_transpose1d.default": _groups(6),
    "aten.conv_transpose2d.input": _groups(6),
    "aten.conv_transpose3d.input": _groups(6),
}
"""How the arguments of an op become those of its local form, by its target."""
