"""What collectives take under torchrun, over the kinds of groups that a mesh makes of these ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, inf
from statistics import median, quantiles

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autopar.calibrate.timing import STABLE_SPREAD, Timing
from costmodel import Group
from hardware_db.profile import CollectiveKind, CollectiveTime

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send_recv",
)
SAMPLE_S = 5e-3
MIN_SAMPLES = 5


@contextmanager
def world(device: torch.device) -> Iterator[int]:
    """The number of ranks that torchrun started, joined in a process group; 1 without torchrun."""
    if "RANK" not in os.environ:
        yield 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def groups_of(world_size: int, ranks_per_host: int) -> tuple[Group, ...]:
    """Neighbours inside a host in doubling numbers, then ranks of the same place on several hosts."""
    hosts = world_size // ranks_per_host
    inside = tuple(Group(size) for size in _doubling(ranks_per_host))
    return inside + tuple(Group(size, ranks_per_host) for size in _doubling(hosts))


def _doubling(limit: int) -> Iterator[int]:
    """2, 4, 8, ... as far as they divide `limit`, and `limit` itself."""
    size = 2
    while size < limit and limit % size == 0:
        yield size
        size *= 2
    if limit > 1:
        yield limit


class GroupBench:
    """The ranks of this world in groups of one kind, all at work at once, for `limit_s` each time."""

    def __init__(self, group: Group, device: torch.device, limit_s: float) -> None:
        shape = (dist.get_world_size() // (group.size * group.stride), group.size, group.stride)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("outside", "group", "inside"))
        self.group = group
        self.device = device
        self.limit_s = limit_s
        self._ranks = mesh["group"].get_group()
        self._place = mesh["group"].get_local_rank()

    def measure(self, kind: CollectiveKind, num_bytes: int) -> CollectiveTime:
        """The time of one collective of `num_bytes`, as `costmodel.Collective` counts them."""
        timing = self._time(self._call(kind, num_bytes))
        return CollectiveTime(
            kind=kind,
            world_size=self.group.size,
            stride=self.group.stride,
            bytes=num_bytes,
            seconds=timing.seconds,
            spread=timing.spread,
        )

    def _call(self, kind: CollectiveKind, num_bytes: int) -> Callable[[], object]:
        size, ranks = self.group.size, self._ranks
        num_elements = ceil(num_bytes / (4 * size)) * size
        whole = torch.zeros(num_elements, device=self.device)
        part = torch.zeros(num_elements // size, device=self.device)
        match kind:
            case "all_reduce":
                return lambda: dist.all_reduce(whole, group=ranks)
            case "all_gather":
                return lambda: dist.all_gather_single(whole, part, group=ranks)
            case "reduce_scatter":
                return lambda: dist.reduce_scatter_single(part, whole, group=ranks)
            case "all_to_all":
                received = torch.empty_like(whole)
                return lambda: dist.all_to_all_single(received, whole, group=ranks)
            case "broadcast":
                return lambda: dist.broadcast(whole, group=ranks, group_src=0)
            case "send_recv":
                return lambda: self._pass_on(whole, torch.empty_like(whole))

    def _pass_on(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        """Each rank to its next neighbour, as stages of a pipeline do."""
        size, ranks = self.group.size, self._ranks
        after, before = (self._place + 1) % size, (self._place - 1) % size
        messages = [
            dist.P2POp(dist.isend, sent, group=ranks, group_peer=after),
            dist.P2POp(dist.irecv, received, group=ranks, group_peer=before),
        ]
        for message in dist.batch_isend_irecv(messages):
            message.wait()

    def _time(self, call: Callable[[], object]) -> Timing:
        """The median of samples that take long enough for a clock, until they agree or time is up.

        All ranks see the slowest one's samples, so they do the same.
        """
        self._run(call, 3)
        repetitions = max(1, ceil(SAMPLE_S / self._run(call, 3)))
        samples: list[float] = []
        spread = inf
        while len(samples) < MIN_SAMPLES or (
            spread > STABLE_SPREAD and repetitions * sum(samples) < self.limit_s
        ):
            samples.append(self._run(call, repetitions))
            if len(samples) > 1:
                lower, middle, upper = quantiles(samples, n=4, method="inclusive")
                spread = (upper - lower) / middle
        return Timing(median(samples), spread)

    def _run(self, call: Callable[[], object], repetitions: int) -> float:
        """Seconds of one of so many calls on the slowest rank of the world."""
        dist.barrier()
        self._synchronize()
        began = time.perf_counter()
        for _ in range(repetitions):
            call()
        self._synchronize()
        return slowest(time.perf_counter() - began, self.device) / repetitions

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def slowest(seconds: float, device: torch.device) -> float:
    """The largest `seconds` of all ranks."""
    shared = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()
