"""Calibration: what is counted, what is measured first, and that a plan is priced by the profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hardware_db
from autopar import api
from autopar.calibrate import calibrate, compute, measure
from autopar.calibrate.collectives import KINDS, groups_of
from autopar.calibrate.compute import Bench
from autopar.calibrate.links import links_of
from autopar.calibrate.machine import device_of
from autopar.calibrate.sizes import SIZES, Attention, Product, Sizes
from autopar.calibrate.timing import Timing, on_fresh_operands, time_call
from autopar.cli import main
from autopar.errors import AutoparError
from costmodel import Collective, Group, collective_time_s
from hardware_db import Profile, load_profile
from hardware_db.profile import CollectiveTime
from tests.autopar.small_models import tower

CPU = torch.device("cpu")


@pytest.fixture
def second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a second, so a rate is the number that was counted."""
    monkeypatch.setattr(compute, "time_call", lambda call, limit_s: (call(), Timing(1.0, 0.0))[1])


def test_a_command_measures_this_cpu_and_the_planner_prices_by_it(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    words = ["calibrate", "--quick", "--device", "cpu", "--dtypes", "fp32", "-q", "-o", str(path)]
    assert main(words) == 0
    assert main(words) == 2  # it never overwrites
    profile = load_profile(path)
    assert (profile.kind, profile.accelerator, profile.num_threads) == ("cpu", None, torch.get_num_threads())
    assert 1e8 < profile.peak_flops_per_s["fp32"] < 1e13
    assert 1e8 < profile.bytes_per_s < 1e12
    assert 1e-8 < profile.launch_overhead.per_kernel_s < 1e-3
    (tmp_path / "here.yaml").write_text("node: local-cpu\nprofile: profile.json\n")
    published = api.evaluate(tower(), "local-cpu", global_batch=8).prediction
    measured = api.evaluate(tower(), tmp_path / "here.yaml", global_batch=8).prediction
    assert measured.step_s != published.step_s
    slower = profile.model_copy(
        update={
            "matmul": tuple(
                row.model_copy(update={"flops_per_s": row.flops_per_s / 100}) for row in profile.matmul
            )
        }
    )
    priced = api.evaluate(tower(), hardware_db.cluster("local-cpu", slower), global_batch=8).prediction
    assert priced.step_s > 2 * measured.step_s


@pytest.mark.distributed
def test_two_ranks_measure_their_link(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "autopar", "calibrate", "--quick", "--device", "cpu", "--dtypes", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-o", str(path)], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saved") == 1  # by one rank
    profile = load_profile(path)
    assert {row.kind for row in profile.collectives} == set(KINDS)
    (link,) = profile.links
    cluster = hardware_db.cluster("local-cpu*2", profile)
    assert cluster.levels[0].bandwidth_bytes_per_s == link.bandwidth_bytes_per_s
    for kind in KINDS:
        smallest, largest = sorted(
            (row for row in profile.collectives if row.kind == kind), key=lambda row: row.bytes
        )
        price_s = collective_time_s(Collective(kind, largest.bytes, Group(2)), cluster)
        assert price_s == pytest.approx(largest.seconds)
        price_s = collective_time_s(Collective(kind, smallest.bytes, Group(2)), cluster)
        assert price_s == pytest.approx(min(smallest.seconds, largest.seconds))


def test_products_and_attention_count_as_torch_counts(second_each: None) -> None:
    product = Bench(CPU, 0.0).matmul("fp32", 8, 24, 16)
    with FlopCounterMode(display=False) as counted:
        F.linear(torch.randn(8, 16), torch.randn(24, 16))
    assert product.flops_per_s == counted.get_total_flops()

    attention = Bench(CPU, 0.0).attention("fp32", 2, 3, 16, 8, causal=False)
    query, key, value = (torch.randn(2, 3, 16, 8, device="meta", requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counted:
        result = F.scaled_dot_product_attention(query, key, value)  # as two plain products, four backward
    assert attention.forward_flops_per_s == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        result.sum().backward()
    assert attention.backward_flops_per_s == counted.get_total_flops() * 5 / 4  # one is done again
    halved = Bench(CPU, 0.0).attention("fp32", 2, 3, 16, 8, causal=True)
    assert halved.forward_flops_per_s == attention.forward_flops_per_s / 2


def test_the_bytes_of_a_sum_are_those_of_its_three_tensors(second_each: None) -> None:
    row = Bench(CPU, 0.0).memory(12_000)
    assert row.bytes == row.bytes_per_s == 12_000


def test_no_operand_is_met_again_before_the_cache_has_forgotten_it() -> None:
    met: list[int] = []
    call = on_fresh_operands(lambda tensor: met.append(tensor.data_ptr()), torch.zeros(4 * 2**20))
    for _ in range(18):
        call()
    assert len(set(met)) == 9  # 16 MiB each, and more than two caches of 64 MiB between two meetings
    assert met[:9] == met[9:]


def test_the_time_of_a_call_is_that_of_one_call() -> None:
    """Not of all repetitions, whose number only the timer knows: they sleep, so load hardly matters."""
    seconds = time_call(lambda: time.sleep(1e-3), 0.2).seconds
    assert 1e-3 <= seconds < 0.1


def test_the_first_of_everything_is_measured_however_late_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Product(64, 64, 64), Product(32, 32, 32)
    small = Sizes(0.01, products, (3000, 6000), (Attention(1, 1, 16, 8, True),), (64, 128))
    monkeypatch.setattr(measure, "SIZES", {"cpu": small})
    told: list[tuple[str, int, int]] = []
    late = calibrate("cpu", ("fp32", "bf16"), max_seconds=1e-9, progress=lambda *what: told.append(what))
    assert [(row.dtype, row.m) for row in late.matmul] == [("fp32", 64), ("bf16", 64)]
    assert len(late.memory) == 1
    assert ("matrix products", 2, 4) in told
    in_time = calibrate("cpu", ("fp32",))
    assert [row.m for row in in_time.matmul] == [64, 32]
    assert [row.bytes for row in in_time.memory] == [3000, 6000]


def test_two_runs_differ_in_measured_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZES", {"cpu": SIZES["cpu"].quick()})
    monkeypatch.setattr(compute, "time_call", lambda call, limit_s: Timing(1.0, 0.0))
    assert calibrate("cpu").to_json() == calibrate("cpu").to_json()


def rows_of(latency_s: float, bandwidth: float, num_ranks: int) -> list[CollectiveTime]:
    """What the cost model says of such links."""
    level = hardware_db.Level("link", num_ranks, bandwidth, latency_s, "switch")
    device = hardware_db.accelerator("cpu")
    cluster = hardware_db.Cluster("c", "c", device, num_ranks, num_ranks, (level,))
    return [
        CollectiveTime(
            kind=kind,
            world_size=num_ranks,
            stride=1,
            bytes=num_bytes,
            seconds=collective_time_s(Collective(kind, num_bytes, Group(num_ranks)), cluster),
            spread=0.0,
        )
        for kind in KINDS
        for num_bytes in (2**12, 2**18, 2**24)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3])  # at most three ranks: a tree is no quicker than a ring
def test_the_line_through_prices_of_the_cost_model_is_the_link_they_came_from(num_ranks: int) -> None:
    (link,) = links_of(rows_of(12e-6, 3e9, num_ranks))
    assert link.latency_s == pytest.approx(12e-6, rel=1e-3)
    assert link.bandwidth_bytes_per_s == pytest.approx(3e9, rel=1e-3)
    assert link.relative_error < 1e-3


def test_a_line_never_has_a_latency_below_zero() -> None:
    faster_when_small = [
        row.model_copy(update={"seconds": row.seconds * row.bytes**0.5}) for row in rows_of(0.0, 3e9, 2)
    ]
    (link,) = links_of(faster_when_small)
    assert link.latency_s == 0
    assert link.bandwidth_bytes_per_s > 0


def test_one_size_makes_no_line() -> None:
    assert links_of([row for row in rows_of(1e-6, 1e9, 2) if row.bytes == 2**12]) == ()


@pytest.mark.parametrize(
    ("world_size", "ranks_per_host", "groups"),
    [
        (2, 2, [(2, 1)]),
        (8, 8, [(2, 1), (4, 1), (8, 1)]),
        (6, 6, [(2, 1), (6, 1)]),
        (32, 8, [(2, 1), (4, 1), (8, 1), (2, 8), (4, 8)]),
        (4, 1, [(2, 1), (4, 1)]),
    ],
)
def test_groups_stay_in_a_host_or_have_a_rank_on_each(
    world_size: int, ranks_per_host: int, groups: list[tuple[int, int]]
) -> None:
    found = groups_of(world_size, ranks_per_host)
    assert [(group.size, group.stride) for group in found] == groups
    assert all(world_size % (group.size * group.stride) == 0 for group in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtypes", "fp23"], "cannot measure dtype 'fp23'; did you mean 'fp32'"),
        (["--device", "cdua"], "unknown device 'cdua'; did you mean 'cuda'?"),
        (["--accelerator", "h10"], "unknown accelerator 'h10'; did you mean"),
        (["--max-seconds", "0"], "expected a positive number"),
    ],
)
def test_a_wrong_request_is_told_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is missing")
def test_a_missing_device_is_told() -> None:
    with pytest.raises(AutoparError, match=r"sees no CUDA device here; calibrate --device cpu"):
        device_of("cuda")


def test_without_a_file_the_profile_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compute, "time_call", lambda call, limit_s: Timing(1.0, 0.0))
    assert main(["calibrate", "--quick", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert Profile.model_validate(json.loads(printed.out)).kind == "cpu"
    assert "small op" in printed.err
