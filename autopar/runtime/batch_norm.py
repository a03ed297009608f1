"""Batch norm over the samples of several ranks, with running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from autopar.runtime.moves import gathered, summed
from autopar.runtime.tensors import widened


class BatchNorm(nn.Module):
    """A batch norm of the original model, with its parameters and running statistics.

    Parameters that are split otherwise than the channels of its input, as they come to it through a
    collective, have `num_weights` and `num_biases` of their own.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_channels: int,
        eps: float,
        momentum: float,
        affine: bool = True,
        dtype: torch.dtype = torch.float32,
        num_weights: int | None = None,
        num_biases: int | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        for name, size in (("weight", num_weights), ("bias", num_biases)):
            empty = nn.Parameter(torch.empty(size or num_channels, dtype=dtype)) if affine else None
            self.register_parameter(name, empty)
        with torch.device("cpu"):  # buffers are never built on the meta device
            self.register_buffer("running_mean", torch.zeros(num_channels, dtype=dtype))
            self.register_buffer("running_var", torch.ones(num_channels, dtype=dtype))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, rows: ProcessGroup | None = None) -> Tensor:
        """`x` normalized as `batch_norm` does it."""
        return batch_norm(x, self.weight, self.bias, self.eps, rows=rows, running=self)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rows: ProcessGroup | None = None,
    running: BatchNorm | None = None,
) -> Tensor:
    """`x` `[n, c, ...]`, normalized by the statistics of each channel over the samples of all ranks of
    `rows`.

    They are noted in `running`, but not again where a backward computes this again.
    """
    if rows is not None:
        normalized, mean, variance = _normalize(x, weight, bias, eps, rows)
    elif running is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    else:
        mean, variance = running.running_mean.clone(), running.running_var.clone()
        normalized = F.batch_norm(x, mean, variance, weight, bias, True, running.momentum, eps)
    if running is not None and not _is_in_backward():
        running.num_batches_tracked.add_(1)
        if rows is not None:
            count = x.numel() // x.shape[1] * rows.size()
            mean = running.running_mean.lerp(mean.to(x.dtype), running.momentum)
            variance = (variance * (count / (count - 1))).to(x.dtype)
            variance = running.running_var.lerp(variance, running.momentum)
        running.running_mean.copy_(mean)
        running.running_var.copy_(variance)
    return normalized


def _is_in_backward() -> bool:
    """Whether a checkpoint computes this again; a compiler, which cannot see that, arranges it itself."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _BatchNorm(torch.autograd.Function):
    """Statistics of equally many rows on every rank. The backward has one reduction: of the sums of which
    each row has a part."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        local = torch.var_mean(x.to(widened(x.dtype)), _all_but_channels(x), correction=0)
        variances, means = gathered(torch.stack(local).unsqueeze(0), group, 0).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance)
        shape = _per_channel(x)
        normalized = (x - mean.view(shape)) / (variance + eps).sqrt().view(shape)
        if weight is not None and bias is not None:
            normalized = normalized * weight.view(shape) + bias.view(shape)
        return normalized.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        gradient = gradient.to(mean.dtype)
        shape = _per_channel(x)
        deviation = (variance + ctx.eps).sqrt().view(shape)
        normalized = (x - mean.view(shape)) / deviation
        dims = _all_but_channels(x)
        sums = torch.stack([gradient.sum(dims), (gradient * normalized).sum(dims)])
        count = x.numel() // x.shape[1] * ctx.group.size()
        shift, slope = (summed(sums, ctx.group) / count).view(2, *shape)
        scale = 1 if weight is None else weight.view(shape)
        of_x = ((gradient - shift - normalized * slope) * scale / deviation).to(x.dtype)
        of_bias, of_weight = (None, None) if weight is None else sums.to(weight.dtype)
        return of_x, of_weight, of_bias, None, None


def _per_channel(x: Tensor) -> tuple[int, ...]:
    """The shape in which one number a channel meets `x`."""
    return (-1, *[1] * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


_normalize: Callable[..., tuple[Tensor, Tensor, Tensor]] = _BatchNorm.apply
