"""Pools: what a user calls them, what joins them, and when several are one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hardware_db
from hardware_db import Cluster, ClusterFileError, HardwareError, Pools, UnknownHardwareError, catalog
from hardware_db.pools import collective_library

FILE = """
name: old-and-new
pools:
  - dgx-h100*4
  - {node: dgx-a100, count: 2}
  - device: a100-80gb
    name: leftovers
    levels: [{name: nvlink, devices: 4, bandwidth_bytes_per_s: 240e9, latency_s: 5e-6}]
between: {gbit_per_s: 400, latency_s: 20e-6}
"""


def written(folder: Path, text: str, name: str = "lab.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def pools(spec: str | Path) -> Pools:
    found = hardware_db.cluster_or_pools(spec)
    assert isinstance(found, Pools)
    return found


def test_pools_by_name_are_joined_by_the_slower_network() -> None:
    mixed = pools("dgx-h100*32 + dgx-a100*16")
    assert [pool.id for pool in mixed.pools] == ["dgx-h100*32", "dgx-a100*16"]
    assert mixed.num_devices == 256 + 128
    network = hardware_db.cluster("dgx-a100*16").levels[-1]
    assert mixed.link_bytes_per_s == 8 * network.bandwidth_bytes_per_s
    assert mixed.link_latency_s == network.start_s + network.latency_s


def test_single_nodes_meet_over_their_network_cards_not_their_switch() -> None:
    assert pools("dgx-h100 + dgx-a100").link_bytes_per_s == pools("dgx-h100*2 + dgx-a100*2").link_bytes_per_s


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ("dgx-h100*4 + dgx-h100*12", "dgx-h100*16"),
        ("dgx-h100 + dgx-h100+dgx-h100", "dgx-h100*3"),
        ("mlu370-x8-server*2 + mlu370-x8-server*2", "mlu370-x8-server*4"),
        ("gb200-nvl72 + gb200-nvl72", "gb200-nvl72*2"),
    ],
)
def test_equal_pools_are_one_cluster(parts: str, whole: str) -> None:
    assert hardware_db.cluster(parts) == hardware_db.cluster(whole)


def test_equal_pools_are_one_among_others() -> None:
    mixed = pools("dgx-h100 + dgx-a100 + dgx-h100*3")
    assert [pool.id for pool in mixed.pools] == [
        "dgx-h100*4",
        "dgx-a100*1",
    ]


def test_slices_of_a_torus_are_no_larger_slice() -> None:
    assert len(pools("tpu-v4-host*4 + tpu-v4-host*4").pools) == 2


def test_equal_levels_by_hand_widen(tmp_path: Path) -> None:
    text = """
    device: a100-80gb
    levels:
      - {name: nvlink, devices: 4, bandwidth_bytes_per_s: 240e9, latency_s: 5e-6}
      - {name: network, devices: 8, bandwidth_bytes_per_s: 12e9, latency_s: 1e-5}
    """
    path = written(tmp_path, text)
    both = hardware_db.cluster(f"{path} + {path}")
    assert [level.num_devices for level in both.levels] == [4, 16]
    other = written(tmp_path, text.replace("12e9", "6e9"), "other.yaml")
    assert pools(f"{path} + {other}").link_bytes_per_s == 4 * 6e9


def test_equal_pools_with_less_between_them_stay_apart(tmp_path: Path) -> None:
    text = "pools: [dgx-h100*2, dgx-h100*2]\nbetween: {gbit_per_s: 100}"
    apart = pools(written(tmp_path, text))
    assert [pool.id for pool in apart.pools] == ["dgx-h100*2", "dgx-h100*2 (2)"]
    assert apart.link_bytes_per_s == 12.5e9
    joined = hardware_db.cluster(written(tmp_path, text.replace("100}", "100000}")))
    assert joined == hardware_db.cluster("dgx-h100*4")


def test_a_file_of_pools(tmp_path: Path) -> None:
    mixed = pools(written(tmp_path, FILE))
    assert (mixed.id, mixed.link_bytes_per_s, mixed.link_latency_s) == ("old-and-new", 50e9, 20e-6)
    assert [(pool.id, pool.num_devices) for pool in mixed.pools] == [
        ("dgx-h100*4", 32), ("dgx-a100*2", 16), ("leftovers", 4)
    ]  # fmt: skip
    inner = written(tmp_path, "node: dgx-a100\ncount: 3", "inner.yaml")
    outer = written(tmp_path, f"pools: [{inner.name}, dgx-h100]\nbetween: {{bytes_per_s: 1e9}}", "outer.yaml")
    assert [pool.num_devices for pool in pools(outer).pools] == [24, 8]
    assert pools(outer).link_bytes_per_s == 1e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dgx-h100*4", "dgx-h10*4", r"pools\[0\]: unknown cluster 'dgx-h10\*4'; did you mean 'dgx-h100'"),
        ("count: 2", "cuont: 2", r"pools\[1\]: cuont: unknown field; did you mean 'count'"),
        ("gbit_per_s", "gbits_per_s", r"between.gbits_per_s: unknown field; did you mean 'gbit_per_s'"),
        ("400,", "400, bytes_per_s: 1,", "both `gbit_per_s` and `bytes_per_s`"),
        ("between", "betweenn", "betweenn: unknown field; did you mean 'between'"),
        ("gbit_per_s: 400", "gbit_per_s: 0", "between.gbit_per_s: got 0"),
        ("dgx-h100*4", "7", r"pools\[0\]"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, FILE.replace(old, new))
    with pytest.raises(ClusterFileError, match=re.escape(str(path)) + ".*" + message):
        hardware_db.cluster_or_pools(path)


def test_mistakes_in_a_name_are_explained() -> None:
    with pytest.raises(UnknownHardwareError, match="did you mean 'dgx-a100'"):
        hardware_db.cluster_or_pools("dgx-h100 + dgx-a10")
    with pytest.raises(HardwareError, match=r"empty; pools are written"):
        hardware_db.cluster_or_pools("dgx-h100 +")
    with pytest.raises(HardwareError, match=r"2 pools of different devices.*cluster_or_pools"):
        hardware_db.cluster("dgx-h100 + dgx-a100")
    with pytest.raises(HardwareError, match="too few"):
        Pools("one", "one", (hardware_db.cluster("dgx-h100"),), 1e9, 0.0)


def test_every_library_has_a_source_and_belongs_to_a_vendor() -> None:
    libraries = catalog.collective_libraries()
    assert {library.source for library in libraries.values()} <= set(hardware_db.sources())
    vendors = {catalog.accelerator(id).vendor for id in catalog.accelerators()}
    assert set(libraries) <= vendors
    names = [library.name for library in libraries.values()]
    assert len(set(names)) == len(names)  # Huawei's HCCL is not Habana's


def test_libraries_follow_the_vendor() -> None:
    def library(pool: Cluster) -> str:
        return collective_library(pool.device)

    assert len({library(pool) for pool in pools("dgx-h100 + dgx-a100").pools}) == 1
    assert [library(pool) for pool in pools("dgx-h100 + atlas-800t-a2 + mlu370-x8-server").pools] == [
        "NCCL", "HCCL (Huawei)", "CNCL"
    ]  # fmt: skip
    assert collective_library(hardware_db.accelerator("wse3")) == "cerebras"
