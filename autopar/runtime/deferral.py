"""Products whose weights wait: backwards in two parts. Compiled ones would leave nothing for later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.runtime.compiling import uncompiled
from autopar.runtime.experts import gradient_by_group, grouped_mm, rows_by_group

Leftovers = list[tuple[nn.Parameter, Callable[[], Tensor]]]
"""Weights, and what computes the gradient of each."""


_LEFT: ContextVar[Leftovers | None] = ContextVar("left", default=None)
"""Where products that run now leave the gradients of their weights; None: they compute them themselves."""


@uncompiled
def deferred_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, of which a schedule that splits backwards computes the weight's gradient later."""
    return _product(x, weight, True) if weight.grad_fn is None else F.linear(x, weight)


@uncompiled
def deferred_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight`, of which a schedule that splits backwards computes the weight's gradient later."""
    return _product(x, weight, False) if weight.grad_fn is None else x @ weight


class _Product(torch.autograd.Function):
    """The weight is remembered as the parameter that it is: what is saved may be computed again, and is then
    another tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.is_transposed, ctx.left = weight, is_transposed, _LEFT.get()
        return F.linear(x, weight) if is_transposed else x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, is_transposed = ctx.saved_tensors, ctx.weight, ctx.is_transposed

        def of_weight() -> Tensor:
            rows, columns = x.flatten(0, -2), gradient.flatten(0, -2)
            product: Tensor = columns.T @ rows if is_transposed else rows.T @ columns
            return product

        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight if is_transposed else F.linear(gradient, weight)
        return of_x, _now_or_later(ctx, of_weight), None


_product: Callable[[Tensor, Tensor, bool], Tensor] = _Product.apply


def _now_or_later(ctx: Any, of_weight: Callable[[], Tensor]) -> Tensor | None:
    """The gradient of the weight, the second input, where nobody asked for it to be left."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.left is None:
        return of_weight()
    ctx.left.append((ctx.weight, of_weight))
    return None


@uncompiled
def deferred_grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """`grouped_mm` with the matrices in `weight`, or with them `transposed`, of which a schedule that splits
    backwards computes the weight's gradient later."""
    if weight.grad_fn is None:
        return _grouped_product(x, weight, ends, transposed)
    return grouped_mm(x, weight.transpose(1, 2) if transposed else weight, ends)


class _GroupedProduct(torch.autograd.Function):
    """As `_Product`, by group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, ends: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, ends)
        ctx.weight, ctx.transposed, ctx.left = weight, transposed, _LEFT.get()
        return rows_by_group(x, weight.transpose(1, 2) if transposed else weight, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, ends), gradient = ctx.saved_tensors, gradient.contiguous()
        matrices = ctx.weight.transpose(1, 2) if ctx.transposed else ctx.weight

        def of_weight() -> Tensor:
            found = gradient_by_group(x, gradient, matrices, ends)
            return found.transpose(1, 2) if ctx.transposed else found

        of_x = rows_by_group(gradient, matrices.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        return of_x, _now_or_later(ctx, of_weight), None, None


_grouped_product: Callable[[Tensor, Tensor, Tensor, bool], Tensor] = _GroupedProduct.apply


@uncompiled
def deferred_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d` to `F.conv3d`, of which a schedule that splits backwards computes the weight's gradient
    later."""
    num_dims = x.dim() - 2
    sizes = (
        (each,) * num_dims if isinstance(each, int) else tuple(each) for each in (stride, padding, dilation)
    )
    options = (*sizes, False, (0,) * num_dims, groups)
    convolution = _convolution if weight.grad_fn is None else torch.ops.aten.convolution
    return convolution(x, weight, bias, *options)


class _Convolution(torch.autograd.Function):
    """As `_Product`; torch has one function for all three gradients, told which of them to compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.options, ctx.left = weight, options, _LEFT.get()
        ctx.bias_shape = None if bias is None else bias.shape
        convolved: Tensor = torch.ops.aten.convolution(x, weight, bias, *options)
        return convolved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors

        def gradients(*wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
            given = gradient, x, ctx.weight, ctx.bias_shape, *ctx.options
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(*given, wanted)
            return found

        of_x, _, of_bias = gradients(ctx.needs_input_grad[0], False, ctx.needs_input_grad[2])
        of_weight = _now_or_later(ctx, lambda: gradients(False, True, False)[1])
        return of_x, of_weight, of_bias, *(None for _ in ctx.options)


_convolution: Callable[..., Tensor] = _Convolution.apply


def leave_weights(stage: nn.Module, gradient: torch.dtype | None = None) -> Callable[[], Callable[[], None]]:
    """Make the backward of a stage leave the gradients of its products' weights.

    Returns a function that takes over what the last backward left, and returns the function that computes it:
    the `dw_builder` of a `PipelineStage`. torch's own way to split a backward walks the graph twice, which
    computes checkpointed blocks again for every weight, and misses parameters that no path joins with an
    input.

    Gradients of these weights are added up in `gradient` (None: as each weight says). `fully_shard` adds up
    in its own precision only what it finds after a backward, so not what comes later.
    """
    left: Leftovers = []
    stage.register_forward_pre_hook(lambda *_: _set_left(left))
    stage.register_forward_hook(lambda *_: _set_left(None), always_call=True)

    def take() -> Callable[[], None]:
        mine = left.copy()
        left.clear()
        return partial(_finish, mine, gradient)

    return take


def _set_left(left: Leftovers | None) -> None:
    """Returns nothing, as a hook that changes nothing must."""
    _LEFT.set(left)


def _finish(left: Leftovers, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for weight, _ in left:
            weight.grad_dtype = dtype
    if left:
        torch.autograd.backward([weight for weight, _ in left], [gradient() for _, gradient in left])
