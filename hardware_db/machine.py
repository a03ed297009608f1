"""What the planner sees of a machine: identical logical devices under nested levels of links."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_db.errors import HardwareError
from hardware_db.schema import Accelerator

__all__ = ["Cluster", "Level"]


@dataclass(frozen=True, slots=True)
class Level:
    """One tier of links; a group of this level holds `num_devices` consecutive devices.

    `bandwidth_bytes_per_s` is what each device sustains, in one direction, in a large collective that spans
    the level: line rate times the share that collectives reach, oversubscription divided in.
    `line_rate_bytes_per_s` is the published rate, for display. `latency_s` is the time of one step of a
    collective, whatever its size.

    `topology` tells what a smaller group gets of it:
      "switch", "fat_tree"  all of it, wherever its members sit;
      "mesh"                one link per peer: g of n devices use (g-1)/(n-1) of it;
      "ring", "pcie"        all of it while its members are neighbours;
      "torus"               this level is one axis of a torus; whole axes work at once, so the bandwidth of a
                            group that fills several adjacent torus levels is their sum.
    """

    name: str
    num_devices: int
    bandwidth_bytes_per_s: float
    latency_s: float
    topology: str
    line_rate_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Cluster:
    """Identical devices, numbered so that each group of each level is a contiguous run.

    `device` is a logical device. `devices_per_node` is how many one host drives (torchrun's nproc_per_node).
    `levels` go from the innermost outwards; each level's `num_devices` divides the next one's, and the last
    one's is `num_devices`. Raises HardwareError when that does not hold.
    """

    id: str
    name: str
    device: Accelerator
    num_devices: int
    devices_per_node: int
    levels: tuple[Level, ...]
    host_memory_bytes_per_device: float | None = None
    price_usd_per_device_hour: float | None = None
    node_id: str | None = None
    notes: tuple[str, ...] = ()

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
