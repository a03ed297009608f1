"""Autograd functions of the user's own.

Export keeps the forward of a `torch.autograd.Function` and silently drops its backward. So their forward is
captured as the plain operators it consists of, and afterwards each function is tried on small real tensors:
where its backward is not the derivative of its forward, the capture would train another model and is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction

_TRIAL_SIZE = 4
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class CustomCall:
    """One call: function, arguments with tensors as specs, and the stack with the outermost frame first."""

    cls: type[Function]
    arguments: tuple[Any, ...]
    frames: tuple[tuple[FrameType, int], ...]


@dataclass(frozen=True, slots=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Context:
    """Stands in for the context of an autograd function whose backward is not used."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def save_for_forward(self, *tensors: Any) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def mark_dirty(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


@contextmanager
def custom_functions_in_the_open() -> Iterator[list[CustomCall]]:
    """Run the forward of custom functions as plain operators; gives the list of first calls of each."""
    calls: dict[type[Function], CustomCall] = {}

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch."):
            return super(_SingleLevelFunction, cls).apply(*args, **kwargs)  # type: ignore[misc]  # the C++ apply
        specs = tuple(_Spec(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
        calls.setdefault(cls, CustomCall(cls, specs, tuple(_stack(sys._getframe(1)))))
        return _plain_forward(cls, *args, **kwargs)

    found: list[CustomCall] = []
    # Not `Function.apply` itself: models keep that as a bound method, from before. It calls the next class's.
    with patch.object(_SingleLevelFunction, "apply", classmethod(apply), create=True):
        yield found
    found += calls.values()


def disagreement(call: CustomCall) -> str | None:
    """Why the plain forward of a custom function does not train like the function itself, None where it does.

    Both are run on random tensors of at most four elements a dimension, and outputs and gradients compared.
    """
    generator = torch.Generator().manual_seed(0)
    trial = [_random(item, generator) if isinstance(item, _Spec) else item for item in call.arguments]
    try:
        custom, custom_gradients = _outputs_and_gradients(call.cls.apply, trial)
        plain, plain_gradients = _outputs_and_gradients(lambda *args: _plain_forward(call.cls, *args), trial)
    except Exception as error:  # the user's own code may raise anything; what it raised is told
        return f"it cannot be tried on small tensors ({type(error).__name__}: {error})"
    same = all(_close(a, b) for a, b in zip(custom + custom_gradients, plain + plain_gradients, strict=True))
    return None if same else "its backward is not the derivative of its forward, and cannot be captured"


def _plain_forward(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    has_context = cls.setup_context is Function.setup_context
    return cls.forward(_Context(), *args, **kwargs) if has_context else cls.forward(*args, **kwargs)


def _random(spec: _Spec, generator: torch.Generator) -> torch.Tensor:
    shape = [min(size, _TRIAL_SIZE) for size in spec.shape]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.zeros(shape, dtype=spec.dtype)


def _outputs_and_gradients(
    function: Any, arguments: list[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    fresh = [
        item.clone().requires_grad_(item.is_floating_point()) if isinstance(item, torch.Tensor) else item
        for item in arguments
    ]
    result = function(*fresh)
    outputs = [
        item
        for item in (result if isinstance(result, tuple) else (result,))
        if isinstance(item, torch.Tensor)
    ]
    total = torch.stack(
        [(item * torch.arange(1, item.numel() + 1).reshape(item.shape)).sum() for item in outputs]
    ).sum()
    leaves = [item for item in fresh if isinstance(item, torch.Tensor) and item.requires_grad]
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [item.detach() for item in outputs], list(gradients)


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE)


def _stack(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    frames = []
    while frame is not None:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return frames[::-1]
