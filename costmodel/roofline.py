"""Time of work on one device: the roofline model, with what a kernel's shape leaves of the roof.

    time = (c^p + b^p)^(1/p) + overhead,   c = flops / (peak · e), b = bytes / (bandwidth · e_memory)

Peak, bandwidth, efficiencies, overhead and p are the accelerator's facts: a roof's edge is round, because a
kernel that waits for memory at its start and its end does not compute meanwhile (p = ∞ is the sharp edge). A
product computes its result in tiles
of t_m by t_n, `num_cores` of them at a time (a wave), and each tile reads `fill_k` more than k to fill and
drain its pipeline:

    waves   w = batch ⌈m/t_m⌉ ⌈n/t_n⌉ / num_cores
    share   batch m n k · e_tile / ((w + q (⌈w⌉ - w)) · num_cores · t_m t_n · (k + fill_k))
    e_tile  r / (r + tile_reuse), over that of the largest tile, with r = t_m t_n / (t_m + t_n)

for the tile that does best. q (`wave_loss`) is the share of the last wave's idle cores that is lost:
libraries cut k to fill them. Rows that are no multiple of 16 bytes halve the rate. Attention of head
dimension d and s keys reaches d / (d + d_half) · s / (s + s_half) of its best. Sources: Williams, Waterman,
Patterson, "Roofline", CACM 52(4), 2009; NVIDIA, "Matrix Multiplication Background User's Guide" (tile and
wave quantization); Dao, arXiv:2307.08691, figures 4 to 7 (attention by head dimension and sequence).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from costmodel.work import Work

if TYPE_CHECKING:
    from costmodel.software import Software
    from hardware_db import Accelerator, Efficiency

ALIGNED_ELEMENTS = 8
"""Elements of two bytes in the 16 that tensor cores load at once; other rows run at half the rate."""


def work_time_s(work: Work, accelerator: Accelerator) -> float:
    """Seconds that `accelerator` needs for `work`; the device's error for a dtype whose peak is not known."""
    return Roofline(accelerator).time_s(work)


class Roofline:
    """Times of work on one device, each worked out once: planners ask for the same kernels again and again.

    `software`, if given, says what kernels inside a training step keep of the device's efficiencies.
    """

    def __init__(self, accelerator: Accelerator, software: Software | None = None) -> None:
        self.accelerator = accelerator
        self.software = software
        self.efficiency = accelerator.efficiency
        self.launch_overhead_s = self.efficiency.launch_overhead_s
        self.bytes_per_s = accelerator.memory_bandwidth_bytes_per_s * min(
            1.0, self.efficiency.memory * (software.memory_share if software else 1.0)
        )
        self._known: dict[Work, float] = {}

    def time_s(self, work: Work) -> float:
        """Seconds of `work`; work without FLOPs and bytes launches nothing and takes no time."""
        seconds = self._known.get(work)
        if seconds is None:
            seconds = self._known[work] = self._time_s(work)
        return seconds

    def launch_s(self, work: Work) -> float:
        """What of that is left however little there is to do."""
        return self.launch_overhead_s if work.num_launches and (work.flops or work.bytes) else 0.0

    def _time_s(self, work: Work) -> float:
        if not work.flops and not work.bytes:
            return 0.0
        memory_s = work.bytes / self.bytes_per_s
        # Pure data movement must not fail on a dtype the device has no arithmetic peak for.
        compute_s = 0.0
        if work.flops:
            compute_s = work.flops / (self.accelerator.peak_flops_per_s(work.dtype) * self._share(work))
        return self._rounded(compute_s, memory_s) + self.launch_s(work)

    def _rounded(self, one_s: float, other_s: float) -> float:
        longer_s, shorter_s = max(one_s, other_s), min(one_s, other_s)
        p = self.efficiency.edge_sharpness
        rounded: float = (1 + (shorter_s / longer_s) ** p) ** (1 / p)
        return longer_s * rounded

    def _share(self, work: Work) -> float:
        """The share of the peak that the work's arithmetic reaches."""
        efficiency, software = self.efficiency, self.software
        match work.kind:
            case "matmul":
                executed = self.accelerator.executed_dtype(work.dtype)
                best = efficiency.matmul_fp8 if executed in ("fp8", "fp4") else efficiency.matmul
                best *= software.matmul_share if software else 1.0
                return min(1.0, best) * matmul_share(work.shape, efficiency)
            case "attention" | "native_attention":
                best = efficiency.attention if work.kind == "attention" else efficiency.attention_native
                best *= software.attention_share if software else 1.0
                return min(1.0, best) * _attention_share(work.shape, efficiency)
            case "memory":
                return 1.0  # elementwise arithmetic may use all of the peak: its bytes bound it


def matmul_share(shape: tuple[int, ...], efficiency: Efficiency) -> float:
    """What quantisation into tiles and waves leaves of a large product's rate for the shape
    `(batch, m, n, k)`; 1 for no shape."""
    if not shape:
        return 1.0
    batch, m, n, k = shape
    best = 0.0
    for tile_m, tile_n, share in _tiles(efficiency):
        tiles = batch * ceil(m / tile_m) * ceil(n / tile_n)
        waves = tiles / efficiency.num_cores
        spent = tiles + efficiency.wave_loss * (ceil(waves) - waves) * efficiency.num_cores
        best = max(best, share * batch * m * n / (spent * tile_m * tile_n))
    aligned = n % ALIGNED_ELEMENTS == 0 and k % ALIGNED_ELEMENTS == 0
    return best * k / (k + efficiency.fill_k) * (1.0 if aligned else 0.5)


@lru_cache(maxsize=256)
def _tiles(efficiency: Efficiency) -> tuple[tuple[float, float, float], ...]:
    """Tiles a library chooses from, each with its rate over the largest one's: either way up, and with either
    side halved once or twice."""
    m, n, reuse = efficiency.tile_m, efficiency.tile_n, efficiency.tile_reuse
    sides = {(a / i, b / j) for a, b in ((m, n), (n, m)) for i in (1, 2, 4) for j in (1, 2)}

    def share(a: float, b: float) -> float:
        reused = a * b / (a + b)
        return reused / (reused + reuse)

    return tuple((a, b, share(a, b) / share(m, n)) for a, b in sorted(sides, reverse=True))


def _attention_share(shape: tuple[int, ...], efficiency: Efficiency) -> float:
    if not shape:
        return 1.0
    _, _, keys, head_dim = shape
    return (
        head_dim / (head_dim + efficiency.head_dim_half) * keys / (keys + efficiency.sequence_half)
    )  # fmt: skip
