"""What the links of a level can do besides moving bytes at a rate: protocols, reduction inside a switch, and
what was measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from hardware_db.errors import HardwareError

__all__ = ["InNetworkReduction", "MeasuredCollective", "Protocol", "bus_factor"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """A way to send that is quicker for small messages and reaches less of the bandwidth (NCCL's LL128).

    A collective takes `start_s` once and `step_s` for every step, at `bandwidth_share` of the level's
    bandwidth.
    """

    name: str
    start_s: float
    step_s: float
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class InNetworkReduction:
    """An all_reduce inside the switches (NVLink SHARP, InfiniBand SHARP), for `min_peers` peers and more.

    A member sends its payload once and receives the result once, whatever the number of peers: it moves
    `all_reduce_bytes_per_s` bytes of payload per second after `start_s`.
    """

    all_reduce_bytes_per_s: float
    start_s: float
    min_peers: int = 2


@dataclass(frozen=True, slots=True)
class MeasuredCollective:
    """A table of one collective over groups that lie as `shape` says: so many peers on each level that they
    meet on, innermost first. (8, 4) is four whole nodes of eight.

    `points` are (payload bytes, seconds); payloads rise, and seconds never fall. Raises HardwareError
    otherwise.
    """

    kind: str
    shape: tuple[int, ...]
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes, times = [size for size, _ in self.points], [time for _, time in self.points]
        rising = all(a < b for a, b in pairwise(sizes)) and times == sorted(times)
        if len(self.points) < 2 or not rising or sizes[0] <= 0 or times[0] <= 0:
            raise HardwareError(
                f"a measured {self.kind} over {self.shape} needs two points or more, with payloads above 0 "
                f"that rise and seconds that do not fall; got {list(self.points)[:3]}"
            )

    @staticmethod
    def from_bus_bandwidth(
        kind: str, shape: tuple[int, ...], rows: tuple[tuple[float, float], ...]
    ) -> MeasuredCollective:
        """The table of (payload bytes, bus bandwidth in bytes/s) that nccl-tests prints.

        A time that falls as the payload grows is noise of the measurement and is raised to the one before.
        """
        factor = bus_factor(kind, prod(shape))
        times = accumulate((factor * size / rate for size, rate in rows), max)
        return MeasuredCollective(kind, shape, tuple(zip((size for size, _ in rows), times, strict=True)))


def bus_factor(kind: str, num_ranks: int) -> float:
    """Bus bandwidth times seconds over payload bytes, as nccl-tests counts it (doc/PERFORMANCE.md)."""
    around = (num_ranks - 1) / num_ranks
    match kind:
        case "all_reduce":
            return 2 * around
        case "all_gather" | "reduce_scatter" | "all_to_all" | "scatter" | "gather":
            return around
    return 1.0
