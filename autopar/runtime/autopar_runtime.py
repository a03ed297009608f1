"""What a parallel program written by autopar needs besides torch. Saved beside the program; depends on torch
alone.

Programs run on local shards with plain autograd. A tensor has a state on each mesh axis: how its value lies
on the ranks, and how its gradient does. `S(d)` is a slice of dimension d (value and gradient), `R` the whole
value, `P` a term of a sum. Each function below changes the state forward and does the conjugate change
backward:

    all_gather             S(d) -> R, gradient P     all_gather      | reduce_scatter
    all_gather_replicated  S(d) -> R, gradient R     all_gather      | slice
    shard                  R, gradient R -> S(d)     slice           | all_gather
    shard_partial          R, gradient P -> S(d)     slice           | zero padding
    copy                   R, gradient R -> P        -               | all_reduce
    all_reduce             P -> R, gradient R        all_reduce      | -
    all_reduce_partial     P -> R, gradient P        all_reduce      | all_reduce
    reduce_scatter         P -> S(d)                 reduce_scatter  | all_gather
    all_to_all             S(i) -> S(j)              all_to_all      | all_to_all
    first_only             R -> P                    zero but on the first rank | -
    first_grad             gradient P -> R           -               | zero but on the first rank

A dimension of positions may be dealt out in zigzag: cut into two slices for every rank, of which rank i gets
the i-th from the front and the i-th from the back. Under a causal mask later positions attend to more, and so
all ranks have as much to do.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from itertools import islice, product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint.state_dict_loader as checkpoint_loader
import torch.distributed.checkpoint.state_dict_saver as checkpoint_saver
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.pipelining.schedules import _PipelineSchedule as PipelineSchedule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

Sections = tuple[int, ...] | None


# --- moving data: no autograd here --------------------------------------------------------------------------


def _parts(size: int, sections: Sections) -> Sequence[int]:
    return (size,) if sections is None else sections


def _deal(x: Tensor, size: int, dim: int, sections: Sections, zigzag: bool) -> list[list[Tensor]]:
    """The slices of each of `size` ranks: one of every section, or two in zigzag."""
    parts = x.split(list(_parts(x.shape[dim], sections)), dim)
    if not zigzag:
        return [list(ranks) for ranks in zip(*(part.chunk(size, dim) for part in parts), strict=True)]
    slices = [part.chunk(2 * size, dim) for part in parts]
    return [[piece for each in slices for piece in (each[i], each[-1 - i])] for i in range(size)]


def _join(ranks: Sequence[Tensor], dim: int, sections: Sections, zigzag: bool) -> Tensor:
    """The whole of what was dealt out."""
    count = 2 if zigzag else 1
    wholes = _parts(ranks[0].shape[dim] * len(ranks), sections)
    local = [part // (len(ranks) * count) for part in wholes for _ in range(count)]
    dealt = zip(*(rank.split(local, dim) for rank in ranks), strict=True)
    ordered = (pieces[::-1] if zigzag and index % 2 else pieces for index, pieces in enumerate(dealt))
    return torch.cat([piece for pieces in ordered for piece in pieces], dim)


def _gather(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    whole: Tensor = funcol.wait_tensor(funcol.all_gather_single(x.contiguous(), dim, group))
    if sections is None and not zigzag:
        return whole
    return _join(whole.chunk(group.size(), dim), dim, sections, zigzag)


def _slice(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    pieces = _deal(x, group.size(), dim, sections, zigzag)[group.rank()]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].contiguous()


def _pad(x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False) -> Tensor:
    """The inverse of `_slice` with zeros where other ranks have their slices."""
    ranks = [torch.zeros_like(x)] * group.size()
    ranks[group.rank()] = x
    return _join(ranks, dim, sections, zigzag)


def _reduce(x: Tensor, group: ProcessGroup, *_: Any) -> Tensor:
    reduced: Tensor = funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))
    return reduced


def _scatter(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    if sections is not None or zigzag:
        dealt = _deal(x, group.size(), dim, sections, zigzag)
        x = torch.cat([piece for pieces in dealt for piece in pieces], dim)
    scattered: Tensor = funcol.wait_tensor(funcol.reduce_scatter_single(x.contiguous(), "sum", dim, group))
    return scattered


def _exchange(x: Tensor, group: ProcessGroup, source: int, target: int, zigzag: Sequence[int] = ()) -> Tensor:
    """From a slice of dimension `source` to a slice of dimension `target`; `zigzag` are those of the two that
    are dealt out so."""
    dealt = _deal(x, group.size(), target, None, target in zigzag)
    pieces = torch.stack([torch.cat(mine, target) for mine in dealt])
    received = funcol.wait_tensor(funcol.all_to_all_single(pieces, None, None, group))
    return _join(received.unbind(0), source, None, source in zigzag)


def _exchange_back(
    x: Tensor, group: ProcessGroup, source: int, target: int, **order: Sequence[int]
) -> Tensor:
    return _exchange(x, group, target, source, **order)


def _keep(x: Tensor, *_: Any) -> Tensor:
    return x.view_as(x)


def _first(x: Tensor, group: ProcessGroup, *_: Any) -> Tensor:
    return x.clone() if group.rank() == 0 else torch.zeros_like(x)


# --- changes of state: forward, and its conjugate backward --------------------------------------------------

Move = Callable[..., Tensor]


def _conjugate(forward: Move, backward: Move) -> Callable[..., Tensor]:
    """A differentiable function `(x, group, *dims, **order)` that moves data with `forward`, and gradients
    with `backward`."""

    class Conjugate(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, group: ProcessGroup, dims: tuple[Any, ...], order: dict[str, Any]
        ) -> Tensor:
            ctx.group, ctx.dims, ctx.order = group, dims, order
            return forward(x, group, *dims, **order)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return backward(gradient, ctx.group, *ctx.dims, **ctx.order), None, None, None

    apply: Callable[..., Tensor] = Conjugate.apply
    return lambda x, group, *dims, **order: apply(x, group, dims, order)


all_gather = _conjugate(_gather, _scatter)
all_gather_replicated = _conjugate(_gather, _slice)
shard = _conjugate(_slice, _gather)
shard_partial = _conjugate(_slice, _pad)
copy = _conjugate(_keep, _reduce)
all_reduce = _conjugate(_reduce, _keep)
all_reduce_partial = _conjugate(_reduce, _reduce)
reduce_scatter = _conjugate(_scatter, _gather)
all_to_all = _conjugate(_exchange, _exchange_back)
first_only = _conjugate(_first, _keep)
first_grad = _conjugate(_keep, _first)


# --- rows to their experts and back -------------------------------------------------------------------------


def exchange_counts(ends: Tensor, experts: ProcessGroup) -> tuple[Tensor, Tensor]:
    """How many rows travel between the ranks of `experts`, each of which holds as many of the e experts;
    `ends` `[e]` is up to where this rank's rows of each expert reach, as in `grouped_mm`.

    Returns the ends of the rows that this rank gets for its own experts, and, on the host, how many it sends
    to each expert of each rank and gets from each rank for each of its own `[2, n, e/n]`.
    """
    sent = ends.diff(prepend=ends.new_zeros(1)).view(experts.size(), -1)
    got: Tensor = funcol.wait_tensor(funcol.all_to_all_single(sent, None, None, experts))
    return got.sum(0).cumsum(0, dtype=ends.dtype), torch.stack([sent, got]).cpu()


def _to_experts(x: Tensor, group: ProcessGroup, routes: Tensor) -> Tensor:
    """Rows sorted by expert to the ranks of their experts, which sort what they get of all ranks again."""
    sent, got = routes.sum(2).tolist()
    rows: Tensor = funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), got, sent, group))
    return rows[_by_expert(routes[1], x.device)]


def _from_experts(x: Tensor, group: ProcessGroup, routes: Tensor) -> Tensor:
    sent, got = routes.sum(2).tolist()
    rows = torch.empty_like(x)
    rows[_by_expert(routes[1], x.device)] = x
    returned: Tensor = funcol.wait_tensor(funcol.all_to_all_single(rows, sent, got, group))
    return returned


def _by_expert(got: Tensor, device: torch.device) -> Tensor:
    """The order by expert of rows that lie there by rank, and of each rank by expert."""
    arrived = (got.flatten().cumsum(0) - got.flatten()).view_as(got)  # where each run of rows begins
    counts = got.T.flatten()
    begins = counts.cumsum(0) - counts
    total = int(counts.sum())
    moved = (arrived.T.flatten() - begins).to(device, non_blocking=True)
    order = moved.repeat_interleave(counts.to(device, non_blocking=True), output_size=total)
    return order + torch.arange(total, device=device)


_sent_to_experts = _conjugate(_to_experts, _from_experts)
_sent_from_experts = _conjugate(_from_experts, _to_experts)


def to_experts(x: Tensor, routes: Tensor, experts: ProcessGroup) -> Tensor:
    """Rows of `x`, sorted by expert, to the ranks that hold their experts: the rows of all ranks for this
    rank's own, sorted by expert. `routes` is of `exchange_counts`."""
    return _sent_to_experts(x, experts, routes)


def from_experts(x: Tensor, routes: Tensor, experts: ProcessGroup) -> Tensor:
    """Rows back to the ranks that sent them, in their order there: undoes `to_experts`."""
    return _sent_from_experts(x, experts, routes)


# --- ops that know they are split ---------------------------------------------------------------------------


def embedding(indices: Tensor, weight: Tensor, vocab: ProcessGroup, padding_idx: int = -1) -> Tensor:
    """A lookup in a table whose rows are split over `vocab`. Returns a partial sum: zero for rows of other
    ranks."""
    start = vocab.rank() * weight.shape[0]
    local = indices - start
    mine = (local >= 0) & (local < weight.shape[0])
    padding = padding_idx - start if 0 <= padding_idx - start < weight.shape[0] else None
    found = F.embedding(local.where(mine, 0), weight, padding_idx=padding)
    return found * mine.unsqueeze(-1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: ProcessGroup,
    *,
    zigzag: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of queries `[..., s/n, d]`, split over the n ranks of `rows`, to all keys up to their own
    positions.

    Each slice of queries is multiplied with the keys that it may see and with no others.
    """
    slices = query.chunk(2, -2) if zigzag else (query,)
    places = (rows.rank(), 2 * rows.size() - 1 - rows.rank())
    attended = []
    for mine, place in zip(slices, places, strict=False):
        length = mine.shape[-2]
        seen = min((place + 1) * length, key.shape[-2])
        attended.append(
            F.scaled_dot_product_attention(
                mine,
                key[..., :seen, :],
                value[..., :seen, :],
                attn_mask=_causal_mask(length, seen, place * length, query.device),
                dropout_p=dropout_p,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(attended, -2) if zigzag else attended[0]


def _causal_mask(num_queries: int, num_keys: int, first: int, device: torch.device) -> Tensor:
    """The mask of queries that stand at `first` and after; where there is a kernel for it, without memory."""
    if device.type == "cuda" and num_keys == first + num_queries:
        bias: Tensor = causal_lower_right(num_queries, num_keys)
        return bias
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(first)


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
        local = torch.var_mean(x.to(_wide(x.dtype)), _all_but_channels(x), correction=0)
        variances, means = _gather(torch.stack(local).unsqueeze(0), group, 0).unbind(1)
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
        shape = _per_channel(x)
        deviation = (variance + ctx.eps).sqrt().view(shape)
        normalized = (x - mean.view(shape)) / deviation
        dims = _all_but_channels(x)
        sums = torch.stack([gradient.sum(dims), (gradient * normalized).sum(dims)])
        count = x.numel() // x.shape[1] * ctx.group.size()
        shift, slope = (_reduce(sums, ctx.group) / count).view(2, *shape)
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


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x` `[t, k]`, sorted by expert, times the matrix of their expert in `weight` `[e, k, n]`.

    Expert e has the rows up to `ends[e]`; there are none past the last end.
    """
    if has_grouped_kernel(weight.dtype, weight.shape):
        made = F.grouped_mm(x, weight, offs=ends)
        if made.requires_grad:
            made.register_hook(Tensor.contiguous)  # the backward takes no expanded gradient
        return made
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        pieces.append(x[start:end] @ weight[expert])
        start = end
    return torch.cat(pieces)


def has_grouped_kernel(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether torch multiplies all groups with matrices `[e, k, n]` in one kernel: it wants rows of whole 16
    bytes."""
    is_aligned = all(size * dtype.itemsize % 16 == 0 for size in shape[1:])
    return dtype in (torch.bfloat16, torch.float16) and is_aligned


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    rows: Sequence[ProcessGroup] = (),
    classes: ProcessGroup | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of `logits` `[n, c]` with rows split over `rows`, each of these groups in turn, or
    classes over `classes`, or both.

    Over `rows` the result is partial: this rank's sum, divided by the number of valid targets on all of them.
    Over `classes` it is whole on every rank.
    """
    if classes is None:
        total = F.cross_entropy(
            logits, target, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    else:
        total = _vocab_parallel_sum(logits, target, classes, ignore_index, label_smoothing)
    if reduction == "sum":
        return total
    count = (target != ignore_index).sum()
    for group in rows:
        count = _reduce(count, group)
    return total / count


def _vocab_parallel_sum(
    logits: Tensor, target: Tensor, classes: ProcessGroup, ignore_index: int, label_smoothing: float
) -> Tensor:
    highest = funcol.wait_tensor(funcol.all_reduce(logits.detach().amax(-1), "max", classes))
    shifted = (logits - highest.unsqueeze(-1)).to(torch.promote_types(logits.dtype, torch.float32))
    log_normalizer = all_reduce(shifted.exp().sum(-1), classes).log()
    local = target - classes.rank() * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    picked = shifted.gather(-1, local.where(mine, 0).unsqueeze(-1)).squeeze(-1) * mine
    loss = log_normalizer - all_reduce(picked, classes)
    if label_smoothing:
        average = all_reduce(shifted.sum(-1), classes) / (logits.shape[-1] * classes.size())
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_normalizer - average)
    return loss.masked_fill(target == ignore_index, 0).sum().to(logits.dtype)


# --- modules ------------------------------------------------------------------------------------------------


class Parameters(nn.Module):
    """A module that only holds parameters, under the names they have in the original model."""

    def __init__(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))


class BatchNorm(nn.Module):
    """What a batch norm of the original model holds: parameters, and running statistics (`batch_norm`)."""

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_channels: int, momentum: float, affine: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.momentum = momentum
        for name in ("weight", "bias") if affine else ():
            self.register_parameter(name, nn.Parameter(torch.empty(num_channels, dtype=dtype)))
        with torch.device("cpu"):  # buffers are never built on the meta device
            self.register_buffer("running_mean", torch.zeros(num_channels, dtype=dtype))
            self.register_buffer("running_var", torch.ones(num_channels, dtype=dtype))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))


# --- products whose weights wait: backwards in two parts ----------------------------------------------------

Leftovers = list[tuple[nn.Parameter, Callable[[], Tensor]]]
"""Weights, and what computes the gradient of each."""

_LEFT: ContextVar[Leftovers | None] = ContextVar("left", default=None)
"""Where products that run now leave the gradients of their weights; None: they compute them themselves."""


def deferred_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, of which a schedule that splits backwards computes the weight's gradient later."""
    return _product(x, weight, True) if weight.grad_fn is None else F.linear(x, weight)


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


def leave_weights(stage: nn.Module) -> Callable[[], Callable[[], None]]:
    """Make the backward of a stage leave the gradients of its products' weights.

    Returns a function that takes over what the last backward left, and returns the function that computes it:
    the `dw_builder` of a `PipelineStage`. torch's own way to split a backward walks the graph twice, which
    computes checkpointed blocks again for every weight, and misses parameters that no path joins with an
    input.
    """
    left: Leftovers = []
    stage.register_forward_pre_hook(lambda *_: _set_left(left))
    stage.register_forward_hook(lambda *_: _set_left(None), always_call=True)

    def take() -> Callable[[], None]:
        mine = left.copy()
        left.clear()
        return partial(_finish, mine)

    return take


def _set_left(left: Leftovers | None) -> None:
    """Returns nothing, as a hook that changes nothing must."""
    _LEFT.set(left)


def _finish(left: Leftovers) -> None:
    if left:
        torch.autograd.backward([weight for weight, _ in left], [gradient() for _, gradient in left])


# --- parameters: from and to the original model's -----------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A parameter is split along `dim`; with `sections`, every one of these parts of the dimension is."""

    dim: int
    sections: Sections = None


Placements = Mapping[str, Mapping[str, Split]]
"""Pattern of parameter names -> mesh axis -> how it is split there. What no pattern matches is replicated."""


def _matches(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern` with a number for every `*`."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def placements_of(name: str, placements: Placements) -> Mapping[str, Split]:
    """How the parameter `name` is split."""
    return next((split for pattern, split in placements.items() if _matches(name, pattern)), {})


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory on `device` for the parameters of a model that was built on the meta device.

    Tied parameters stay tied; buffers, which are never built on meta, keep their values.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                fresh = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


Interval = tuple[int, int]
"""From the first up to the second, which is not in it."""


@dataclass(frozen=True)
class Layout:
    """Which rectangles of a tensor of the original model, of the shape `shape`, this rank holds.

    For each dimension the intervals that it holds, in the order in which they lie in its own memory.
    """

    shape: tuple[int, ...]
    intervals: tuple[tuple[Interval, ...], ...]

    @staticmethod
    def of(name: str, tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> Layout:
        """The layout of a parameter or buffer of a rank's model, split by `placements` and `fully_shard`."""
        splits = placements_of(name, placements)
        shape = list(tensor.shape)
        for axis, split in splits.items():
            shape[split.dim] *= mesh.get_group(axis).size()
        intervals: list[tuple[Interval, ...]] = [((0, size),) for size in shape]
        for axis, split in splits.items():
            held = intervals[split.dim]
            group, start = mesh.get_group(axis), 0
            mine: list[Interval] = []
            for size in _parts(sum(stop - first for first, stop in held), split.sections):
                begin = start + size // group.size() * group.rank()
                mine += _cut(held, begin, begin + size // group.size())
                start += size
            intervals[split.dim] = tuple(mine)
        if isinstance(tensor, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            intervals = [
                _cut(held, first, first + size)
                for held, first, size in zip(intervals, offsets, sizes, strict=True)
            ]
        return Layout(tuple(shape), tuple(intervals))

    def pieces(self, local: Tensor) -> Iterator[tuple[tuple[Interval, ...], Tensor]]:
        """Each rectangle, with the view of this rank's own memory where it lies."""
        for rectangle in product(*self.intervals):
            piece = local
            for dim, interval in enumerate(rectangle):
                before = self.intervals[dim][: self.intervals[dim].index(interval)]
                start = sum(stop - first for first, stop in before)
                piece = piece.narrow(dim, start, interval[1] - interval[0])
            yield rectangle, piece


def _cut(held: Sequence[Interval], start: int, stop: int) -> tuple[Interval, ...]:
    """What lies from `start` up to `stop` where the intervals lie one after the other."""
    found, position = [], 0
    for first, last in held:
        low, high = max(start, position), min(stop, position + last - first)
        if low < high:
            found.append((first + low - position, first + high - position))
        position += last - first
    return tuple(found)


class Held(torch.Tensor):
    """A tensor of the original model as `torch.distributed.checkpoint` takes it: the rectangles of it that
    this rank holds in `local`, by a protocol that DTensor follows too. It is written and read under any
    layout."""

    rectangles: Layout
    local: Tensor

    @staticmethod
    def __new__(cls, rectangles: Layout, local: Tensor) -> Held:
        made: Held = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(rectangles.shape), dtype=local.dtype, device=local.device
        )
        made.rectangles, made.local = rectangles, local
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, *_: Any) -> Any:
        # No part left to write: it has no elements to compute with, and checkpoints ask for none.
        raise NotImplementedError(
            f"{op}: what a rank holds of a tensor is saved and loaded, and nothing else"
        )

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(first for first, _ in rectangle), piece.shape)
            for rectangle, piece in self.rectangles.pieces(self.local)
        ]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(
            piece
            for rectangle, piece in self.rectangles.pieces(self.local)
            if torch.Size(first for first, _ in rectangle) == index.offset
        )


Weights = Mapping[str, Any] | Path
"""The original model's `state_dict`, or where it is on disk: a file of `torch.save`, safetensors or a
directory of them, or a checkpoint of `torch.distributed.checkpoint`."""


def load(
    model: nn.Module,
    weights: Weights,
    mesh: DeviceMesh,
    placements: Placements,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Fill the parameters and buffers of a rank's model with its part of the original model's weights; of
    what is on disk it reads no more.

    `aliases` are the further names of tied parameters, each with the first: one of them must be there.
    Raises ValueError where the weights are of another model.
    """
    tensors = model.state_dict(keep_vars=True)
    saved: Mapping[str, Any] = _opened(weights) if isinstance(weights, Path) else weights
    found = _found(tensors, saved, aliases)
    if isinstance(weights, Path) and (weights / ".metadata").is_file():
        held = {
            found[name]: (Layout.of(name, each, mesh, placements), each) for name, each in tensors.items()
        }
        state = {name: Held(layout, _local(each.detach())) for name, (layout, each) in held.items()}
        for name, each in state.items():
            _check_shape(name, saved[name].size, each.rectangles)
        _read(state, weights)
    else:
        for name, tensor in tensors.items():
            _fill(name, tensor, saved[found[name]], mesh, placements)


def _read(state: dict[str, Any], path: Path) -> None:
    """Fill what this rank holds from a checkpoint. Ranks need not agree, as each reads for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is not, nor needed here
        checkpoint_loader.load(state, checkpoint_id=path, no_dist=True)


def _opened(path: Path) -> Mapping[str, Any]:
    """Names in a file or directory of weights, with what can be sliced; of a checkpoint, with what it says
    of each tensor."""
    if (path / ".metadata").is_file():
        saved: Mapping[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
        return saved
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds neither safetensors nor a checkpoint of torch.distributed.checkpoint")
    if files[0].suffix != ".safetensors":
        tensors: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return tensors
    from safetensors import safe_open  # only those who have such files need the package

    opened: list[Any] = [safe_open(file, framework="pt") for file in files]
    # An open file is no mapping: it has keys, but cannot be iterated.
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


def _found(names: Collection[str], saved: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, str]:
    """For every name the one under which it is saved: by itself, or as part of what `train.py` saves."""
    is_of_training = any(key.startswith("optimizer.state.") for key in saved)
    attempts = [
        {
            name: prefix + each
            for name in names
            for each in _names(name, aliases)[::-1]
            if prefix + each in saved
        }
        for prefix in (("model.",) if is_of_training else ("", "model."))
    ]
    found = max(attempts, key=len)
    missing = next((name for name in names if name not in found), None)
    if missing is None:
        return found
    near = difflib.get_close_matches(missing, saved, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(
        f"the weights have no {missing!r}{hint}. Pass the state_dict() of the model that was planned"
    )


def _names(name: str, aliases: Mapping[str, str]) -> list[str]:
    """All names of a parameter, this one first."""
    first = aliases.get(name, name)
    return list(dict.fromkeys((name, first, *(each for each, of in aliases.items() if of == first))))


def _check_shape(name: str, shape: Sequence[int], layout: Layout) -> None:
    if tuple(shape) != layout.shape:
        raise ValueError(
            f"{name} has the shape {tuple(shape)} in the weights, {layout.shape} in the program. Pass the "
            "state_dict() of the model that the plan was made for"
        )


Recipe = tuple[tuple[Any, ...], ...]
"""How a parameter is initialised: names of in-place ops with their numbers, one after the other;
`("zero_row", i)` makes row i zero."""


def initialize(
    model: nn.Module,
    mesh: DeviceMesh,
    placements: Placements,
    recipes: Mapping[Recipe, Sequence[str]] = MappingProxyType({}),
    seed: int = 0,
) -> None:
    """Fresh parameters, the same on any mesh, of which each rank makes little more than its part.

    `recipes` tell how, with patterns of the names; without any, matrices are normal with deviation 0.02,
    vectors 1, biases 0. Buffers keep the values they were built with.
    Raises ValueError where there are recipes, but none for a parameter.
    """
    for name, parameter in model.named_parameters():
        patterns = ((recipe, pattern) for recipe, each in recipes.items() for pattern in each)
        recipe = next((recipe for recipe, pattern in patterns if _matches(name, pattern)), None)
        if recipe is None and recipes:
            raise ValueError(
                f"nothing is known of how {name} is initialised; give the weights of the model (--weights)"
            )
        layout = Layout.of(name, parameter, mesh, placements)
        usual = (
            ("normal_", 0.0, 0.02) if len(layout.shape) > 1 else ("fill_", float(not name.endswith("bias")))
        )
        _fill(name, parameter, _Drawn(name, layout.shape, recipe or (usual,), seed), mesh, placements)


@dataclass(frozen=True)
class _Drawn:
    """A fresh parameter of the original model. It is drawn by blocks of rows, each from a seed of its own, of
    which slicing makes those that it needs."""

    name: str
    shape: tuple[int, ...]
    recipe: Recipe
    seed: int

    def __getitem__(self, part: Any) -> Tensor:
        if not self.shape:
            return self._rows(0, 1)[0]
        size = max(1, 2**20 // max(1, math.prod(self.shape[1:])))
        start, stop = part[0].start, part[0].stop
        blocks = range(start // size * size, stop, size)
        rows = torch.cat([self._rows(first, min(first + size, self.shape[0])) for first in blocks])
        return rows[(slice(start - blocks.start, stop - blocks.start), *part[1:])]

    def _rows(self, first: int, last: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(f"{self.name} {first}".encode()))
        rows = torch.empty(last - first, *self.shape[1:])
        for op, *numbers in self.recipe:
            if op == "trunc_normal_":
                mean, deviation, low, high = numbers
                nn.init.trunc_normal_(rows, mean, deviation, low, high, generator)
            elif op in ("normal_", "uniform_"):
                getattr(rows, op)(*numbers, generator=generator)
            elif op != "zero_row":
                getattr(rows, op)(*numbers)
            elif first <= numbers[0] < last:
                rows[numbers[0] - first] = 0.0
        return rows


@torch.no_grad()
def _fill(name: str, tensor: Tensor, whole: Any, mesh: DeviceMesh, placements: Placements) -> None:
    """Give a tensor this rank's part of a whole value, which is sliced."""
    layout = Layout.of(name, tensor, mesh, placements)
    _check_shape(name, whole.get_shape() if hasattr(whole, "get_shape") else whole.shape, layout)
    for rectangle, piece in layout.pieces(_local(tensor)):
        part = whole[tuple(slice(*interval) for interval in rectangle)] if rectangle else whole[...]
        piece.copy_(part)


def gather(
    tensors: Mapping[str, Tensor],
    mesh: DeviceMesh,
    placements: Placements,
    like: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Whole tensors from every rank's part: of parameters, or of anything laid out like them (gradients).

    A copy of what `fully_shard` holds of a parameter is laid out as the one of this name in `like`.
    """
    result = {}
    for name, tensor in tensors.items():
        source = like.get(name, tensor)
        if isinstance(source, DTensor) and not isinstance(tensor, DTensor):
            local, shape, stride = tensor.to(source.device), source.shape, source.stride()
            tensor = DTensor.from_local(
                local, source.device_mesh, source.placements, shape=shape, stride=stride
            )
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for axis, split in reversed(list(placements_of(name, placements).items())):
            whole = _gather(whole, mesh.get_group(axis), split.dim, split.sections)
        result[name] = whole.detach()
    if "pp" in (mesh.mesh_dim_names or ()):
        stages: list[dict[str, Tensor]] = [{} for _ in range(mesh.get_group("pp").size())]
        dist.all_gather_object(stages, result, mesh.get_group("pp"))
        result = {name: tensor for stage in stages for name, tensor in stage.items()}
    return result


# --- gradients ----------------------------------------------------------------------------------------------


class GradientBuckets:
    """The gradients of parameters that every rank of `group` holds whole, summed over the group while the
    backward of the last of `num_microbatches` still runs.

    They are views of flat buckets, in the order in which gradients arrive in the first step; a bucket is
    reduced as soon as it is complete and the one before it is under way, so that all ranks reduce them in
    the same order. What nothing computes a gradient of stays without.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: ProcessGroup,
        num_microbatches: int,
        bucket_bytes: int = 32 * 2**20,
    ) -> None:
        self.parameters = dict.fromkeys(parameters)
        self.group, self.num_microbatches, self.bucket_bytes = group, num_microbatches, bucket_bytes
        self.buckets: list[_Bucket] = []
        self.num_arrived: Counter[nn.Parameter] = Counter()
        self.reductions: list[dist.Work] = []
        for parameter in self.parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._arrive)

    def clear(self) -> None:
        """Begin a step with gradients of zero."""
        self.reductions = []
        if self.buckets:
            self.num_arrived.clear()
        for bucket in self.buckets:
            bucket.clear()

    def reduce(self) -> None:
        """Sum what the backward has not begun to, and wait for all of it."""
        if not self.buckets:
            arrived = [each for each in (*self.num_arrived, *self.parameters) if each.grad is not None]
            self.buckets = [_Bucket.of(each) for each in _runs(dict.fromkeys(arrived), self.bucket_bytes)]
        while len(self.reductions) < len(self.buckets):
            self._reduce_next()
        for reduction in self.reductions:
            reduction.wait()

    def _arrive(self, parameter: Tensor) -> None:
        self.num_arrived[cast(nn.Parameter, parameter)] += 1
        while len(self.reductions) < len(self.buckets) and self._is_complete(
            self.buckets[len(self.reductions)]
        ):
            self._reduce_next()

    def _is_complete(self, bucket: _Bucket) -> bool:
        return all(self.num_arrived[each] == self.num_microbatches for each in bucket.views)

    def _reduce_next(self) -> None:
        bucket = self.buckets[len(self.reductions)]
        self.reductions.append(dist.all_reduce(bucket.flat, group=self.group, async_op=True))


@dataclass(frozen=True)
class _Bucket:
    """Flat memory for the gradients of some parameters of one dtype."""

    flat: Tensor
    views: Mapping[nn.Parameter, Tensor]

    @staticmethod
    def of(parameters: Sequence[nn.Parameter]) -> _Bucket:
        """A bucket with the gradients that the parameters have."""
        gradients = [cast(Tensor, each.grad) for each in parameters]
        flat = torch.cat([each.reshape(-1) for each in gradients])
        parts = flat.split([each.numel() for each in gradients])
        views = {each: part.view_as(each) for each, part in zip(parameters, parts, strict=True)}
        for parameter, view in views.items():
            parameter.grad = view
        return _Bucket(flat, views)

    def clear(self) -> None:
        self.flat.zero_()
        for parameter, view in self.views.items():
            parameter.grad = view


def _runs(parameters: Iterable[nn.Parameter], num_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, cut where the dtype of gradients changes or a run has so many bytes of them."""
    run: list[nn.Parameter] = []
    run_bytes = 0
    for parameter in parameters:
        gradient = cast(Tensor, parameter.grad)
        if run and (cast(Tensor, run[0].grad).dtype != gradient.dtype or run_bytes >= num_bytes):
            yield run
            run, run_bytes = [], 0
        run.append(parameter)
        run_bytes += gradient.nbytes
    if run:
        yield run


def sum_gradients(
    parameters: Iterable[nn.Parameter], group: ProcessGroup, bucket_bytes: int = 32 * 2**20
) -> None:
    """Sum gradients over `group`, in flat buckets. Of a parameter under `fully_shard`, its shard's."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if bucket and (
            local.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + local.nbytes > bucket_bytes
        ):
            _sum_bucket(bucket, group)
            bucket = []
        bucket.append(local)
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(bucket: Sequence[Tensor], group: ProcessGroup) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def matching(model: nn.Module, patterns: Iterable[str]) -> list[nn.Parameter]:
    """The parameters whose name matches one of the patterns."""
    patterns = tuple(patterns)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(_matches(name, pattern) for pattern in patterns)
    ]


@torch.no_grad()
def gradient_norm(
    stages: Iterable[nn.Module], mesh: DeviceMesh, placements: Placements, tied: Iterable[Tied] = ()
) -> Tensor:
    """The norm of the gradient of the whole model, on every rank: each element counts once, however many
    ranks and stages hold it."""
    further = {copy for each in tied for copy in each.further}
    held: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None and parameter not in further:
                num_parts = _num_parts(name, parameter.grad, mesh, placements)
                held.setdefault((num_parts, parameter.grad.dtype), []).append(_local(parameter.grad))
    num_holders = mesh.size() // (mesh["pp"].size() if "pp" in (mesh.mesh_dim_names or ()) else 1)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for (num_parts, dtype), gradients in held.items():
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=_wide(dtype)))
        total += norms.double().square().sum() * num_parts / num_holders
    dist.all_reduce(total)
    return total.sqrt()


def _num_parts(name: str, gradient: Tensor, mesh: DeviceMesh, placements: Placements) -> int:
    """How many different parts of a gradient the ranks of a stage hold."""
    parts = [mesh.get_group(axis).size() for axis in placements_of(name, placements)]
    if isinstance(gradient, DTensor):
        shards = enumerate(gradient.placements)
        parts += [gradient.device_mesh.size(dim) for dim, placement in shards if placement.is_shard()]
    return math.prod(parts)


@torch.no_grad()
def clip_gradients(
    stages: Sequence[nn.Module],
    largest_norm: float,
    mesh: DeviceMesh,
    placements: Placements,
    tied: Iterable[Tied] = (),
) -> Tensor:
    """Scale all gradients such that together they have at most the norm `largest_norm`.

    Returns the norm that they had, on every rank; as `torch.nn.utils.clip_grad_norm_` of the whole model.
    """
    norm = gradient_norm(stages, mesh, placements, tied)
    if largest_norm == math.inf:
        return norm
    factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in {each for stage in stages for each in stage.parameters()}:
        if parameter.grad is not None:
            _local(parameter.grad).mul_(factor)
    return norm


# --- optimizers with wide copies, and the scale of narrow gradients -----------------------------------------


class LocalAdamW(torch.optim.AdamW):
    """AdamW on this rank's own memory: plain tensors, which torch updates many at a time, where DTensors go
    one by one. `masters` has what it updates of each parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        masters = {each: _local(each.detach()).to(self.master_dtype(each.dtype)) for each in parameters}
        super().__init__(masters.values(), fused=torch.cuda.is_available(), **settings)
        self.masters = masters

    def master_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    @torch.no_grad()
    # torch's takes a closure that computes the loss again, which a pipeline cannot.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for parameter, master in self.masters.items():
            if parameter.dtype == master.dtype:
                master.data = _local(parameter).data  # `fully_shard` moves uneven shards when it first runs
            master.grad = None if parameter.grad is None else _local(parameter.grad).to(master.dtype)
        super().step()
        for parameter, master in self.masters.items():
            master.grad = None
            if parameter.dtype != master.dtype:
                _local(parameter).copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.masters:
            parameter.grad = None


class MasterAdamW(LocalAdamW):
    """AdamW on copies of narrow parameters in single precision (arXiv:1710.03740): updates that the
    parameters, which products read, would round away add up in them."""

    def master_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return _wide(dtype)


class HostAdamW:
    """AdamW on copies of the parameters in the host's memory, where its states are too (ZeRO-Offload,
    arXiv:2101.06840). Copies have single precision at least: of narrower parameters they are master copies.

    A step fetches all gradients, then updates one parameter after the other, each of which goes back to its
    device while the host works on the next.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: float) -> None:
        self._hosted = [_Hosted.of(parameter, settings) for parameter in parameters]
        self.masters = {each.parameter: each.copy for each in self._hosted}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The settings, one group for each parameter: what a schedule of learning rates changes."""
        return [group for each in self._hosted for group in each.optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The states of every copy."""
        return {each.copy: each.optimizer.state[each.copy] for each in self._hosted}

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        fetched = [(each, each.fetch()) for each in self._hosted if each.parameter.grad is not None]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for each, gradient in fetched:
            each.copy.grad = gradient.to(each.copy.dtype)
            each.optimizer.step()
            each.copy.grad = None
            each.buffer.copy_(each.copy)
            _local(each.parameter).copy_(each.buffer, non_blocking=True)

    def zero_grad(self) -> None:
        for each in self._hosted:
            each.parameter.grad = None


@dataclass(frozen=True)
class _Hosted:
    """A parameter, its copy in the host's memory with an optimizer of its own, and the buffer through which
    both its gradient and what becomes of it travel."""

    parameter: nn.Parameter
    copy: Tensor
    buffer: Tensor
    optimizer: torch.optim.AdamW

    @staticmethod
    def of(parameter: nn.Parameter, settings: Mapping[str, Any]) -> _Hosted:
        local = _local(parameter.detach())
        copy = local.to("cpu", _wide(local.dtype), copy=True)
        buffer = torch.empty_like(local, device="cpu", pin_memory=torch.cuda.is_available())
        return _Hosted(parameter, copy, buffer, torch.optim.AdamW([copy], **settings))

    def fetch(self) -> Tensor:
        """The gradient in the host's memory, as soon as the device is through with it."""
        assert self.parameter.grad is not None
        return self.buffer.copy_(_local(self.parameter.grad), non_blocking=True)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


Optimizer = torch.optim.AdamW | HostAdamW


def updated(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimizer updates, by the name of the parameter: the parameter itself, or its master copy."""
    masters: Mapping[nn.Parameter, Tensor] = getattr(optimizer, "masters", {})
    return {name: masters.get(each, each) for name, each in parameters.items()}


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
                parameter.grad_dtype = None  # any
                parameter.grad = parameter.grad.to(_wide(parameter.grad.dtype)) / self.value

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

# --- checkpoints: written under one plan, read under any ----------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a rank trains, and how it is cut out of the original model: what a checkpoint is made of."""

    stages: Sequence[nn.Module]
    optimizer: Optimizer
    mesh: DeviceMesh
    placements: Placements
    aliases: Mapping[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """This rank's part by the names of the original model: under `model.` its `state_dict`, in master
        copies where there are some, and under `optimizer.state.` the states of each parameter."""
        state: dict[str, Any] = {}
        for stage in self.stages:
            held = stage.state_dict(keep_vars=True)
            newest = updated(held, self.optimizer)
            for name, tensor in held.items():
                layout = Layout.of(name, tensor, self.mesh, self.placements)
                for each in _names(name, self.aliases):
                    state[f"model.{each}"] = Held(layout, _local(newest[name].detach()))
                first = self.aliases.get(name, name)
                for key, value in self.optimizer.state.get(newest[name], {}).items():
                    whole = value.dim() == 0 and tensor.dim() > 0
                    state[f"optimizer.state.{first}.{key}"] = value if whole else Held(layout, _local(value))
        return state

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take this rank's part of a checkpoint of the same model, whatever plan wrote it; call it before the
        first step.

        Raises ValueError where the checkpoint is of another model.
        """
        saved = _opened(path)
        for stage in self.stages:
            held = stage.state_dict(keep_vars=True)
            for name, tensor in updated(held, self.optimizer).items():
                if f"optimizer.state.{self.aliases.get(name, name)}.exp_avg" in saved:
                    moments = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[tensor].update(step=torch.zeros(()), **moments)
        state = self.state()
        _found([name.removeprefix("model.") for name in state if name.startswith("model.")], saved, {})
        for name, each in state.items():
            if isinstance(each, Held):
                _check_shape(name, saved[name].size, each.rectangles)
        _read(state, path)
        for parameter, master in getattr(self.optimizer, "masters", {}).items():
            _local(parameter).copy_(master)


class Checkpoints:
    """The checkpoints of a run, `step-N` in a directory that all ranks see (None: there are none). They are
    written while training goes on; the newest `num_kept` stay."""

    def __init__(self, directory: Path | None, num_kept: int = 2) -> None:
        self.directory, self.num_kept = directory, num_kept
        self.group = dist.new_group(backend="gloo")
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[None] | None = None

    def complete(self) -> list[tuple[int, Path]]:
        """Steps and paths of the checkpoints that were written to the end, the newest last."""
        found = [path.parent for path in self.directory.glob("step-*/.metadata")] if self.directory else []
        return sorted((int(path.name.removeprefix("step-")), path) for path in found)

    def resume(self, trained: Trained) -> dict[str, Any]:
        """Take what the newest checkpoint holds; returns what `save` was given beside it, `{}` where there is
        none."""
        if not self.complete():
            return {}
        path = self.complete()[-1][1]
        trained.restore(path)
        noted: dict[str, Any] = json.loads((path / "progress.json").read_text())
        return noted

    def save(self, step: int, trained: Trained, **progress: Any) -> None:
        """Begin to write a checkpoint: copies what is to be written, and waits for the one before."""
        self.wait()
        if self.directory is not None:
            state = {name: _staged(value) for name, value in trained.state().items()}
            path = self.directory / f"step-{step}"
            self.written = self.writer.submit(self._write, path, state, {"step": step, **progress})

    def wait(self) -> None:
        """Until what was begun is written."""
        if self.written is not None:
            self.written.result()

    def _write(self, path: Path, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        if dist.get_rank() == 0:
            path.mkdir(parents=True, exist_ok=True)
            (path / "progress.json").write_text(json.dumps(progress))
        checkpoint_saver.save(dict(state), checkpoint_id=path, process_group=self.group)
        if dist.get_rank() == 0:
            for _, old in self.complete()[: -self.num_kept]:
                shutil.rmtree(old)


def _staged(value: Tensor) -> Tensor:
    """A copy in the host's memory, which training does not change."""
    if isinstance(value, Held):
        return Held(value.rectangles, value.local.to("cpu", copy=True))
    return value.to("cpu", copy=True)


# --- training: options, data, log ---------------------------------------------------------------------------


def training_options(description: str | None) -> argparse.Namespace:
    """The command line of `train.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=10, help="optimizer steps in all, those before a restart included")
    add("--data", help=f"{_SOURCES}; default: random samples")
    add("--token-dtype", default="uint16", help="of a file of tokens (default: uint16)")
    add("--shift", action="store_true", help="labels are the next tokens: for models that do not shift them")
    add("--workers", type=int, default=0, help="processes that read data")
    add("--weights", type=Path, help="of the original model: torch.save, safetensors or a checkpoint")
    add("--checkpoints", type=Path, help="directory to save to, and to resume from where it has any")
    add("--save-every", type=int, default=1000, metavar="STEPS")
    add("--learning-rate", type=float, default=1e-3, help="at its highest")
    add("--warmup", type=int, default=0, metavar="STEPS", help="of rising learning rate; then a cosine")
    add("--final-rate", type=float, default=1.0, help="share of the learning rate at the last step")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95))
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=math.inf, help="largest norm of all gradients together")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=1, metavar="STEPS")
    add("--tensorboard", type=Path, help="directory of its event files")
    return parser.parse_args()


def start() -> torch.device:
    """Join the process group and return this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """What step `step`, counted from 0, is taken with: a linear rise, then half a cosine down to the final
    rate."""
    if step < options.warmup:
        return float(options.learning_rate * (step + 1) / options.warmup)
    gone = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    left = (1 + math.cos(math.pi * gone)) / 2
    return float(options.learning_rate * (options.final_rate + (1 - options.final_rate) * left))


def set_learning_rate(optimizer: Optimizer, step: int, options: argparse.Namespace) -> float:
    """Let the optimizer take step `step` with its learning rate, and return it."""
    rate = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def seed_step(step: int, mesh: DeviceMesh, options: argparse.Namespace) -> None:
    """Random numbers of a step, of dropout above all: after a restart the same again, and the same on ranks
    that share samples."""
    number, count = _place(mesh, JOINT["dp_cp"])
    torch.manual_seed((options.seed * options.steps + step) * count + number)


def replica(mesh: DeviceMesh) -> tuple[int, int]:
    """The number of this rank's data-parallel replica, and how many there are."""
    return _place(mesh, JOINT["dp"])


def _place(mesh: DeviceMesh, axes: Sequence[str]) -> tuple[int, int]:
    """The number of this rank among those along some axes, and how many there are."""
    number, count = 0, 1
    for axis in mesh.mesh_dim_names or ():
        if axis in axes:
            number, count = number * mesh[axis].size() + mesh.get_local_rank(axis), count * mesh[axis].size()
    return number, count


def replica_part(batch: Mapping[str, Tensor], mesh: DeviceMesh, device: torch.device) -> dict[str, Tensor]:
    """The samples of a global batch that this rank's replica takes."""
    number, count = replica(mesh)
    return {name: rows.chunk(count)[number].to(device) for name, rows in batch.items()}


Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype, int]]
"""Of every model input the shape of one sample, the dtype, and the number of values of an integer one."""

Sample = dict[str, Tensor]

_SOURCES = (
    "a file of tokens; a directory of datasets.save_to_disk; a dict of tensors, one row a sample "
    "(torch.save, .pt); or FILE.py:NAME, a function that returns samples by index or one after the other"
)


def open_data(options: argparse.Namespace, inputs: Inputs, tokens: str = "", labels: str = "") -> Any:
    """Samples, dicts of the model's inputs, by index or as an iterable: what `--data` names.

    `tokens` and `labels` are the inputs that a file of tokens fills.
    Raises ValueError where it is nothing of that kind.
    """
    given: str | None = options.data
    if given is None:
        return _Synthetic(inputs, options.seed)
    file, _, function = given.rpartition(":")
    if file.endswith(".py"):
        return runpy.run_path(file)[function]()
    path = Path(given)
    if path.is_dir():
        datasets = import_module("datasets")  # only those who have such a directory need the package
        return datasets.load_from_disk(given).with_format("torch", columns=list(inputs))
    if path.suffix == ".pt":
        return _Rows(torch.load(path, mmap=True, weights_only=True))
    if path.is_file() and not tokens:
        raise ValueError(f"--data {given}: no file of tokens can feed {', '.join(inputs)}")
    if path.is_file():
        return _TokenFile(path, getattr(torch, options.token_dtype), inputs, tokens, labels, options.shift)
    raise ValueError(f"--data {given}: no such file or directory; give {_SOURCES}")


class _Synthetic(Dataset[Sample]):
    """Random samples, each by the seed of its number."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        self.inputs, self.seed = inputs, seed

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self.seed * len(self) + index)
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype)
            if dtype.is_floating_point
            else torch.randint(num_values, shape, generator=generator, dtype=dtype)
            for name, (shape, dtype, num_values) in self.inputs.items()
        }


class _Rows(Dataset[Sample]):
    """The rows of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> Sample:
        return {name: each[index] for name, each in self.tensors.items()}


class _TokenFile(Dataset[Sample]):
    """Pieces of a file of tokens as long as a sample; masks among the inputs let everything through."""

    def __init__(
        self, path: Path, dtype: torch.dtype, inputs: Inputs, tokens: str, labels: str, shift: bool
    ) -> None:
        self.inputs, self.tokens, self.labels, self.shift = inputs, tokens, labels, int(shift)
        self.length = math.prod(inputs[tokens][0])
        size = path.stat().st_size // dtype.itemsize
        self.data = torch.from_file(str(path), shared=False, size=size, dtype=dtype)  # in memory as read
        if len(self) < 1:
            raise ValueError(f"{path} has {size:,} tokens of {dtype}, a sample takes {self.length:,}")

    def __len__(self) -> int:
        return (len(self.data) - self.shift) // self.length

    def __getitem__(self, index: int) -> Sample:
        def read(first: int, name: str) -> Tensor:
            shape, dtype, num_values = self.inputs[name]
            found = self.data[first : first + self.length].to(dtype).view(shape)
            if found.max() >= num_values:
                raise ValueError(
                    f"token {int(found.max())} in the data, but the model knows {num_values}; was it written "
                    "with another tokenizer, or is --token-dtype another one?"
                )
            return found

        first = index * self.length
        sample = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype, _) in self.inputs.items()}
        sample[self.tokens] = read(first, self.tokens)
        sample[self.labels] = read(first + self.shift, self.labels)
        return sample


def shuffled(position: int, num_samples: int, seed: int) -> int:
    """The sample at a position of an endless run through all samples, every epoch in an order of its own.

    The order is never written down: a Feistel network permutes the numbers below a power of 4, and what is
    not a sample is permuted again.
    """
    epoch, index = divmod(position, num_samples)
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(4):
            key = f"{seed} {epoch} {turn} {right}".encode()
            mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
            left, right = right, left ^ mixed & (1 << half) - 1
        index = left << half | right
        if index < num_samples:
            return index


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """The samples that one replica takes at each step: known by the number of the step alone, so that a
    restart goes on where training was."""

    num_samples: int
    first_step: int
    num_steps: int
    replica: int
    num_replicas: int
    batch: int
    seed: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.num_steps):
            first = (step * self.num_replicas + self.replica) * self.batch
            yield [shuffled(first + row, self.num_samples, self.seed) for row in range(self.batch)]

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step)


class _Part(IterableDataset[Sample]):
    """What one replica takes of an iterable, from one step on."""

    def __init__(self, samples: Any, first_step: int, replica: int, num_replicas: int, batch: int) -> None:
        self.samples, self.skipped = samples, first_step * num_replicas * batch
        self.replica, self.num_replicas, self.batch = replica, num_replicas, batch

    def __iter__(self) -> Iterator[Sample]:
        if hasattr(self.samples, "skip"):
            left = iter(self.samples.skip(self.skipped))
        else:
            left = islice(iter(self.samples), self.skipped, None)
        for number, sample in enumerate(left):
            if number // self.batch % self.num_replicas == self.replica:
                yield sample


def batches(
    samples: Any, mesh: DeviceMesh, batch: int, first_step: int, options: argparse.Namespace
) -> Iterable[Sample]:
    """What this rank's replica trains on at each step from `first_step` on: `batch` samples.

    Samples by index are shuffled; of an iterable, replicas take `batch` in turn.
    """
    number, count = replica(mesh)
    pinned = torch.cuda.is_available()
    if not hasattr(samples, "__getitem__"):
        part = _Part(samples, first_step, number, count, batch)
        return DataLoader(part, batch, drop_last=True, num_workers=min(1, options.workers), pin_memory=pinned)
    sampler = StepSampler(len(samples), first_step, options.steps, number, count, batch, options.seed)
    return DataLoader(samples, batch_sampler=sampler, num_workers=options.workers, pin_memory=pinned)


@dataclass(frozen=True)
class Expected:
    """What a plan says of a step: tokens of all replicas, the model's FLOPs on one device (without what is
    computed again) and its peak, and how long the step takes."""

    tokens: int
    model_flops: float
    peak_flops_per_s: float
    step_s: float

    def utilization(self, step_s: float) -> float:
        """The model FLOPs utilization (MFU, arXiv:2204.02311, appendix B) of a step that takes `step_s`."""
        return self.model_flops / step_s / self.peak_flops_per_s


class Log:
    """Tells how training goes, on rank 0: printed, and as scalars in TensorBoard."""

    def __init__(self, expected: Expected, options: argparse.Namespace) -> None:
        self.expected, self.every, self.began_s = expected, options.log_every, time.perf_counter()
        self.num_steps = 0
        self.writer: Any = None
        if options.tensorboard and dist.get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # only those who ask for it need the package

            self.writer = SummaryWriter(str(options.tensorboard))

    def step(self, step: int, **values: float | Tensor) -> None:
        """Note step `step`, counted from 1; reads the values where they are due to be told."""
        self.num_steps += 1
        if step % self.every:
            return
        numbers = {name: float(value) for name, value in values.items()}
        step_s = (time.perf_counter() - self.began_s) / self.num_steps
        expected = self.expected
        speeds = {
            "tokens/s": expected.tokens / step_s,
            "MFU": expected.utilization(step_s),
            "MFU/predicted": expected.step_s / step_s,
        }
        if dist.get_rank() == 0:
            told = "  ".join(f"{name} {value:.6g}" for name, value in (numbers | speeds).items())
            print(f"step {step}  {told}", flush=True)
            if self.writer is not None:
                for name, value in (numbers | speeds).items():
                    self.writer.add_scalar(name, value, step)
        self.num_steps, self.began_s = 0, time.perf_counter()


# --- building and running a program -------------------------------------------------------------------------


JOINT = {
    "dp": ("dp_replicate", "dp_shard", "ep"),
    "dp_cp": ("dp_replicate", "dp_shard", "ep", "cp"),
    "shard": ("dp_shard", "ep", "cp"),
    "expert_dp": ("dp_replicate", "dp_shard", "cp"),
    "expert_shard": ("dp_shard", "cp"),
}
"""What ranks along several axes are together: replicas; replicas with ranks of a context axis, which compute
gradients of the same parameters from other tokens; those that ZeRO shards over; and the last two of experts,
of which the ranks along `ep` have different ones."""


def joint(axes: Collection[str], name: str) -> str | None:
    """The axis of a mesh with these `axes` that stands for one of `JOINT`: the only one that it has of them,
    or the first joint axis with the same ranks. None where it has none of them."""
    present = {key: tuple(axis for axis in axes if axis in parts) for key, parts in JOINT.items()}
    if len(present[name]) < 2:
        return present[name][0] if present[name] else None
    return next(key for key, parts in present.items() if parts == present[name])


def make_mesh(device_type: str, axes: Mapping[str, int]) -> DeviceMesh:
    """The device mesh of a program, outermost axis first, with the joint axes of `JOINT`."""
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    for name in JOINT:
        if joint(axes, name) == name:
            _joined(mesh, name)
    return mesh


def _joined(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The mesh of the ranks along all axes of `JOINT[name]` that there are: made once, then found again."""
    axes = mesh.mesh_dim_names or ()
    part = mesh[tuple(axis for axis in axes if axis in JOINT[name])]
    return part if part.ndim == 1 else part._flatten(joint(axes, name))


def sharding_mesh(mesh: DeviceMesh, name: str = "shard") -> DeviceMesh:
    """The axes over which ZeRO works: shards, and outside of them replicas."""
    shards = _joined(mesh, name)
    if "dp_replicate" not in (mesh.mesh_dim_names or ()):
        return shards
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards])


def experts_of(stage: nn.Module, placements: Placements) -> list[nn.Parameter]:
    """The parameters of a stage of which the ranks along `ep` hold different experts."""
    named = stage.named_parameters()
    return [parameter for name, parameter in named if "ep" in placements_of(name, placements)]


def shard_parameters(
    stage: nn.Module,
    blocks: Sequence[str],
    mesh: DeviceMesh,
    zero_stage: int,
    precision: MixedPrecision | None = None,
    experts: Collection[nn.Parameter] = (),
) -> None:
    """ZeRO through `fully_shard`: each block (by pattern of its path) by itself, what is left with the stage.

    Gradients are summed, not averaged: the loss of each rank is already divided by the count of all. Stage 3
    frees gathered parameters after the forward; 1 and 2 keep them until the optimizer has run. With
    `precision` the shards are master copies. Scalars and parameters of an unusual dtype, which `fully_shard`
    does not take, stay whole (`unsharded_parameters`). Modules of `experts` are sharded by themselves, over
    the ranks that hold the same ones.
    """
    units = [module for name, module in stage.named_modules() if any(_matches(name, each) for each in blocks)]
    dtypes: Counter[torch.dtype] = Counter()
    for parameter in stage.parameters():
        dtypes[parameter.dtype] += parameter.numel()
    usual = dtypes.most_common(1)[0][0] if dtypes else None
    left = {each for each in stage.parameters() if each.ndim == 0 or each.dtype != usual}
    policy = MixedPrecisionPolicy()
    if precision is not None:
        policy = precision.widen(each for each in stage.parameters() if each not in left)
    options: dict[str, Any] = {
        "reshard_after_forward": zero_stage == 3,
        "mp_policy": policy,
        "ignored_params": left,
    }
    apart = set(experts)
    holders = [each for each in stage.modules() if not apart.isdisjoint(each.parameters(recurse=False))]
    for module in (*holders, *units, stage):
        over = sharding_mesh(mesh, "expert_shard" if module in holders else "shard")
        sharded = fully_shard(module, mesh=over, **options)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class MixedPrecision:
    """Parameters are stored and updated in `master`, read in `compute`; gradients are reduced in
    `gradient`."""

    compute: torch.dtype
    master: torch.dtype
    gradient: torch.dtype

    def widen(self, parameters: Iterable[nn.Parameter]) -> MixedPrecisionPolicy:
        """Give parameters, still on the meta device, the dtype in which they are stored."""
        for parameter in parameters:
            parameter.data = parameter.data.to(self.master)
        return MixedPrecisionPolicy(self.compute, self.gradient, cast_forward_inputs=False)


def unsharded_parameters(stage: nn.Module) -> list[nn.Parameter]:
    """The parameters of a stage that `fully_shard` left whole, whose gradients ranks sum themselves."""
    return [parameter for parameter in stage.parameters() if not isinstance(parameter, DTensor)]


def sync_in_backward(stage: nn.Module, enabled: bool) -> None:
    """Whether the backward of a stage under `fully_shard` reduces gradients, or only adds them up."""
    assert isinstance(stage, FSDPModule), "only a stage whose parameters are sharded has gradients to reduce"
    stage.set_requires_gradient_sync(enabled)


SPLIT_BACKWARD = {"InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"}
"""Schedules that compute the gradients of weights apart from those of activations."""


Border = Sequence[tuple[tuple[int, ...], torch.dtype] | tuple[tuple[int, ...], torch.dtype, Literal[False]]]
"""Shape and dtype of each tensor that passes between two stages; a third item tells that numbers have no
gradient."""


def pipeline(
    stages: Mapping[int, nn.Module],
    borders: Sequence[Border],
    schedule: str,
    num_microbatches: int,
    mesh: DeviceMesh,
    device: torch.device,
) -> PipelineSchedule:
    """The schedule that drives this rank's `stages`, given by their number in the pipeline.

    `borders[i]` is what stage i receives; the last stage returns the loss.
    """

    def activations(border: Border) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty(shape, dtype=dtype, device=device).requires_grad_(
                dtype.is_floating_point and not never
            )
            for shape, dtype, *never in border
        )

    for module in stages.values():
        module.register_forward_hook(_contiguous)

    kind = get_schedule_class(schedule)
    splits_backward = schedule in SPLIT_BACKWARD
    built: list[Any] = [
        PipelineStage(
            module,
            index,
            len(borders) - 1,
            device,
            input_args=activations(borders[index]),
            output_args=activations(borders[index + 1]),
            group=mesh.get_group("pp"),
            dw_builder=leave_weights(module) if splits_backward else None,
        )
        for index, module in stages.items()
    ]
    options = {"loss_fn": lambda loss, _: loss / num_microbatches, "scale_grads": False}
    several = issubclass(kind, PipelineScheduleMulti)
    made: PipelineSchedule = kind(built if several else built[0], num_microbatches, **options)
    return made


def _contiguous(module: nn.Module, args: object, sent: Tensor | tuple[Tensor, ...]) -> object:
    """What a stage returns, as it can be sent."""
    return sent.contiguous() if isinstance(sent, Tensor) else tuple(each.contiguous() for each in sent)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a forward under `checkpoint`, and around the one that computes it again."""

KINDS = {
    "products": r"aten::(mm|addmm|convolution|_grouped_mm)",
    "batched_products": r"aten::(bmm|baddbmm)",
    "attention": r"aten::_scaled_dot_product\w*",
    "collectives": r"_c10d_functional::(all|reduce)_\w+",
    "received": r"_c10d_functional::\w+",  # what waits for the collective before it, and goes with it
}
"""The ops whose results may be kept; the first pattern that fits counts."""


def checkpointed(block: nn.Module, contexts: Callable[[], Contexts] | None, *args: Tensor) -> Any:
    """What a block makes of `args`; with `contexts` it computes again in the backward what these do not
    keep."""
    if contexts is None:
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def keep_nothing() -> Contexts:
    """Recomputation of everything."""
    return nullcontext(), nullcontext()


def keep(**numbers: Sequence[int]) -> Callable[[], Contexts]:
    """Recomputation of all but some results: of each of `KINDS` the ops with these numbers, counted from 0 as
    a block runs them."""

    def contexts() -> Contexts:
        forward, recomputation = create_selective_checkpoint_contexts(_Kept(numbers))
        return forward, recomputation

    return contexts


class _Kept:
    """Counts the ops of one run of a block."""

    def __init__(self, numbers: Mapping[str, Sequence[int]]) -> None:
        self.numbers = numbers
        self.counts: Counter[tuple[bool, str | None]] = Counter()
        self.is_received = False

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = _kind(op)
        if kind == "received":
            is_kept = self.is_received
        else:
            at = (context.is_recompute, kind)
            is_kept = kind is not None and self.counts[at] in self.numbers.get(kind, ())
            self.counts[at] += 1
            if kind == "collectives":
                self.is_received = is_kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kind(op: Any) -> str | None:
    name = op.name().split(".")[0] if hasattr(op, "name") else str(op)
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), None)


def keep_matmuls() -> Contexts:
    """Selective recomputation: keep the results of matrix products, attention and collectives, compute the
    rest again."""
    forward, recomputation = create_selective_checkpoint_contexts(_keep_matmul)
    return forward, recomputation


def _keep_matmul(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE if _kind(op) is None else CheckpointPolicy.MUST_SAVE


@dataclass(frozen=True)
class Tied:
    """The copies of one parameter that the stages of a rank hold, and the ranks that hold further ones."""

    copies: tuple[nn.Parameter, ...]
    group: ProcessGroup | None

    @property
    def further(self) -> tuple[nn.Parameter, ...]:
        """Those of this rank's copies that are not the first one of all."""
        return self.copies[1:] if self.group is None or self.group.rank() == 0 else self.copies


def tied_parameters(
    stages: Mapping[int, nn.Module],
    ties: Sequence[Mapping[int, str]],
    ranks_of_stages: Sequence[int],
    mesh: DeviceMesh,
) -> list[Tied]:
    """The parameters of this rank that several stages have copies of.

    A tie gives the path of the parameter in each stage that has it; all copies take the values of the first.
    Every rank must call this: all make each group.
    """
    axis = (mesh.mesh_dim_names or ()).index("pp")
    lines = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist()
    found = []
    for tie in ties:
        for line in lines:
            members = list(dict.fromkeys(line[ranks_of_stages[index]] for index in tie))
            group = dist.new_group(members) if len(members) > 1 else None
            if dist.get_rank() in members:
                copies = (stages[index].get_parameter(path) for index, path in tie.items() if index in stages)
                found.append(Tied(tuple(copies), group))
                _share([_local(each.detach()) for each in found[-1].copies], group, members[0])
    return found


def sum_tied_gradients(tied: Iterable[Tied]) -> None:
    """Give all copies of a parameter the sum of their gradients."""
    for each in tied:
        gradients = [_local(copy.grad) for copy in each.copies if copy.grad is not None]
        for gradient in gradients[1:]:
            gradients[0].add_(gradient)
        _share(gradients, each.group)


def _share(copies: Sequence[Tensor], group: ProcessGroup | None, source: int | None = None) -> None:
    """Give all copies the first one's value at rank `source`, or its sum over the ranks of `group`."""
    if group is not None and source is None:
        dist.all_reduce(copies[0], group=group)
    elif group is not None:
        dist.broadcast(copies[0], source, group)
    for copy in copies[1:]:
        copy.copy_(copies[0])


def saved_buffer(name: str) -> Tensor:
    """A buffer of the original model that is too large to be written into the source."""
    path = Path(__file__).with_name("buffers.pt")
    buffers: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return buffers[name]
