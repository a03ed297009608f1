"""Sums of gradients over the ranks that hold the same parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from autopar.runtime.layout import matches
from autopar.runtime.tensors import local_part


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
    """Parameters with a gradient, in order, cut where its dtype changes or a run has so many bytes of it."""
    run: list[nn.Parameter] = []
    run_bytes = 0
    for parameter in parameters:
        gradient = cast(Tensor, parameter.grad)
        if run and (cast(Tensor, run[0].grad).dtype != gradient.dtype or run_bytes >= num_bytes):
            yield run
            run, run_bytes = [], 0
        run.append(parameter)
        run_bytes += local_part(gradient).nbytes
    if run:
        yield run


def sum_gradients(
    parameters: Iterable[nn.Parameter], group: ProcessGroup, bucket_bytes: int = 32 * 2**20
) -> None:
    """Sum gradients over `group`, in flat buckets. Of a parameter under `fully_shard`, its shard's."""
    for run in _runs((each for each in parameters if each.grad is not None), bucket_bytes):
        gradients = [local_part(cast(Tensor, each.grad)) for each in run]
        flat = torch.cat([each.reshape(-1) for each in gradients])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def matching(model: nn.Module, patterns: Iterable[str]) -> list[nn.Parameter]:
    """The parameters whose name matches one of the patterns."""
    patterns = tuple(patterns)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(matches(name, pattern) for pattern in patterns)
    ]
