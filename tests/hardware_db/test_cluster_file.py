"""Cluster files: both forms, overrides, the round trip, and errors that name file and field."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import hardware_db
from hardware_db import ClusterFileError, cluster_document, cluster_file, parse_cluster

BY_LEVELS = """
name: my-lab
device: a100-80gb
levels:
  - {name: nvlink, devices: 8, bandwidth_bytes_per_s: 300e9, latency_s: 5e-6, efficiency: 0.8}
  - {name: infiniband, devices: 64, bandwidth_bytes_per_s: 25e9, latency_s: 10e-6, oversubscription: 2}
"""
INLINE = """
device:
  name: prototype
  memory_bytes: 64e9
  memory_bandwidth_bytes_per_s: 2e12
  peak_flops_per_s: {bf16: 400e12}
  efficiency: {matmul: 0.6}
levels: [{name: link, devices: 4, bandwidth_bytes_per_s: 1e11, latency_s: 1e-6, topology: mesh}]
"""


def write(folder: Path, text: str, name: str = "lab.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_levels_by_hand(tmp_path: Path) -> None:
    cluster = hardware_db.cluster(write(tmp_path, BY_LEVELS))
    assert (cluster.id, cluster.num_devices, cluster.devices_per_node) == ("my-lab", 64, 8)
    assert [level.bandwidth_bytes_per_s for level in cluster.levels] == [240e9, 12.5e9]
    assert cluster.levels[1].latency_s == 10e-6
    assert cluster.device == hardware_db.accelerator("a100-80gb")


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    cluster = hardware_db.cluster(tmp_path / Path(write(tmp_path, INLINE, "prototypes.yml")).name)
    assert cluster.name == "prototypes"  # the file's name, when the file gives none
    assert cluster.device.peak_flops_per_s("bf16") == 400e12
    assert cluster.device.memory.capacity_bytes.confidence == "user"
    assert cluster.device.efficiency.matmul == 0.6
    assert cluster.device.efficiency.memory == 0.75  # a gpu's, since the file says nothing


def test_nodes_with_overrides(tmp_path: Path) -> None:
    text = """
    node: dgx-a100
    count: 4
    scale_out_bytes_per_s_per_device: 10e9
    efficiency: {memory: 0.5}
    price_usd_per_device_hour: 2
    """
    cluster = hardware_db.cluster(write(tmp_path, text))
    plain = hardware_db.cluster("dgx-a100*4")
    assert cluster.levels[0] == plain.levels[0]
    assert cluster.levels[1].line_rate_bytes_per_s == 10e9
    assert cluster.device.efficiency.memory == 0.5
    assert cluster.device.efficiency.matmul == plain.device.efficiency.matmul
    assert cluster.price_usd_per_device_hour == 2
    assert cluster.node_id == "dgx-a100"


def test_the_device_of_a_node_can_be_replaced() -> None:
    by_id = parse_cluster({"node": "dgx-1v", "device": "v100-16gb", "count": 2})
    assert (by_id.device, by_id.levels) == (
        hardware_db.accelerator("v100-16gb"),
        hardware_db.cluster("dgx-1v*2").levels,
    )
    inline = {"memory_bytes": 1e11, "memory_bandwidth_bytes_per_s": 1e12, "peak_flops_per_s": {"bf16": 1e15}}
    ours = parse_cluster({"node": "dgx-h100", "device": inline, "count": 2})
    for level, published in zip(ours.levels, hardware_db.cluster("dgx-h100*2").levels, strict=True):
        # What was measured was measured with the device that is replaced.
        assert level == replace(published, reduction=None, measured=())
    assert ours.device.memory_bytes == 1e11


def test_a_file_supplies_what_nobody_has_published() -> None:
    cluster = parse_cluster({"node": "mlu370-x8-server", "count": 2, "scale_out_bytes_per_s_per_device": 1e9})
    assert cluster.num_devices == 32
    assert cluster.levels[-1].line_rate_bytes_per_s == 1e9


@pytest.mark.parametrize(
    "spec", ["dgx-h100*16", "tpu-v4-pod", "mlu370-x8-server", "gb200-nvl72*2", "frontier", "local-cpu*4"]
)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_written_cluster_reads_back_as_the_same_machine(spec: str, suffix: str, tmp_path: Path) -> None:
    original = hardware_db.cluster(spec)
    document = cluster_document(original)
    text = json.dumps(document) if suffix == ".json" else yaml.safe_dump(document)
    again = hardware_db.cluster(write(tmp_path, text, f"copy{suffix}"))
    assert again.device == original.device
    assert (again.num_devices, again.devices_per_node) == (original.num_devices, original.devices_per_node)
    assert again.host_memory_bytes_per_device == original.host_memory_bytes_per_device
    assert again.price_usd_per_device_hour == original.price_usd_per_device_hour
    assert [replace(level, line_rate_bytes_per_s=None) for level in again.levels] == [
        replace(level, line_rate_bytes_per_s=None) for level in original.levels
    ]
    assert cluster_document(again) == document


def test_an_inline_device_survives_the_round_trip() -> None:
    original = parse_cluster(yaml.safe_load(INLINE))
    again = parse_cluster(cluster_document(original))
    assert again.device.peak_dense_flops_per_s == original.device.peak_dense_flops_per_s
    assert again.device.memory == original.device.memory
    assert again.device.efficiency == original.device.efficiency
    assert again.levels[0].num_devices == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BY_LEVELS.replace("bandwidth_", "bandwith_", 1),
            "levels[0].bandwith_bytes_per_s: unknown field; did you mean 'bandwidth_bytes_per_s'",
        ),
        (BY_LEVELS.replace("bandwidth_", "bandwith_", 1), "levels[0].bandwidth_bytes_per_s: is missing"),
        (
            BY_LEVELS.replace("25e9", "fast"),
            "levels[1].bandwidth_bytes_per_s: got 'fast' (str), expected a valid number",
        ),
        (
            BY_LEVELS.replace("devices: 8", "devices: 0"),
            "levels[0].devices: got 0 (int), expected greater than or equal to 1",
        ),
        (
            BY_LEVELS.replace("devices: 64", "devices: 60"),
            "level 'infiniband' has 60 devices, no multiple of the 8",
        ),
        (
            BY_LEVELS.replace("a100-80gb", "a100-90gb"),
            "unknown accelerator 'a100-90gb'; did you mean 'a100-80gb'",
        ),
        (BY_LEVELS.replace("name: my-lab", "names: my-lab"), "names: unknown field; did you mean 'name'?"),
        (BY_LEVELS + "node: dgx-h100\n", "has both `node` and `levels`"),
        (
            INLINE.replace("memory_bytes", "memory_byte"),
            "device.memory_byte: unknown field; did you mean 'memory_bytes'?",
        ),
        (INLINE.replace("bf16", "bf17"), "device.peak_flops_per_s.bf17: got 'bf17' (str), expected 'fp64'"),
        (
            INLINE.replace("matmul: 0.6", "matmul: 60"),
            "device.efficiency.matmul: got 60 (int), expected less than or equal to 1",
        ),
        (
            INLINE.replace("topology: mesh", "topology: star"),
            "levels[0].topology: got 'star' (str), expected 'switch'",
        ),
        ("device: 7\nlevels: []\n", "device: got 7 (int), expected a valid string"),
        ("node: dgx-h1000\n", "unknown node 'dgx-h1000'; did you mean 'dgx-h100'"),
        ("node: dgx-h100\ncuont: 2\n", "cuont: unknown field; did you mean 'count'?"),
        ("nodes: 4\n", "expected `node`, or `device` and `levels`, got the fields nodes"),
        ("just words\n", "expected fields such as `device` and `levels`, got 'just words' (str)"),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_errors_name_file_field_found_and_expected(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ClusterFileError, match=re.escape(message)) as caught:
        hardware_db.cluster(path)
    assert all(line.startswith(path) for line in str(caught.value).splitlines() if message in line)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClusterFileError, match=r"none\.json: cannot be read: No such file"):
        hardware_db.cluster(tmp_path / "none.json")


def test_the_documented_examples_are_valid() -> None:
    blocks = re.findall(r"(?:^    .*\n|^\n)+", cluster_file.__doc__ or "", flags=re.MULTILINE)
    by_levels, by_node, measured, device = (yaml.safe_load(block) for block in blocks if block.strip())
    assert parse_cluster(by_levels).num_devices == 64
    assert parse_cluster(by_node).num_devices == 64
    assert parse_cluster(by_levels | device).device.id == "prototype"
    innermost, *outer = by_levels["levels"]
    ours = parse_cluster(by_levels | {"levels": [innermost | measured, *outer]})
    assert [table.shape for table in ours.levels[0].measured] == [(8,)]


def test_a_device_says_how_its_library_runs_collectives() -> None:
    levels = [{"name": "link", "devices": 4, "bandwidth_bytes_per_s": 1e11, "latency_s": 1e-6}]
    for device, expected in (("a100-80gb", False), ("tpu-v5e", True)):
        assert parse_cluster({"device": device, "levels": levels}).levels[0].level_by_level is expected
    ours = [levels[0] | {"level_by_level": True}]
    assert parse_cluster({"device": "a100-80gb", "levels": ours}).levels[0].level_by_level is True
