"""Time of work on one device: the roofline model.

    time = max(flops / (peak · e_kind), bytes / (bandwidth · e_memory), launch overhead)

Peak, bandwidth, efficiencies and launch overhead are the accelerator's facts. Work without FLOPs and bytes
takes no time: it launches nothing. Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009; the
floor is the launch-bound regime that small kernels live in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from costmodel.work import Work, WorkKind

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from hardware_db import Accelerator


def work_time_s(work: Work, accelerator: Accelerator) -> float:
    """Seconds that `accelerator` needs for `work`; the device's error for a dtype whose peak is not known."""
    if not work.flops and not work.bytes:
        return 0.0
    memory_s = work.bytes / _bytes_per_s(accelerator)
    # Pure data movement must not fail on a dtype the device has no arithmetic peak for.
    compute_s = work.flops / _flops_per_s(accelerator, work.dtype, work.kind) if work.flops else 0.0
    return max(compute_s, memory_s, accelerator.efficiency.launch_overhead_s)


def work_times_s(
    flops: ArrayLike, num_bytes: ArrayLike, dtype: str, kind: WorkKind, accelerator: Accelerator
) -> NDArray[np.float64]:
    """`work_time_s` for many works of one dtype and kind: arrays that broadcast, seconds in the broadcast
    shape."""
    flops, num_bytes = np.asarray(flops, dtype=np.float64), np.asarray(num_bytes, dtype=np.float64)
    memory_s = num_bytes / _bytes_per_s(accelerator)
    compute_s = flops / _flops_per_s(accelerator, dtype, kind) if flops.any() else np.zeros_like(flops)
    busy_s = np.maximum(compute_s, memory_s)
    return np.where(busy_s > 0, np.maximum(busy_s, accelerator.efficiency.launch_overhead_s), 0.0)


def _bytes_per_s(accelerator: Accelerator) -> float:
    return accelerator.memory_bandwidth_bytes_per_s * accelerator.efficiency.memory


def _flops_per_s(accelerator: Accelerator, dtype: str, kind: WorkKind) -> float:
    """The reachable rate. Elementwise arithmetic ("memory") may use all of the peak: its bytes bound it."""
    efficiency = accelerator.efficiency
    fraction = {"matmul": efficiency.matmul, "attention": efficiency.attention, "memory": 1.0}[kind]
    return accelerator.peak_flops_per_s(dtype) * fraction
