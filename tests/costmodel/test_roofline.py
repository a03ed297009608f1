from __future__ import annotations

import numpy as np
import pytest

import hardware_db
from costmodel import Work, work_time_s, work_times_s
from costmodel.work import WorkKind

H100 = hardware_db.accelerator("h100-sxm")


def square_matmul(n: int) -> Work:
    return Work(flops=2 * n**3, bytes=3 * 2 * n**2)


def test_a_large_matmul_is_bound_by_compute() -> None:
    work = square_matmul(8192)
    assert work_time_s(work, H100) == pytest.approx(
        work.flops / (H100.peak_flops_per_s("bf16") * H100.efficiency.matmul)
    )


def test_a_copy_is_bound_by_bandwidth_whatever_its_dtype() -> None:
    gigabyte = Work(flops=0, bytes=1e9, dtype="fp4", kind="memory")
    rate = H100.memory_bandwidth_bytes_per_s * H100.efficiency.memory
    assert work_time_s(gigabyte, H100) == pytest.approx(1e9 / rate)


def test_small_work_is_bound_by_its_launch_and_no_work_is_free() -> None:
    assert work_time_s(Work(flops=2, bytes=2), H100) == H100.efficiency.launch_overhead_s > 0
    assert work_time_s(Work(flops=0, bytes=0), H100) == 0


def test_compute_and_memory_meet_at_the_ridge() -> None:
    peak = H100.peak_flops_per_s("bf16") * H100.efficiency.matmul
    bandwidth = H100.memory_bandwidth_bytes_per_s * H100.efficiency.memory
    ridge = peak / bandwidth
    below, above = Work(0.5 * ridge * 1e9, 1e9), Work(2 * ridge * 1e9, 1e9)
    assert work_time_s(below, H100) == pytest.approx(1e9 / bandwidth)
    assert work_time_s(above, H100) == pytest.approx(2e9 / bandwidth)


@pytest.mark.parametrize("kind", ["matmul", "attention", "memory"])
def test_many_works_cost_what_each_costs(kind: WorkKind) -> None:
    flops, num_bytes = np.array([0.0, 1e3, 1e12, 1e9]), np.array([0.0, 1e3, 1e6, 1e9])
    expected = [work_time_s(Work(f, b, "bf16", kind), H100) for f, b in zip(flops, num_bytes, strict=True)]
    assert work_times_s(flops, num_bytes, "bf16", kind, H100).tolist() == pytest.approx(expected)


def test_many_works_broadcast() -> None:
    times = work_times_s(np.array([[0.0], [1e12]]), np.array([1e9, 0.0]), "bf16", "matmul", H100)
    assert times.shape == (2, 2)
    assert times[0, 1] == 0.0
    assert times[1, 1] == work_time_s(Work(1e12, 0), H100)
