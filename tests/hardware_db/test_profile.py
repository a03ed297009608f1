"""Profiles: what is written is read again, and what a cluster makes of measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hardware_db
from costmodel import Work, work_time_s
from hardware_db import ClusterFileError, HardwareError, Profile, calibrated, load_profile
from hardware_db.catalog import accelerators
from hardware_db.profile import reported_names

PEAK = 989e12  # of an H100, published
BANDWIDTH = 3.35e12


def link(world_size: int, stride: int, bandwidth: float) -> dict[str, float]:
    return {
        "world_size": world_size,
        "stride": stride,
        "latency_s": 7e-6,
        "bandwidth_bytes_per_s": bandwidth,
        "relative_error": 0.1,
    }


def collective(num_bytes: int, seconds: float, world_size: int = 8, stride: int = 1) -> dict[str, Any]:
    return {
        "kind": "all_reduce",
        "world_size": world_size,
        "stride": stride,
        "bytes": num_bytes,
        "seconds": seconds,
        "spread": 0.0,
    }


def profile(**changes: Any) -> Profile:
    """Half the peak, 60 % of the bandwidth and 30 % in attention of an H100."""
    attention = {"batch": 1, "heads": 16, "seq": 8192, "head_dim": 128, "causal": True, "spread": 0.0}
    fields = {
        "device": "NVIDIA H100 80GB HBM3",
        "accelerator": "h100-sxm",
        "kind": "gpu",
        "memory_bytes": 85_000_000_000,
        "software": {"torch": "2.13.0"},
        "date": "2026-11-21",
        "num_threads": 1,
        "launch_overhead": {"forward_s": 5e-6, "backward_s": 7e-6, "device_s": 1.5e-6, "spread": 0.0},
        "memory": [
            {"bytes": 10**9, "bytes_per_s": 0.6 * BANDWIDTH, "spread": 0.0},
            {"bytes": 10**6, "bytes_per_s": 2.0 * BANDWIDTH, "spread": 0.0},  # in the cache
        ],
        "matmul": [
            {"dtype": "bf16", "m": 8192, "n": 8192, "k": 8192, "flops_per_s": 0.5 * PEAK, "spread": 0.0},
            {"dtype": "bf16", "m": 128, "n": 512, "k": 512, "flops_per_s": 0.1 * PEAK, "spread": 0.0},
            {"dtype": "fp32", "m": 8192, "n": 8192, "k": 8192, "flops_per_s": 5e13, "spread": 0.0},
        ],
        "attention": [
            attention
            | {"dtype": "bf16", "forward_flops_per_s": 0.3 * PEAK, "backward_flops_per_s": 0.2 * PEAK}
        ],
    }
    return Profile.model_validate(fields | changes)


def cpu_profile(**changes: Any) -> Profile:
    overhead = {"forward_s": 2e-6, "backward_s": 4e-6, "device_s": None, "spread": 0.0}
    return profile(device="EPYC", accelerator=None, kind="cpu", launch_overhead=overhead, **changes)


def save(folder: Path, written: Profile, cluster: dict[str, Any]) -> Path:
    (folder / "measured.json").write_text(written.to_json())
    (folder / "lab.json").write_text(json.dumps(cluster | {"profile": "measured.json"}))
    return folder / "lab.json"


def test_what_is_written_is_read_again_and_a_row_is_a_line(tmp_path: Path) -> None:
    written = profile(links=[link(8, 1, 3e11)], collectives=[collective(10**6, 1e-4)])
    path = tmp_path / "profile.json"
    path.write_text(written.to_json())
    assert load_profile(path) == written
    assert '    {"dtype": "bf16", "m": 8192, "n": 8192, "k": 8192,' in path.read_text()


def test_measured_rates_become_shares_of_the_published_ones() -> None:
    cluster = calibrated(hardware_db.cluster("dgx-h100*2"), profile())
    efficiency, published = cluster.device.efficiency, hardware_db.accelerator("h100-sxm").efficiency
    assert efficiency.matmul == pytest.approx(0.5)
    assert efficiency.memory == pytest.approx(0.6)  # the transfer that no cache holds
    assert efficiency.launch_overhead_s == 1.5e-6  # the device's own: a GPU's host runs ahead
    assert efficiency.reserved_memory_bytes == published.reserved_memory_bytes  # nobody measured it
    assert cluster.device.peak_flops_per_s("bf16") == PEAK
    assert cluster.levels == hardware_db.cluster("dgx-h100*2").levels


def test_the_price_of_the_measured_attention_is_the_measured_one() -> None:
    device = calibrated(hardware_db.cluster("dgx-h100"), profile()).device
    flops = 2 * 2 * 16 * 8192**2 * 128 / 2
    work = Work(flops, 0, "bf16", "attention", shape=(16, 8192, 8192, 128), num_launches=0)
    assert work_time_s(work, device) == pytest.approx(flops / (0.3 * PEAK))


def test_a_device_without_published_figures_has_the_measured_ones() -> None:
    cluster = calibrated(hardware_db.cluster("local-cpu*2"), cpu_profile())
    device = cluster.device
    assert (device.id, device.kind, device.memory_bytes) == ("EPYC", "cpu", 85e9)
    assert device.peak_flops_per_s("bf16") == 0.5 * PEAK
    assert device.peak_flops_per_s("fp32") == 5e13
    assert device.memory_bandwidth_bytes_per_s == 0.6 * BANDWIDTH
    assert (device.efficiency.matmul, device.efficiency.memory) == (1.0, 1.0)
    assert device.efficiency.launch_overhead_s == 3e-6  # of forward and backward, on the host itself
    assert device.scale_up == hardware_db.accelerator("cpu").scale_up


def test_a_cluster_file_names_a_profile_beside_it(tmp_path: Path) -> None:
    by_node = save(tmp_path, profile(), {"node": "dgx-h100", "count": 2})
    assert hardware_db.cluster(by_node).device.efficiency.matmul == pytest.approx(0.5)
    own = save(tmp_path, profile(), {"node": "dgx-h100", "efficiency": {"matmul": 0.4}})
    assert hardware_db.cluster(own).device.efficiency.matmul == 0.4  # the file's own word is the last


def test_levels_by_hand_need_no_device_beside_a_profile(tmp_path: Path) -> None:
    levels = [{"name": "link", "devices": 4, "bandwidth_bytes_per_s": 1e9, "latency_s": 1e-6}]
    for measured, id in ((profile(), "h100-sxm"), (cpu_profile(), "EPYC")):
        assert hardware_db.cluster(save(tmp_path, measured, {"levels": levels})).device.id == id


def test_a_profile_for_a_cluster_by_name() -> None:
    cluster = hardware_db.cluster("dgx-h100", profile=profile())
    assert cluster.device.efficiency.matmul == pytest.approx(0.5)


def test_each_level_has_the_line_of_the_groups_that_it_connects() -> None:
    links = [link(2, 1, 1e11), link(8, 1, 3e11), link(16, 1, 4e10), link(2, 8, 5e10)]
    rows = [collective(10**6, 2e-4), collective(10**8, 1e-4), collective(10**6, 3e-4, 2, 8)]
    cluster = calibrated(hardware_db.cluster("dgx-h100*2"), profile(links=links, collectives=rows))
    inside, network = cluster.levels
    assert inside.bandwidth_bytes_per_s == 3e11  # of the whole host
    assert network.bandwidth_bytes_per_s == 5e10  # of groups that meet on it alone
    assert (inside.latency_s, inside.protocols, inside.reduction) == (7e-6, (), None)
    (table,) = inside.measured
    assert (table.kind, table.shape) == ("all_reduce", (8,))
    assert table.points == ((1e6, 1e-4), (1e8, 1e-4))  # a hundred times the bytes were quicker
    assert network.measured == ()  # one point makes no table


def test_a_calibrated_cluster_can_be_written_as_a_file() -> None:
    measured = cpu_profile(links=[link(2, 1, 1e9)], collectives=[collective(2**n, 1e-4, 2) for n in (9, 20)])
    cluster = calibrated(hardware_db.cluster("local-cpu*2"), measured)
    again = hardware_db.parse_cluster(hardware_db.cluster_document(cluster))
    assert again.device.efficiency == cluster.device.efficiency
    (level,), (original,) = again.levels, cluster.levels
    assert (level.latency_s, level.measured) == (original.latency_s, original.measured)
    assert again.device.peak_flops_per_s("fp32") == 5e13


@pytest.mark.parametrize(
    ("measured", "cluster", "message"),
    [
        (profile(), "dgx-a100", "measured on h100-sxm .* but the device of dgx-a100.* is a100"),
        (cpu_profile(), "dgx-h100", "measured on EPYC"),
        (profile(accelerator="a100-sxm-80gb"), "dgx-a100", "reaches 1.58 of the matmul rate published for"),
    ],
)
def test_a_profile_of_another_device_is_refused(measured: Profile, cluster: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        calibrated(hardware_db.cluster(cluster), measured)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "measured.json: cannot be read: No such file"),
        ("{}", "measured.json: device: Field required; write it anew with `autopar calibrate`"),
        (profile().to_json().replace('"m": 8192', '"m": 0', 1), r"matmul.0.m: Input should be greater"),
        ("no", "measured.json: the file: Invalid JSON"),
    ],
)
def test_a_bad_profile_is_told_with_both_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = save(tmp_path, profile(), {"node": "dgx-h100"})
    (tmp_path / "measured.json").unlink()
    if text is not None:
        (tmp_path / "measured.json").write_text(text)
    with pytest.raises(ClusterFileError, match=message) as error:
        hardware_db.cluster(path)
    assert str(path) in str(error.value)


def test_reported_names_lead_to_the_catalog() -> None:
    assert reported_names()["NVIDIA H200"] == "h200-sxm"
    assert set(reported_names().values()) <= set(accelerators())
