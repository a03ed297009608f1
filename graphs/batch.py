"""The same graph at another batch size.

Every shape and every count of a model is affine in the batch size b: v(b) = v(2) + (v(3) - v(2)) * (b - 2).
So two graphs, captured at 2 and 3, give the graph at every batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from graphs.errors import CaptureError
from graphs.ir import Op, OpGraph, Tensor

LOW, HIGH = 2, 3
"""The batch sizes at which a model is captured; 1 is special to broadcasting, so it is none of them."""

Inputs = Mapping[str, Any]


def inputs_of_any_batch(example: Inputs | Callable[[int], Inputs]) -> Callable[[int], Inputs]:
    """Inputs as a function of the batch size.

    An example is cut or repeated along dimension 0 of those tensors that have the example's batch size there,
    which is the most common size of dimension 0.
    """
    if callable(example):
        return example
    sizes = Counter(
        value.shape[0] for value in example.values() if isinstance(value, torch.Tensor) and value.dim()
    )
    if not sizes:
        raise CaptureError("the example inputs hold no tensor with a batch dimension")
    common = sizes.most_common(1)[0][0]

    def at(batch: int) -> Inputs:
        return {name: _with_batch(value, common, batch) for name, value in example.items()}

    return at


def _with_batch(value: Any, common: int, batch: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != common:
        return value
    return torch.cat([value] * -(-batch // common))[:batch]


def interpolate(low: OpGraph, high: OpGraph, batch: int) -> OpGraph:
    """The graph at a batch size from those at `LOW` and `HIGH`.

    They differ in integers only, as `check_alike` makes sure once. Raises `CaptureError` for a size below 1.
    """
    if batch < 1:
        raise CaptureError(f"the batch size must be at least 1, got {batch}")

    def between(first: Any, second: Any) -> Any:
        if first == second:
            return first
        if isinstance(first, int):
            return first + (second - first) * (batch - LOW)
        if isinstance(first, (tuple, list)):
            return type(first)(between(a, b) for a, b in zip(first, second, strict=True))
        if isinstance(first, Mapping):
            return {key: between(value, second[key]) for key, value in first.items()}
        return first

    def count(first: int, second: int) -> int:
        """Affine in the batch, or quadratic where every sample meets every other (a contrastive loss)."""
        if first * HIGH**2 == second * LOW**2:
            return first * batch**2 // LOW**2
        result: int = between(first, second)
        return result

    def op_between(first: Op, second: Op) -> Op:
        if first == second:
            return first
        return replace(
            first,
            args=between(first.args, second.args),
            kwargs=between(first.kwargs, second.kwargs),
            flops=count(first.flops, second.flops),
            saved_internal_bytes=count(first.saved_internal_bytes, second.saved_internal_bytes),
        )

    def tensor_between(first: Tensor, second: Tensor) -> Tensor:
        return first if first == second else replace(first, shape=between(first.shape, second.shape))

    tensors = {name: tensor_between(tensor, high.tensors[name]) for name, tensor in low.tensors.items()}
    ops = tuple(op_between(*pair) for pair in zip(low.ops, high.ops, strict=True))
    return replace(low, tensors=tensors, ops=ops)


def check_alike(low: OpGraph, high: OpGraph) -> None:
    """Raise `CaptureError` unless two graphs differ in integers only."""
    for first, second in zip(low.ops, high.ops, strict=False):
        if not _same_op(first, second) or not all(
            _same_tensor(low.tensors[name], high.tensors[name]) for name in first.outputs
        ):
            raise CaptureError(
                f"the model does something else at batch {HIGH} than at batch {LOW}, first in {first.name}: "
                f"{first.target}{first.args} against {second.target}{second.args}",
                module=first.module,
                advice=f"plan for a batch size of {LOW}, or make forward independent of the batch size",
            )
    if len(low.ops) != len(high.ops):
        raise CaptureError(
            f"the model has {len(low.ops)} ops at batch {LOW} and {len(high.ops)} at batch {HIGH}"
        )


def _same_op(first: Op, second: Op) -> bool:
    return (
        (first.name, first.target, first.outputs, first.module, first.saved)
        == (second.name, second.target, second.outputs, second.module, second.saved)
        and _alike(first.args, second.args)
        and _alike(first.kwargs, second.kwargs)
    )


def _same_tensor(first: Tensor, second: Tensor) -> bool:
    return (
        (first.dtype, first.requires_grad, first.storage)
        == (second.dtype, second.requires_grad, second.storage)
    ) and len(first.shape) == len(second.shape)


def _alike(first: Any, second: Any) -> bool:
    """Whether two arguments are the same up to integers."""
    kind = type(first)
    if kind is not type(second):
        return False
    if kind is int:
        return True
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_alike, first, second))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(
            _alike(value, second[key]) for key, value in first.items()
        )
    return bool(first == second)


__all__ = ["HIGH", "LOW", "Inputs", "check_alike", "inputs_of_any_batch", "interpolate"]
