"""Rows to their experts and back, and their products with them.

How many rows an expert gets is known only when they are there. `torch.compile` traces what it cannot see
through as ops of their own, in namespace `autopar`: the exchange, whose result has an unknown number of
rows, and products by group in precisions in which it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import GroupName, ProcessGroup

from autopar.runtime.compiling import opaque


def exchange_counts(ends: Tensor, experts: ProcessGroup) -> tuple[Tensor, Tensor]:
    """How many rows travel between the ranks of `experts`, each of which holds as many of the e experts;
    `ends` `[e]` is up to where this rank's rows of each expert reach, as in `grouped_mm`.

    Returns the ends of the rows that this rank gets for its own experts, and, on the host, how many it sends
    to each expert of each rank and gets from each rank for each of its own `[2, n, e/n]`.
    """
    sent = ends.diff(prepend=ends.new_zeros(1)).view(experts.size(), -1)
    got: Tensor = funcol.wait_tensor(funcol.all_to_all_single(sent, None, None, experts))
    return got.sum(0).cumsum(0, dtype=ends.dtype), torch.stack([sent, got]).cpu()


def to_experts(x: Tensor, routes: Tensor, experts: ProcessGroup) -> Tensor:
    """Rows of `x`, sorted by expert, to the ranks that hold their experts: the rows of all ranks for this
    rank's own, sorted by expert. `routes` is of `exchange_counts`."""
    return _exchange(x, routes, None, experts.group_name, False)


def from_experts(x: Tensor, routes: Tensor, num_rows: int, experts: ProcessGroup) -> Tensor:
    """Rows back to the ranks that sent them, in their order there: undoes `to_experts` of `num_rows` rows."""
    return _exchange(x, routes, num_rows, experts.group_name, True)


class _Exchange(torch.autograd.Function):
    """Gradients go the way of the rows back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, routes: Tensor, num_rows: int | None, group: GroupName, is_back: bool
    ) -> Tensor:
        ctx.save_for_backward(routes)
        ctx.num_rows, ctx.group, ctx.is_back = x.shape[0], group, is_back
        return _moved_rows(x, routes, num_rows, group, is_back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (routes,) = ctx.saved_tensors
        back = _moved_rows(gradient, routes, ctx.num_rows, ctx.group, not ctx.is_back)
        return back, None, None, None, None


_exchange: Callable[..., Tensor] = _Exchange.apply


def _as_many_rows(x: Tensor, routes: Tensor, num_rows: int | None, group: str, is_back: bool) -> Tensor:
    """Rows like those of `x`; None: as many as nobody knows yet."""
    found = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    return x.new_empty(found, *x.shape[1:])


@opaque(_as_many_rows)
def _moved_rows(x: Tensor, routes: Tensor, num_rows: int | None, group: str, is_back: bool) -> Tensor:
    """Rows sorted by expert to the ranks of their experts, which sort what they get of all ranks again; or
    back to where they came from."""
    sent, got = routes.sum(2).tolist()
    order = _by_expert(routes[1], x.device)
    if not is_back:
        return _sent(x.contiguous(), got, sent, group)[order]
    rows = torch.empty_like(x)
    rows[order] = x
    return _sent(rows, sent, got, group)


def _sent(x: Tensor, got: list[int], sent: list[int], group: str) -> Tensor:
    received: Tensor = funcol.wait_tensor(funcol.all_to_all_single(x, got, sent, GroupName(group)))
    return received


def _by_expert(got: Tensor, device: torch.device) -> Tensor:
    """The order by expert of rows that lie there by rank, and of each rank by expert."""
    arrived = (got.flatten().cumsum(0) - got.flatten()).view_as(got)  # where each run of rows begins
    counts = got.T.flatten()
    begins = counts.cumsum(0) - counts
    total = int(counts.sum())
    moved = (arrived.T.flatten() - begins).to(device, non_blocking=True)
    order = moved.repeat_interleave(counts.to(device, non_blocking=True), output_size=total)
    return order + torch.arange(total, device=device)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x` `[t, k]`, sorted by expert, times the matrix of their expert in `weight` `[e, k, n]`.

    Expert e has the rows up to `ends[e]`; there are none past the last end.
    """
    return _grouped(x, weight, ends)


class _Grouped(torch.autograd.Function):
    """torch's own derivative takes no expanded gradients, and there is none without a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return rows_by_group(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = rows_by_group(gradient, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        return of_x, gradient_by_group(x, gradient, weight, ends) if ctx.needs_input_grad[1] else None, None


_grouped: Callable[[Tensor, Tensor, Tensor], Tensor] = _Grouped.apply


def rows_by_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm`, without a derivative of its own."""
    if has_grouped_kernel(weight.dtype, weight.shape):
        return F.grouped_mm(x, weight, offs=ends)
    return _rows_by_group(x, weight, ends)


def gradient_by_group(x: Tensor, gradient: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The gradient of `weight` in `grouped_mm`, which lies in memory as the weight does."""
    if weight.stride(1) == 1:
        return _outer_by_group(gradient, x, ends).transpose(1, 2)
    return _outer_by_group(x, gradient, ends)


def _outer_by_group(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Of each group the product of its columns in `x` with its rows in `y`: `[e, k, n]`."""
    if has_grouped_kernel(x.dtype, (0, x.shape[1], y.shape[1])):
        return F.grouped_mm(x.T, y, offs=ends)
    return _outers(x, y, ends)


def _rows_like(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@opaque(_rows_like)
def _rows_by_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([rows @ own for rows, own in zip(_groups(x, ends), weight.unbind(), strict=True)])


def _outers_like(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


@opaque(_outers_like)
def _outers(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return torch.stack([a.T @ b for a, b in zip(_groups(x, ends), _groups(y, ends), strict=True)])


def _groups(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return parts


def has_grouped_kernel(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether torch multiplies all groups with matrices `[e, k, n]` in one op: it wants rows of whole 16
    bytes, and traces none but those in bf16."""
    is_aligned = all(size * dtype.itemsize % 16 == 0 for size in shape[1:])
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else _WITH_KERNEL
    return dtype in dtypes and is_aligned


_WITH_KERNEL = (torch.float32, torch.bfloat16, torch.float16)
