"""The scale of a loss whose gradients are narrow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopar.runtime.tensors import widened


class LossScale:
    """Dynamic loss scaling: fp16 gradients that would vanish are computed as of a larger loss
    (arXiv:1710.03740, section 3.2).

    Gradients come out `value` times as large; a step whose gradients overflow is left out and halves it, and
    `patience` good ones in a row double it.
    """

    def __init__(self, value: float = 2.0**15, patience: int = 2000) -> None:
        self.value, self.patience, self.num_good = value, patience, 0

    def scale(self, loss: Tensor) -> Tensor:
        """The same loss, whose gradients are `value` times as large."""
        return _scale_gradient(loss, self.value)

    def scale_output(self, stage: nn.Module) -> None:
        """Let the stage return its loss so."""
        stage.register_forward_hook(lambda module, arguments, loss: self.scale(loss))

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every parameter its true gradient, in single precision, where small ones do not vanish."""
        for parameter in dict.fromkeys(parameters):  # tied ones come under all their names
            if parameter.grad is not None:
                wide = widened(parameter.grad.dtype)
                if parameter.grad_dtype != wide:
                    parameter.grad_dtype = None  # any: torch refuses a gradient of another dtype
                parameter.grad = parameter.grad.to(wide) / self.value

    @property
    def state(self) -> tuple[float, int]:
        """What a restart goes on with."""
        return self.value, self.num_good

    @state.setter
    def state(self, given: Sequence[Any]) -> None:
        self.value, self.num_good = given

    def is_good(self, gradient_norm: float) -> bool:
        """Whether to take the step whose gradients have this norm, the same on all ranks; adapts the
        scale."""
        good = math.isfinite(gradient_norm)
        self.num_good = self.num_good + 1 if good else 0
        if not good:
            self.value /= 2
        elif self.num_good % self.patience == 0:
            self.value *= 2
        return good


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


_scale_gradient: Callable[[Tensor, float], Tensor] = _ScaledGradient.apply
