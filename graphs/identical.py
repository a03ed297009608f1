"""Whether modules are the same but for their weights and their position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

_TENSOR_SLOTS = frozenset({"_parameters", "_buffers", "_modules"})


def identical_modules(first: nn.Module, other: nn.Module, offset: int) -> bool:
    """Whether two modules differ in the values of tensors only.

    `offset` is how much further on in their container `other` stands: integers that differ by exactly that (a
    layer's own index) are taken as equal.
    """
    if type(first) is not type(other) or first._modules.keys() != other._modules.keys():
        return False
    if not _same_tensors(first._parameters, other._parameters) or not _same_tensors(
        first._buffers, other._buffers
    ):
        return False
    mine, theirs = _settings(first), _settings(other)
    if mine.keys() != theirs.keys() or not all(
        _same(value, theirs[key], offset) for key, value in mine.items()
    ):
        return False
    pairs = zip(first._modules.values(), other._modules.values(), strict=True)
    return all(
        a is b or (a is not None and b is not None and identical_modules(a, b, offset)) for a, b in pairs
    )


def settings_repeat(model: nn.Module, container: str, start: int, period: int) -> bool:
    """Whether lists with an entry per child, in the modules above or their configurations, repeat.

    From `start` to their end, not only that of a run: children behind those left out read them further ahead.
    A list that only numbers the children tells none from another.
    """
    length = len(model.get_submodule(container)._modules)
    return all(
        _same(values[index - period], values[index], 0)
        for values in _lists_above(model, container)
        if len(values) == length and list(values) != list(range(length))
        for index in range(start + period, length)
    )


def _lists_above(model: nn.Module, container: str) -> Iterator[Sequence[Any]]:
    path = container
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        for holder in (_settings(module), vars(getattr(module, "config", module))):
            yield from (value for value in holder.values() if isinstance(value, (list, tuple)))


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _TENSOR_SLOTS}


def _same_tensors(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if first.keys() != other.keys():
        return False
    for a, b in zip(first.values(), other.values(), strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif _spec(a) != _spec(b):
            return False
    return True


def _spec(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def _same(first: Any, other: Any, offset: int, depth: int = 0) -> bool:
    """Whether two settings are equal; whatever cannot be compared with certainty is not."""
    if first is other:
        return True
    if type(first) is not type(other) or depth > 8:
        return False
    if isinstance(first, (dict, Mapping)):  # most settings are a dict of hooks, and empty
        return first.keys() == other.keys() and all(
            _same(value, other[key], offset, depth + 1) for key, value in first.items()
        )
    if isinstance(first, bool):
        return bool(first == other)
    if isinstance(first, int):
        return other - first in (0, offset)
    if isinstance(first, (float, str, bytes, torch.dtype, torch.device, torch.Size)):
        return bool(first == other)
    if isinstance(first, (list, tuple)):
        return len(first) == len(other) and all(
            _same(a, b, offset, depth + 1) for a, b in zip(first, other, strict=True)
        )
    if isinstance(first, (set, frozenset)):
        return bool(first == other)
    if isinstance(first, MethodType):
        return first.__func__ is other.__func__
    if isinstance(first, (torch.Tensor, nn.Module)) or not hasattr(first, "__dict__"):
        return False
    return _same(vars(first), vars(other), offset, depth + 1)
