"""Times of kernels, on a device with round numbers: what each number of `Efficiency` does, by itself."""

from __future__ import annotations

import random
from dataclasses import replace
from math import isclose
from typing import Any

import pytest

import hardware_db
from costmodel import Roofline, Work, matmul_share, software, work_time_s
from costmodel.work import WorkKind
from hardware_db import Accelerator

H100 = hardware_db.accelerator("h100-sxm")
PEAK, BANDWIDTH = 100e12, 1e12
TILE_M, TILE_N, CORES = 128, 64, 4
SHARP = 1e9

PLAIN = {
    "matmul": 0.5, "matmul_fp8": 0.25, "attention": 0.4, "attention_native": 0.8, "memory": 0.5,
    "launch_overhead_s": 0.0, "reserved_memory_bytes": 0.0, "num_cores": CORES, "tile_m": TILE_M,
    "tile_n": TILE_N, "tile_reuse": 0.0, "wave_loss": 0.0, "fill_k": 0.0, "head_dim_half": 0.0,
    "sequence_half": 0.0, "edge_sharpness": SHARP,
}  # fmt: skip
"""Nothing lost to shapes, and a sharp edge."""

SMALL_TILES_ARE_SLOW = 1e9


def device(**efficiency: float) -> Accelerator:
    form = {
        "name": "toy",
        "memory_bytes": 16e9,
        "memory_bandwidth_bytes_per_s": BANDWIDTH,
        "peak_flops_per_s": {"fp32": PEAK / 2, "bf16": PEAK, "fp8": 2 * PEAK},
        "efficiency": {**PLAIN, **efficiency},
    }
    levels = [{"name": "links", "devices": 1, "bandwidth_bytes_per_s": 1e9, "latency_s": 0}]
    return hardware_db.parse_cluster({"name": "toys", "device": form, "levels": levels}).device


def product(m: int, n: int, k: int, batch: int = 1, dtype: str = "bf16", **fields: Any) -> Work:
    """A product whose operands are in cache: nothing but arithmetic."""
    return Work(2 * batch * m * n * k, 0, dtype, "matmul", (batch, m, n, k), **fields)


def attention(sequence: int, head_dim: int, kind: WorkKind = "attention") -> Work:
    return Work(4 * 32 * sequence**2 * head_dim, 0, "bf16", kind, (32, sequence, sequence, head_dim))


# --- the two roofs ------------------------------------------------------------------------------------------


def test_a_large_well_shaped_product_reaches_the_share_of_the_peak_that_was_measured() -> None:
    work = product(32 * TILE_M, 32 * TILE_N, 4096)
    assert isclose(work_time_s(work, device()), work.flops / (0.5 * PEAK))
    large = replace(product(16384, 16384, 16384), bytes=3 * 2 * 16384**2)
    reached = large.flops / work_time_s(large, H100) / H100.peak_flops_per_s("bf16")
    assert 0.97 * H100.efficiency.matmul < reached <= H100.efficiency.matmul


def test_a_copy_is_bound_by_bandwidth_whatever_its_dtype() -> None:
    gigabyte = Work(flops=0, bytes=1e9, dtype="fp4", kind="memory")
    assert isclose(work_time_s(gigabyte, device()), 1e9 / (0.5 * BANDWIDTH))
    rate = H100.memory_bandwidth_bytes_per_s * H100.efficiency.memory
    assert isclose(work_time_s(gigabyte, H100), 1e9 / rate + H100.efficiency.launch_overhead_s)


@pytest.mark.parametrize(("sharpness", "factor"), [(1.0, 2.0), (2.0, 2**0.5), (SHARP, 1.0)])
def test_the_edge_between_the_roofs_is_as_sharp_as_the_device_says(sharpness: float, factor: float) -> None:
    one_second = Work(0.5 * PEAK, 0.5 * BANDWIDTH)
    assert isclose(work_time_s(one_second, device(edge_sharpness=sharpness)), factor)
    for lopsided in (replace(one_second, bytes=0), replace(one_second, flops=0)):
        assert isclose(work_time_s(lopsided, device(edge_sharpness=sharpness)), 1.0)


def test_a_kernel_costs_its_overhead_besides_and_one_inside_another_does_not() -> None:
    slow = device(launch_overhead_s=1.0)
    work = product(TILE_M, TILE_N, 64)
    alone_s = work_time_s(work, device())
    assert isclose(work_time_s(work, slow), alone_s + 1)
    assert isclose(work_time_s(replace(work, num_launches=0), slow), alone_s)
    assert isclose(work_time_s(replace(work, num_launches=8), slow), alone_s + 1)  # side by side
    assert work_time_s(Work(0, 0), slow) == 0


def test_eight_bits_have_an_efficiency_of_their_own() -> None:
    work = product(1024, 1024, 1024, dtype="fp8")
    assert isclose(work_time_s(work, device()), work.flops / (2 * PEAK * 0.25))
    assert isclose(work_time_s(replace(work, dtype="fp32"), device()), work.flops / (PEAK / 2 * 0.5))


def test_elementwise_arithmetic_may_use_the_whole_peak() -> None:
    assert isclose(work_time_s(Work(PEAK, 0, kind="memory"), device()), 1.0)


# --- software -----------------------------------------------------------------------------------------------


def test_software_keeps_its_share_of_every_rate_and_no_more_than_all_of_it() -> None:
    era = replace(software("flash-2023"), matmul_share=0.5, memory_share=0.25, attention_share=0.125)
    inside, alone = Roofline(device(), era), Roofline(device())
    works = {0.5: product(1024, 1024, 1024), 0.25: Work(0, 1e9, kind="memory"), 0.125: attention(1024, 64)}
    for share, work in works.items():
        assert isclose(inside.time_s(work), alone.time_s(work) / share)
    boast = Roofline(device(), replace(era, matmul_share=9, memory_share=9, attention_share=9))
    assert isclose(boast.time_s(works[0.5]), works[0.5].flops / PEAK)
    assert isclose(boast.time_s(works[0.25]), 1e9 / BANDWIDTH)
    assert isclose(boast.time_s(works[0.125]), works[0.125].flops / PEAK)


# --- tiles and waves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wave_loss", "tile_reuse", "factor"),
    [
        (1.0, SMALL_TILES_ARE_SLOW, 2.0),  # the fifth tile is a wave of its own
        (0.0, SMALL_TILES_ARE_SLOW, 1.25),  # k is cut until all cores have as much to do
        (0.5, SMALL_TILES_ARE_SLOW, 1.625),
        (1.0, 0.0, 1.25),  # tiles an eighth as large, forty of them, fill ten waves
    ],
)
def test_one_tile_more_than_the_cores_costs_up_to_a_wave(
    wave_loss: float, tile_reuse: float, factor: float
) -> None:
    toy = device(wave_loss=wave_loss, tile_reuse=tile_reuse)
    full, more = product(CORES * TILE_M, TILE_N, 64), product((CORES + 1) * TILE_M, TILE_N, 64)
    assert isclose(work_time_s(more, toy), factor * work_time_s(full, toy), rel_tol=1e-6)


def test_a_small_product_takes_the_tile_that_keeps_most_cores_busy() -> None:
    tile = product(TILE_M, TILE_N, 64)
    full_s = tile.flops / (0.5 * PEAK)
    assert isclose(work_time_s(tile, device(wave_loss=1)), full_s)
    # One large tile leaves three of four cores idle, two of 64 x 64 reuse 3/4 as much, four of 64 x 32 half.
    slow = device(wave_loss=1, tile_reuse=SMALL_TILES_ARE_SLOW)
    assert isclose(work_time_s(tile, slow), full_s / max(1 / 4, 2 / 4 * 3 / 4, 4 / 4 * 1 / 2), rel_tol=1e-6)


def test_a_product_narrower_than_a_tile_pays_for_the_whole_tile() -> None:
    toy = device(wave_loss=1, tile_reuse=0.0, num_cores=1)
    smallest_m, smallest_n = TILE_N // 4, TILE_M // 2
    assert work_time_s(product(8, smallest_n, 64), toy) == work_time_s(
        product(smallest_m, smallest_n, 64), toy
    )


def test_batches_fill_waves_together() -> None:
    toy = device(wave_loss=1, tile_reuse=SMALL_TILES_ARE_SLOW)
    one, batch = product(TILE_M, CORES * TILE_N, 64), product(TILE_M, TILE_N, 64, batch=CORES)
    assert isclose(work_time_s(one, toy), work_time_s(batch, toy))


def test_a_short_reduction_does_not_fill_the_pipeline() -> None:
    toy = device(fill_k=64)
    assert isclose(work_time_s(product(512, 512, 128), toy) / work_time_s(product(512, 512, 64), toy), 3 / 2)
    assert isclose(matmul_share((1, 512, 512, 64), toy.efficiency), 1 / 2)


def test_rows_that_are_no_multiple_of_16_bytes_run_at_half_the_rate() -> None:
    toy = device(num_cores=1)
    aligned_s = work_time_s(product(512, 64, 64), toy)
    assert isclose(work_time_s(product(512, 60, 64), toy), 2 * aligned_s)  # as many tiles
    assert isclose(work_time_s(product(512, 64, 60), toy), 2 * aligned_s * 60 / 64)
    assert isclose(work_time_s(product(511, 64, 64), toy), aligned_s)


def test_a_product_of_unknown_shape_is_taken_for_a_large_one() -> None:
    assert isclose(work_time_s(Work(0.5 * PEAK, 0), device(fill_k=64, wave_loss=1)), 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_more_work_takes_no_less_time_and_no_product_beats_the_peak(seed: int) -> None:
    """In each of batch, m, n and k, as long as rows stay aligned."""
    rng = random.Random(seed)
    toy = device(
        num_cores=rng.randint(1, 150), tile_m=rng.choice([64, 128, 256]), tile_n=rng.choice([32, 128, 192]),
        tile_reuse=rng.uniform(0, 100), wave_loss=rng.random(), fill_k=rng.uniform(0, 300),
        edge_sharpness=rng.uniform(1, 9),
    )  # fmt: skip
    for _ in range(50):
        shape = [rng.randint(1, 9), rng.randint(1, 3000), 8 * rng.randint(1, 400), 8 * rng.randint(1, 400)]
        grown = list(shape)
        side = rng.randrange(4)
        grown[side] += rng.choice([8, 64, 200])
        times_s = [work_time_s(product(m, n, k, batch), toy) for batch, m, n, k in (shape, grown)]
        assert times_s[0] <= times_s[1] * (1 + 1e-12)
        assert 0 < matmul_share(tuple(shape), toy.efficiency) <= 1


# --- attention ----------------------------------------------------------------------------------------------


def test_attention_reaches_half_of_its_best_at_the_head_dimension_and_sequence_of_the_device() -> None:
    def share(work: Work, **efficiency: float) -> float:
        return work.flops / PEAK / work_time_s(work, device(**efficiency))

    assert isclose(share(attention(4096, 128)), 0.4)
    assert isclose(share(attention(4096, 128, "native_attention")), 0.8)
    assert isclose(share(attention(4096, 64), head_dim_half=64), 0.2)
    assert isclose(share(attention(4096, 192), head_dim_half=64), 0.3)
    assert isclose(share(attention(512, 64), sequence_half=512), 0.2)
    assert isclose(share(attention(512, 64), sequence_half=512, head_dim_half=64), 0.1)


def test_attention_is_faster_with_larger_heads_and_longer_sequences_as_published() -> None:
    """FlashAttention-2, arXiv:2307.08691, figure 4: rates rise with both on an A100."""
    a100 = Roofline(hardware_db.accelerator("a100-sxm-80gb"))

    def rate(sequence: int, head_dim: int) -> float:
        work = attention(sequence, head_dim)
        return work.flops / a100.time_s(work)

    for head_dim in (64, 128):
        rates = [rate(sequence, head_dim) for sequence in (512, 1024, 2048, 4096, 8192, 16384)]
        assert rates == sorted(rates)
    assert rate(4096, 64) < rate(4096, 128)


def test_a_roofline_remembers_what_it_worked_out() -> None:
    roofline = Roofline(H100)
    work = product(4096, 4096, 4096)
    assert roofline.time_s(work) == roofline.time_s(replace(work)) == work_time_s(work, H100)
