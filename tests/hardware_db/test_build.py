"""Clusters built from nodes: which levels, how many devices, what rates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

import hardware_db
from hardware_db import Cluster, HardwareError, Level, MissingFactError, UnknownHardwareError

LINKS_UNPUBLISHED = {"cambricon-x8-m"}


def shape(cluster: Cluster) -> list[tuple[str, int]]:
    return [(level.topology, level.num_devices) for level in cluster.levels]


def line_rates(cluster: Cluster) -> list[float]:
    return [level.line_rate_bytes_per_s or 0.0 for level in cluster.levels]


def test_dgx_h100() -> None:
    cluster = hardware_db.cluster("dgx-h100*16")
    assert (cluster.num_devices, cluster.devices_per_node, cluster.num_nodes) == (128, 8, 16)
    assert shape(cluster) == [("switch", 8), ("fat_tree", 128)]
    assert line_rates(cluster) == [450e9, 50e9]
    # 370 GB/s is the ring all-reduce bus bandwidth measured on eight H100.
    assert cluster.levels[0].bandwidth_bytes_per_s == pytest.approx(370e9, rel=1e-3)
    assert cluster.host_memory_bytes_per_device == 2e12 / 8


def test_one_node_has_no_network_level() -> None:
    assert hardware_db.cluster("dgx-h100") == hardware_db.cluster("dgx-h100*1")
    assert shape(hardware_db.cluster("dgx-h100")) == [("switch", 8)]


def test_nvl72_is_one_domain_of_eighteen_hosts() -> None:
    cluster = hardware_db.cluster("gb200-nvl72*2")
    assert shape(cluster) == [("switch", 72), ("fat_tree", 144)]
    assert (cluster.devices_per_node, cluster.num_nodes) == (4, 36)


def test_a_scale_up_domain_smaller_than_the_node_leaves_the_hosts_tree_for_the_rest() -> None:
    pairs = hardware_db.cluster("pcie-8xa100")
    assert shape(pairs) == [("mesh", 2), ("switch", 4), ("switch", 8)]
    # A PCIe 4.0 uplink of 31 GB/s for the two cards of a switch, 22 GB/s between the sockets for four.
    assert line_rates(pairs) == [300e9, 31e9 / 2, 22e9 / 4]
    # MLU370-X8: a bridge joins 4 cards of two logical devices each, which share the card's links.
    mlu = hardware_db.cluster("mlu370-x8-server")
    assert shape(mlu) == [("mesh", 8), ("switch", 16)]
    assert line_rates(mlu) == [50e9, 22e9 / 8]
    assert mlu.device.memory_bytes == 24e9


def test_cards_without_links_meet_on_the_switches_of_their_host() -> None:
    host = hardware_db.cluster("pcie-8xl40s")
    assert [level.name for level in host.levels] == ["pcie switch", "pcie root", "sockets"]
    assert line_rates(host) == [31e9, 31e9 / 2, 22e9 / 4]
    assert [level.alone_bytes_per_s for level in host.levels] == [None, 31e9 * 0.77, 22e9]


def test_unpublished_network_cards_are_assumed_with_a_note() -> None:
    two = hardware_db.cluster("pcie-8xl40s*2")
    assert line_rates(two)[-1] == 12.5e9
    assert any("The network cards of pcie-8xl40s are not published" in note for note in two.notes)
    assert not any("network cards" in note for note in hardware_db.cluster("pcie-8xl40s").notes)
    # The vendor's reference node is a published figure of another machine's, and needs no note.
    assert not any("network cards" in note for note in hardware_db.cluster("dgx-h100*2").notes)


def test_a_device_alone_drives_one_network_card() -> None:
    volta = hardware_db.cluster("dgx-1v*2").levels[-1]  # four cards of 100 Gbit/s for eight devices
    assert volta.alone_bytes_per_s == pytest.approx(2 * volta.bandwidth_bytes_per_s)
    hopper = hardware_db.cluster("dgx-h100*2").levels[-1]
    assert hopper.alone_bytes_per_s == hopper.bandwidth_bytes_per_s


def test_reductions_and_tables_come_with_the_links_that_have_them() -> None:
    h100, a100 = hardware_db.cluster("dgx-h100*2").levels, hardware_db.cluster("dgx-a100*2").levels
    assert h100[0].reduction is not None
    assert (a100[0].reduction, h100[1].reduction) == (None, None)
    assert [table.shape for table in a100[0].measured] == [(8,)]
    efa = hardware_db.cluster("aws-p6-b200*8").levels[-1]
    assert [table.shape for table in efa.measured] == [(8, 4)]
    assert hardware_db.cluster("aws-p6-b200*2").levels[-1].measured == ()
    assert hardware_db.cluster("dgx-b200*8").levels[-1].measured == ()
    sharp = hardware_db.cluster("dgx-a100-superpod-140").levels[1:]
    assert all(level.reduction is not None for level in sharp)


def test_rails_and_dragonflies_are_named_clusters_tiers() -> None:
    assert shape(hardware_db.cluster("dgx-b200-superpod")) == [("switch", 8), ("rails", 256), ("rails", 1024)]
    frontier = hardware_db.cluster("frontier")
    # 9,408 nodes are 84 groups of 112, the nearest to 128 that divides them.
    assert shape(frontier)[-2:] == [("fat_tree", 112 * 8), ("dragonfly", 9408 * 8)]
    # Farther tiers are more switches away.
    assert frontier.levels[-1].latency_s > frontier.levels[-2].latency_s


def test_the_library_of_a_device_says_whether_it_goes_level_by_level() -> None:
    for spec, expected in (("dgx-h100*2", False), ("tpu-v5e-host*64", True), ("atlas-800t-a2*2", True)):
        assert {level.level_by_level for level in hardware_db.cluster(spec).levels} == {expected}


def test_a_protocol_needs_links_that_have_it() -> None:
    assert [p.name for p in hardware_db.cluster("dgx-a100*2").levels[-1].protocols] == ["ll128"]
    for without in ("pcie-8xl40s*2", "tpu-v5e-host*64", "aws-p5*2"):
        assert hardware_db.cluster(without).levels[-1].protocols == ()


def test_what_is_calibrated_replaces_all_that_is_published() -> None:
    nvswitch = hardware_db.cluster("dgx-h100").levels[0]
    assert nvswitch.calibrated(1e11, 1e-5) == Level(
        "nvswitch",
        8,
        1e11,
        1e-5,
        "switch",
        line_rate_bytes_per_s=450e9,
        concurrent_messages=nvswitch.concurrent_messages,
        level_by_level=False,
        tree_bandwidth_share=nvswitch.tree_bandwidth_share,
    )


def test_dies_of_one_package_have_a_level_of_their_own() -> None:
    frontier = hardware_db.cluster("frontier-mi250x")
    assert shape(frontier) == [("switch", 2), ("mesh", 8)]
    assert line_rates(frontier) == [200e9, 175e9]


def test_a_tpu_pod_has_a_level_per_axis_of_the_torus() -> None:
    pod = hardware_db.cluster("tpu-v4-pod")
    assert shape(pod) == [("torus", 16), ("torus", 256), ("torus", 4096)]
    assert line_rates(pod) == [90e9] * 3  # 45 GB/s per link, both ways round the ring
    assert (pod.devices_per_node, pod.num_nodes) == (4, 1024)


def test_a_small_tpu_slice_does_not_close_its_rings() -> None:
    assert line_rates(hardware_db.cluster("tpu-v4-host*8")) == [45e9] * 3  # 2 x 4 x 4 is no whole cube
    assert line_rates(hardware_db.cluster("tpu-v4-host*16")) == [90e9] * 3  # 4 x 4 x 4 is one
    assert shape(hardware_db.cluster("tpu-v5e-host*16")) == [("line", 8), ("torus", 128)]  # the 16 closes


def test_pods_are_joined_by_the_data_centre_network() -> None:
    two_pods = hardware_db.cluster("tpu-v5e-host*64")
    assert shape(two_pods) == [("torus", 16), ("torus", 256), ("fat_tree", 512)]
    assert line_rates(two_pods)[-1] == 2 * 100e9 / 8 / 8  # two 100 Gbit/s cards for eight chips
    with pytest.raises(HardwareError, match="6000 cards do not fill scale-up domains of 4096"):
        hardware_db.cluster("tpu-v4-host*1500")


def test_local_cpu_processes_share_one_host() -> None:
    local = hardware_db.cluster("local-cpu*4")
    assert (local.num_devices, local.devices_per_node, local.num_nodes) == (4, 4, 1)
    assert shape(local) == [("switch", 4)]
    assert local.device.kind == "cpu"
    assert shape(hardware_db.cluster("local-cpu")) == [("switch", 1)]


def test_named_clusters_have_the_tiers_of_their_network() -> None:
    llama = hardware_db.cluster("meta-roce-24k")
    assert shape(llama)[1:] == [("fat_tree", 16), ("fat_tree", 3072), ("fat_tree", 24576)]
    # The Llama 3 paper: full bisection inside a pod of 3072, 1:7 oversubscribed above.
    assert line_rates(llama)[1:] == pytest.approx([50e9, 50e9, 50e9 / 7])


def test_a_tier_that_the_cluster_does_not_fill_is_merged_outwards() -> None:
    assert shape(hardware_db.cluster("dgx-h100-superpod")) == [("switch", 8), ("rails", 127 * 8)]
    assert shape(hardware_db.cluster("dgx-b200-superpod"))[1:] == [("rails", 256), ("rails", 1024)]


@pytest.mark.parametrize("id", hardware_db.clusters())
def test_named_clusters_are_as_large_as_published(id: str) -> None:
    cluster = hardware_db.cluster(id)
    entry = hardware_db.catalog.cluster_entry(id)
    card = hardware_db.accelerator(hardware_db.node(entry.node_id).accelerator_id)
    assert cluster.num_devices == pytest.approx(
        (entry.accelerator_count.value or 0) * card.logical_devices_per_card
    )


@pytest.mark.parametrize("id", hardware_db.nodes())
def test_only_unpublished_links_keep_nodes_from_joining(id: str) -> None:
    if id in LINKS_UNPUBLISHED:
        with pytest.raises(MissingFactError, match="unknown"):
            hardware_db.cluster(f"{id}*2")
    else:
        hardware_db.cluster(f"{id}*2")


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("id", sorted(set(hardware_db.nodes()) - LINKS_UNPUBLISHED))
def test_levels_nest_and_shrink_in_bandwidth(id: str, count: int) -> None:
    if count == 3 and id in ("tpu-v4-host", "tpu-v5p-host", "tpu-v7-host"):
        count *= 16  # whole cubes
    cluster = hardware_db.cluster(f"{id}*{count}")
    sizes = [level.num_devices for level in cluster.levels]
    assert sizes[-1] == cluster.num_devices
    assert all(outer % inner == 0 and outer > inner for inner, outer in pairwise(sizes))
    # The axes of a torus are alike, and a host's sockets may be joined by less than its network cards.
    rates = [
        level.bandwidth_bytes_per_s
        for level in cluster.levels
        if level.topology not in ("torus", "line") and level.name != "sockets"
    ]
    assert rates == sorted(rates, reverse=True)
    assert all(1e-7 < level.latency_s < 1e-3 for level in cluster.levels)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("dgx-h10*4", UnknownHardwareError, "did you mean 'dgx-h100'"),
        ("selen", UnknownHardwareError, "did you mean 'selene'"),
        (
            "h100*8",
            UnknownHardwareError,
            "'h100-sxm' is an accelerator, not a node; nodes with it: .*dgx-h100",
        ),
        ("rubin", UnknownHardwareError, "no node has it"),
        ("selene*2", UnknownHardwareError, r"'selene' is a whole cluster; its nodes are 'dgx-a100\*COUNT'"),
        ("", UnknownHardwareError, "unknown cluster ''"),
        ("dgx-h100*0", HardwareError, "at least 1"),
        ("dgx-h100*-1", HardwareError, "got '-1'"),
        ("dgx-h100*many", HardwareError, "expected NODE\\*COUNT .* got 'many'"),
        ("cambricon-x8-m", MissingFactError, "scale_up.total_bytes_per_s is unknown"),
    ],
)
def test_errors_say_what_to_do(spec: str, error: type[HardwareError], message: str) -> None:
    with pytest.raises(error, match=message):
        hardware_db.cluster(spec)


def test_a_cluster_checks_its_levels() -> None:
    good = hardware_db.cluster("dgx-h100*2")
    nvlink, network = good.levels
    with pytest.raises(
        HardwareError, match="level 'network' has 12 devices, no multiple of the 8 of level 'nvswitch'"
    ):
        replace(good, num_devices=12, devices_per_node=4, levels=(nvlink, replace(network, num_devices=12)))
    with pytest.raises(HardwareError, match="'nvswitch' joins 8 devices of 16"):
        replace(good, levels=(nvlink,))
    with pytest.raises(HardwareError, match="no levels"):
        replace(good, levels=())
    with pytest.raises(HardwareError, match="16 devices do not fill nodes of 5"):
        replace(good, devices_per_node=5)
    with pytest.raises(HardwareError, match="bandwidth above 0"):
        replace(good, levels=(nvlink, Level("network", 16, 0.0, 1e-6, "switch")))


def test_clusters_can_be_keys() -> None:
    assert len({hardware_db.cluster("dgx-h100*2"), hardware_db.cluster("dgx-h100*2")}) == 1
