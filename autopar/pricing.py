"""What the ops of a local graph cost on a cluster: seconds of computing and of communication, forward and
backward.

`autopar.kernels` says what an op makes a device do; here that gets its price, from the roofline of the device
under a software and from collectives over the groups of the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from autopar.kernels import KernelMaker, Kernels, Move, conversion_moves
from autopar.op_kinds import dtype_name
from autopar.traffic import EVERYTHING_TOUCHES_MEMORY, Traffic
from costmodel import Algorithm, CollectiveKind, Group, Roofline, Software, Work, algorithms, software
from graphs.ir import Op, OpGraph, Tensor
from hardware_db import Cluster

DEFAULT_SOFTWARE = "torch-eager"
"""What the emitted programs run on: torch's own kernels, eagerly."""


class OpCost(NamedTuple):
    """What one op costs for one microbatch: seconds of the device, and of the host that launches its work.
    `weight_s` is the part of the backward that makes parameters' gradients. Costs add with `total`."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_communication_s: float = 0.0
    backward_communication_s: float = 0.0
    forward_host_s: float = 0.0
    backward_host_s: float = 0.0
    weight_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s + self.forward_communication_s + self.backward_communication_s

    @property
    def computed_s(self) -> float:
        """What of it is not communicated."""
        return self.forward_s + self.backward_s

    @property
    def forward_total_s(self) -> float:
        """What running the forward again would take."""
        return self.forward_s + self.forward_communication_s

    def times(self, factor: float) -> OpCost:
        """The cost of so many, or of a part."""
        return OpCost(*[factor * seconds for seconds in self])

    def exposing(self, share: float) -> OpCost:
        """The cost where so much of the communication is left, and something hides the rest."""
        if share == 1:  # as in most software, and costs are many
            return self
        return self._replace(
            forward_communication_s=share * self.forward_communication_s,
            backward_communication_s=share * self.backward_communication_s,
        )

    @property
    def paced(self) -> OpCost:
        """The cost where the host is slower than the device: it works ahead, so only sums compare."""
        return self._replace(
            forward_s=max(self.forward_s, self.forward_host_s - self.forward_communication_s),
            backward_s=max(self.backward_s, self.backward_host_s - self.backward_communication_s),
        )


def total(costs: Iterable[OpCost]) -> OpCost:
    """The sum, field by field."""
    rows = list(costs)
    if len(rows) == 1:
        return rows[0]
    return OpCost(*map(sum, zip(*rows, strict=True))) if rows else OpCost()


class Pricer:
    """Prices the ops of local graphs on one cluster.

    `groups` says where the ranks of each mesh axis lie, `era` what software runs there. Prices of kernels and
    lines of collectives are kept, since a search asks for few kinds and many sizes; `like` shares those of
    another pricer of the same cluster and era.
    """

    def __init__(
        self,
        cluster: Cluster,
        groups: Mapping[str, Group],
        era: Software | None = None,
        *,
        low_precision: str | None = None,
        blocks: tuple[str, ...] = (),
        like: Pricer | None = None,
    ) -> None:
        self.cluster = cluster
        self.groups = dict(groups)
        self.era: Software = era or (like.era if like else software(DEFAULT_SOFTWARE))
        self.low_precision = low_precision
        self.blocks = blocks
        self.roofline: Roofline = like.roofline if like else Roofline(cluster.device, self.era)
        self._lines = like._lines if like else {}

    _lines: dict[tuple[str, Group], tuple[Algorithm, ...]]

    @cached_property
    def kernels(self) -> KernelMaker:
        """Makes the kernels that this pricer prices."""
        sizes = {axis: group.size for axis, group in self.groups.items()}
        return KernelMaker(self.era, sizes, self.low_precision, self.blocks)

    def graph(self, graph: OpGraph) -> tuple[OpCost, ...]:
        """The cost of every op."""
        return tuple(map(self.priced, self.kernels.graph(graph)))

    def traffic(self, graph: OpGraph) -> Traffic:
        """Which values of a graph stay in registers under this software."""
        return Traffic.of(graph, self.era.fusion)

    def op(
        self,
        op: Op,
        tensors: Mapping[str, Tensor],
        traffic: Traffic = EVERYTHING_TOUCHES_MEMORY,
        parameters: frozenset[str] = frozenset(),
    ) -> OpCost:
        """The cost of one op of a local graph."""
        return self.priced(self.kernels.op(op, tensors, traffic, parameters))

    def priced(self, kernels: Kernels) -> OpCost:
        """The cost of kernels and collectives."""
        weight_s = self._kernels_s(kernels.weight)
        return OpCost(
            self._kernels_s(kernels.forward),
            self._kernels_s(kernels.backward) + weight_s,
            self._moves_s(kernels.forward_moves),
            self._moves_s(kernels.backward_moves),
            self._host_s(kernels.forward, kernels.forward_moves),
            self._host_s((*kernels.backward, *kernels.weight), kernels.backward_moves),
            weight_s,
        )

    def launches(self, kernels: Kernels) -> OpCost:
        """What of their cost is left however little they do: a kernel takes a time to launch."""
        forward_s, backward_s, weight_s = (
            sum(map(self.roofline.launch_s, works))
            for works in (kernels.forward, kernels.backward, kernels.weight)
        )
        return OpCost(forward_s, backward_s + weight_s, weight_s=weight_s)

    def unit(self, costs: Sequence[OpCost]) -> OpCost:
        """The cost of ops that run one after the other, launched by a host that works ahead."""
        return total(costs).paced

    def conversion(self, name: str, num_bytes: float, axis: str, *, backward: bool) -> OpCost:
        """The cost of the change of placement `name` on a tensor of `num_bytes`, whole on the axis."""
        size = self.groups[axis].size
        forward, back = conversion_moves(name, num_bytes, axis, size, backward=backward)
        return OpCost(
            forward_communication_s=self._moves_s(forward), backward_communication_s=self._moves_s(back)
        )

    def bucketed_s(self, kind: CollectiveKind, num_bytes: float, group: Group) -> float:
        """Seconds that many small tensors add to a collective over flat buckets: bandwidth only, so linear in
        bytes."""
        lines = self._lines_of(kind, group)
        return min((line.s_per_byte for line in lines), default=0.0) * num_bytes / self.era.collective_share

    def collective_s(self, kind: CollectiveKind, num_bytes: float, group: Group) -> float:
        """Seconds of one collective; `num_bytes` as `costmodel.Collective` counts them."""
        if not num_bytes:
            return 0.0
        lines = self._lines_of(kind, group)
        return min((line.time_s(num_bytes) for line in lines), default=0.0) / self.era.collective_share

    def work_s(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """Seconds of one memory-bound kernel."""
        return self.roofline.time_s(Work(flops, num_bytes, dtype_name(dtype), "memory"))

    def _kernels_s(self, works: Sequence[Work]) -> float:
        return sum(map(self.roofline.time_s, works))

    def _host_s(self, works: Sequence[Work], moves: Sequence[Move]) -> float:
        launches = sum([work.num_launches for work in works])
        return self.era.host_s_per_launch * launches + self.era.host_s_per_collective * len(moves)

    def _moves_s(self, moves: Sequence[Move]) -> float:
        return sum([self.collective_s(move.kind, move.num_bytes, self.groups[move.axis]) for move in moves])

    def _lines_of(self, kind: CollectiveKind, group: Group) -> tuple[Algorithm, ...]:
        key = (kind, group)
        if key not in self._lines:
            self._lines[key] = algorithms(kind, group, self.cluster)
        return self._lines[key]
