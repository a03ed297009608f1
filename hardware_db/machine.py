"""What the planner sees of a machine: identical logical devices under nested levels of links."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hardware_db.errors import HardwareError
from hardware_db.schema import Accelerator
from hardware_db.transport import InNetworkReduction, MeasuredCollective, Protocol

LevelTopology = Literal["switch", "fat_tree", "rails", "mesh", "dragonfly", "ring", "torus", "line", "pcie"]

__all__ = ["Cluster", "Level", "Slice"]


@dataclass(frozen=True, slots=True)
class Level:
    """One tier of links; a group of this level holds `num_devices` consecutive devices.

    `bandwidth_bytes_per_s` is what each device sustains, in one direction, in a large collective that spans
    the level while all others do the same: line rate times the share that collectives reach,
    oversubscription divided in. Devices that share a network card have their part of it each;
    `alone_bytes_per_s` is what one of them gets while the others are quiet (None: no more than its part).
    `line_rate_bytes_per_s` is the published rate, for display.

    A collective takes `start_s` once and `latency_s` for every step, whatever its size, or less by one of
    `protocols`; `concurrent_messages` to different peers are under way at once. `level_by_level` is whether
    the library of these devices composes a collective of one over each level (TPUs, Ascend); if not, it knows
    rings through all ranks, and trees between nodes (NCCL), at `tree_bandwidth_share` of the bandwidth.
    `reduction` is there where switches reduce, `measured` has the tables that replace all of this where they
    fit.

    `topology` tells what a smaller group gets of it:
      "switch", "fat_tree"  all of it, wherever its members sit;
      "rails"               the same: card i of every node sits on rail i, and what is for another rail first
                            changes to it inside the node;
      "mesh"                one link per peer: g of n devices use (g-1)/(n-1) of it;
      "dragonfly"           a mesh of groups of switches, with detours over third groups: at least half;
      "ring", "pcie"        all of it while its members are neighbours;
      "torus"               this level is one axis of a torus; whole axes work at once, so the bandwidth of a
                            group that fills several adjacent torus levels is their sum;
      "line"                such an axis that does not close to a ring.
    """

    name: str
    num_devices: int
    bandwidth_bytes_per_s: float
    latency_s: float
    topology: LevelTopology
    line_rate_bytes_per_s: float | None = None
    alone_bytes_per_s: float | None = None
    start_s: float = 0.0
    protocols: tuple[Protocol, ...] = ()
    concurrent_messages: int = 1
    level_by_level: bool = True
    tree_bandwidth_share: float = 1.0
    reduction: InNetworkReduction | None = None
    measured: tuple[MeasuredCollective, ...] = ()

    def calibrated(self, bandwidth_bytes_per_s: float, latency_s: float) -> Level:
        """This level with the line that was fitted to measurements in place of all that is published."""
        return replace(
            self,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            latency_s=latency_s,
            alone_bytes_per_s=None,
            start_s=0.0,
            protocols=(),
            reduction=None,
            measured=(),
        )


@dataclass(frozen=True, slots=True)
class Slice:
    """A shape in which the devices of a torus can be had: chips along each of its axes, innermost first."""

    id: str
    sides: tuple[int, ...]
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Cluster:
    """Identical devices, numbered so that each group of each level is a contiguous run.

    `device` is a logical device. `devices_per_node` is how many one host drives (torchrun's nproc_per_node).
    `levels` go from the innermost outwards; each level's `num_devices` divides the next one's, and the last
    one's is `num_devices`. A device's part of its host is what it has while all devices of the host take
    theirs: memory, bytes/s of it, and bytes/s of the link in each direction; None where nobody published it.
    `slices` are the shapes in which a torus of so many chips can be had, the one of `levels` first
    (`hardware_db.slice_shapes`). Raises HardwareError when that does not hold.
    """

    id: str
    name: str
    device: Accelerator
    num_devices: int
    devices_per_node: int
    levels: tuple[Level, ...]
    host_memory_bytes_per_device: float | None = None
    host_memory_bytes_per_s_per_device: float | None = None
    host_link_bytes_per_s_per_device: float | None = None
    price_usd_per_device_hour: float | None = None
    node_id: str | None = None
    notes: tuple[str, ...] = ()
    slices: tuple[Slice, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            raise HardwareError(f"cluster {self.id}: has no levels; give at least one")
        inner = Level("device", 1, 1.0, 0.0, "switch")
        for level in self.levels:
            if level.num_devices < 1 or level.num_devices % inner.num_devices:
                raise HardwareError(
                    f"cluster {self.id}: level {level.name!r} has {level.num_devices} devices, "
                    f"no multiple of the {inner.num_devices} of level {inner.name!r} (counts are cumulative)"
                )
            if level.bandwidth_bytes_per_s <= 0 or level.latency_s < 0:
                raise HardwareError(
                    f"cluster {self.id}: level {level.name!r} needs bandwidth above 0 and latency from 0, "
                    f"got {level.bandwidth_bytes_per_s:g} bytes/s and {level.latency_s:g} s"
                )
            inner = level
        if inner.num_devices != self.num_devices:
            raise HardwareError(
                f"cluster {self.id}: the outermost level {inner.name!r} joins {inner.num_devices} devices "
                f"of {self.num_devices}"
            )
        if self.devices_per_node < 1 or self.num_devices % self.devices_per_node:
            raise HardwareError(
                f"cluster {self.id}: {self.num_devices} devices do not fill nodes of {self.devices_per_node}"
            )

    @property
    def num_nodes(self) -> int:
        """Number of hosts (torchrun's nnodes)."""
        return self.num_devices // self.devices_per_node
