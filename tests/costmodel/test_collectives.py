from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest

import hardware_db
from costmodel import Collective, CollectiveKind, Group, algorithms, collective_time_s
from hardware_db import Cluster, InNetworkReduction, Level, Protocol
from hardware_db.machine import LevelTopology

KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)
GB = 1e9


def time_s(kind: CollectiveKind, num_bytes: float, group: Group, cluster: Cluster) -> float:
    return collective_time_s(Collective(kind, num_bytes, group), cluster)


@pytest.mark.parametrize(
    ("kind", "expected_s"),
    [
        # nccl-tests' bus bandwidth factors on 8 ranks at 100 GB/s, plus a microsecond per step.
        ("all_reduce", 2 * 7 / 8 * GB / 100e9 + 14e-6),
        ("all_gather", 7 / 8 * GB / 100e9 + 7e-6),
        ("reduce_scatter", 7 / 8 * GB / 100e9 + 7e-6),
        ("all_to_all", 7 / 8 * GB / 100e9 + 7e-6),
        ("broadcast", GB / 100e9 + 7e-6),
        ("reduce", GB / 100e9 + 7e-6),
        ("scatter", 7 / 8 * GB / 100e9 + 7e-6),
        ("gather", 7 / 8 * GB / 100e9 + 7e-6),
        ("send_recv", GB / 100e9 + 1e-6),
    ],
)
def test_inside_a_switch(kind: CollectiveKind, expected_s: float, cluster: Cluster) -> None:
    assert time_s(kind, GB, Group(8), cluster) == pytest.approx(expected_s)


def test_one_rank_per_node_has_its_own_share_of_the_network(cluster: Cluster) -> None:
    expected_s = 15 / 16 * GB / 10e9 + 15 * 10e-6
    assert time_s("all_gather", GB, Group(16, stride=8), cluster) == pytest.approx(expected_s)


def test_two_ranks_per_node_halve_what_each_sends_across(cluster: Cluster) -> None:
    hierarchical_s = 1 / 2 * GB / 100e9 + 7 / 8 * GB / (2 * 10e9) + 1e-6 + 7 * 10e-6
    flat_s = 15 / 16 * GB / (2 * 10e9) + 8 * 1e-6 + 7 * 10e-6
    ways = {a.name: a.time_s(GB) for a in algorithms("all_gather", Group(16, stride=4), cluster)}
    assert ways == pytest.approx({"hierarchical ring": hierarchical_s, "flat ring": flat_s})
    assert time_s("all_gather", GB, Group(16, stride=4), cluster) == pytest.approx(min(ways.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_move_is_free(kind: CollectiveKind, cluster: Cluster) -> None:
    assert time_s(kind, GB, Group(1), cluster) == 0
    assert time_s(kind, 0, Group(8), cluster) == 0


@pytest.mark.parametrize("group", [Group(8), Group(16, 8), Group(128)], ids=str)
def test_a_large_all_reduce_is_a_reduce_scatter_and_an_all_gather(group: Group, cluster: Cluster) -> None:
    halves_s = time_s("reduce_scatter", 100 * GB, group, cluster) + time_s(
        "all_gather", 100 * GB, group, cluster
    )
    assert time_s("all_reduce", 100 * GB, group, cluster) == pytest.approx(halves_s)


def test_a_small_all_reduce_takes_a_tree(cluster: Cluster) -> None:
    # log2(16) levels up and down, instead of 2 * 15 steps round.
    assert time_s("all_reduce", 8, Group(16, 8), cluster) == pytest.approx(2 * 4 * 10e-6, rel=1e-3)


def test_hierarchy_beats_a_flat_ring_where_latency_counts(cluster: Cluster) -> None:
    group, num_bytes = Group(128), 1e6
    flat_latency_s = 16 * 7 * 1e-6 + 15 * 10e-6
    flat_s = 127 / 128 * num_bytes / (8 * 10e9) + flat_latency_s
    assert time_s("all_gather", num_bytes, group, cluster) < flat_s


def test_hierarchy_beats_one_nic_by_the_number_of_nics(cluster: Cluster) -> None:
    slow = time_s("all_gather", 100 * GB, Group(16, stride=8), cluster)
    fast = time_s("all_gather", 100 * GB, Group(128), cluster)
    assert slow / fast == pytest.approx(8, rel=0.1)


def test_all_to_all_falls_to_the_network_rate_across_nodes(cluster: Cluster) -> None:
    # Half of what a rank holds leaves the node, through its own 10 GB/s: the other half is done long before.
    expected_s = 8 / 16 * GB / 10e9 + 7 * 1e-6 + 8 * 10e-6
    assert time_s("all_to_all", GB, Group(16), cluster) == pytest.approx(expected_s)


def test_a_pipeline_boundary_costs_what_its_worst_neighbours_pay(cluster: Cluster) -> None:
    assert time_s("send_recv", GB, Group(4, stride=2), cluster) == pytest.approx(GB / 100e9 + 1e-6)
    assert time_s("send_recv", GB, Group(4, stride=4), cluster) == pytest.approx(GB / 10e9 + 10e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_more_bytes_or_more_ranks_never_cost_less(
    kind: CollectiveKind, stride: int, cluster: Cluster
) -> None:
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size * stride <= 128]
    payloads = [0.0, 1.0, 1e3, 1e5, 1e7, 1e9]
    table = [[time_s(kind, payload, Group(size, stride), cluster) for payload in payloads] for size in sizes]
    for row in table:
        assert row == sorted(row)
    for column in zip(*table, strict=True):
        assert list(column) == sorted(column)


@pytest.mark.parametrize("kind", KINDS)
def test_no_algorithm_is_listed_that_another_always_beats(kind: CollectiveKind, cluster: Cluster) -> None:
    for first, second in itertools.pairwise(algorithms(kind, Group(64), cluster)):
        assert first.latency_s <= second.latency_s
        assert first.s_per_byte > second.s_per_byte


def test_a_root_scatters_through_its_own_card(cluster: Cluster) -> None:
    # Of 128 parts 120 leave the root's node, through its 10 GB/s, while 7 go to its neighbours.
    expected_s = 120 / 128 * GB / 10e9 + 7 * 1e-6 + 120 * 10e-6
    assert time_s("scatter", GB, Group(128), cluster) == pytest.approx(expected_s)
    assert time_s("gather", GB, Group(128), cluster) == time_s("scatter", GB, Group(128), cluster)


def test_a_library_without_levels_runs_one_ring_through_all_ranks(machine: Callable[..., Cluster]) -> None:
    nodes = machine(
        Level("inside", 8, 100e9, 1e-6, "switch", level_by_level=False),
        Level("across", 128, 10e9, 10e-6, "fat_tree", level_by_level=False),
    )
    steps_s = 16 * 7 * 1e-6 + 15 * 10e-6
    passes_of: dict[CollectiveKind, int] = {"all_gather": 1, "all_reduce": 2}
    for kind, passes in passes_of.items():
        ways = {a.name: a for a in algorithms(kind, Group(128), nodes)}
        assert "hierarchical ring" not in ways
        assert ways["flat ring"].latency_s == pytest.approx(passes * steps_s)
    # Trees branch from node to node and are chains inside.
    tree = next(a for a in algorithms("all_reduce", Group(128), nodes) if a.name == "tree")
    assert tree.latency_s == pytest.approx(2 * (7 * 1e-6 + 4 * 10e-6))
    assert tree.s_per_byte == pytest.approx(2 / 80e9)


def test_a_quick_protocol_serves_small_messages_where_all_levels_have_it(
    machine: Callable[..., Cluster],
) -> None:
    quick = Protocol("quick", start_s=5e-6, step_s=1e-6, bandwidth_share=0.5)
    inside = Level("inside", 8, 100e9, 4e-6, "switch", start_s=10e-6, protocols=(quick,))
    both = machine(inside, Level("across", 16, 10e9, 9e-6, "fat_tree", protocols=(quick,)))
    one = machine(inside, Level("across", 16, 10e9, 9e-6, "fat_tree"))
    assert time_s("all_gather", 1e3, Group(8), both) == pytest.approx(5e-6 + 7e-6 + 7 / 8 * 1e3 / 50e9)
    assert time_s("all_gather", GB, Group(8), both) == pytest.approx(10e-6 + 28e-6 + 7 / 8 * GB / 100e9)
    assert [a.name for a in algorithms("all_gather", Group(2, 8), both)] == ["flat ring, quick", "flat ring"]
    assert [a.name for a in algorithms("all_gather", Group(2, 8), one)] == ["flat ring"]


def test_a_switch_that_reduces_is_passed_once(machine: Callable[..., Cluster]) -> None:
    sharp = InNetworkReduction(all_reduce_bytes_per_s=80e9, start_s=20e-6, min_peers=4)
    switch = machine(Level("switch", 8, 100e9, 1e-6, "switch", reduction=sharp))
    assert time_s("all_reduce", GB, Group(8), switch) == pytest.approx(GB / 80e9 + 20e-6)
    assert time_s("all_reduce", GB, Group(2), switch) == pytest.approx(GB / 100e9 + 2e-6)
    assert time_s("all_reduce", 8, Group(8), switch) == pytest.approx(6e-6, rel=1e-3)  # the tree
    assert time_s("all_gather", GB, Group(8), switch) == pytest.approx(7 / 8 * GB / 100e9 + 7e-6)


def test_a_network_that_reduces_takes_what_nodes_have_scattered(machine: Callable[..., Cluster]) -> None:
    sharp = InNetworkReduction(all_reduce_bytes_per_s=10e9, start_s=30e-6)
    nodes = machine(
        Level("inside", 8, 100e9, 1e-6, "switch"),
        Level("rack", 64, 10e9, 10e-6, "rails", reduction=sharp),
        Level("spine", 256, 10e9, 12e-6, "rails", reduction=sharp),
    )
    inside_s = 2 * (7 / 8 * GB / 100e9 + 7e-6)
    in_network = next(a for a in algorithms("all_reduce", Group(256), nodes) if a.name == "in network")
    assert in_network.time_s(GB) == pytest.approx(inside_s + GB / 8 / 10e9 + 30e-6)
    one_per_node = next(a for a in algorithms("all_reduce", Group(32, 8), nodes) if a.name == "in network")
    assert one_per_node.time_s(GB) == pytest.approx(GB / 10e9 + 30e-6)  # half of the ring


def test_rails_carry_same_index_rings_and_cost_an_all_to_all_the_change_of_rail(
    machine: Callable[..., Cluster],
) -> None:
    def nodes(topology: LevelTopology) -> Cluster:
        inside = Level("inside", 8, 20e9, 1e-6, "switch")
        return machine(inside, Level("across", 64, 10e9, 10e-6, topology))

    rails, plain = nodes("rails"), nodes("fat_tree")
    ring = Group(8, stride=8)
    assert time_s("all_gather", GB, ring, rails) == time_s("all_gather", GB, ring, plain)
    assert time_s("all_to_all", GB, ring, rails) == time_s("all_to_all", GB, ring, plain)
    # Over all 64: 56 parts leave each rank, 7 of 8 of them over the node's own links first, beside the 7
    # parts for its neighbours; and there is one message per node instead of eight.
    inside_bytes = (7 + 56 * 7 / 8) / 64 * GB
    across_bytes = 56 / 64 * GB
    assert time_s("all_to_all", GB, Group(64), rails) == pytest.approx(
        max(inside_bytes / 20e9, across_bytes / 10e9) + 7 * 1e-6 + 7 * 10e-6
    )
    assert time_s("all_to_all", GB, Group(64), plain) == pytest.approx(
        across_bytes / 10e9 + 7 * 1e-6 + 56 * 10e-6
    )


def test_oversubscription_counts_only_where_a_group_crosses_it(machine: Callable[..., Cluster]) -> None:
    pods = machine(
        Level("node", 8, 100e9, 1e-6, "switch"),
        Level("pod", 64, 10e9, 10e-6, "fat_tree"),
        Level("spine", 256, 10e9 / 7, 10e-6, "fat_tree"),
    )
    inside, across = Group(8, stride=8), Group(4, stride=64)
    assert time_s("all_gather", GB, inside, pods) == pytest.approx(7 / 8 * GB / 10e9 + 70e-6)
    assert time_s("all_gather", GB, across, pods) == pytest.approx(3 / 4 * GB * 7 / 10e9 + 30e-6)


def test_all_groups_of_an_axis_share_the_network_of_a_node(machine: Callable[..., Cluster]) -> None:
    """Eight ranks and four network cards of 20 GB/s a node: 10 GB/s for each when all communicate."""
    nodes = machine(
        Level("inside", 8, 100e9, 0.0, "switch"),
        Level("across", 64, 10e9, 0.0, "fat_tree", alone_bytes_per_s=20e9),
    )
    data_parallel, stages = Group(8, stride=8), Group(4, stride=16)
    assert time_s("all_gather", GB, data_parallel, nodes) == pytest.approx(7 / 8 * GB / 10e9)
    assert time_s("send_recv", GB, stages, nodes) == pytest.approx(GB / 10e9)

    def alone_s(kind: CollectiveKind, group: Group) -> float:
        return collective_time_s(Collective(kind, GB, group, alone=True), nodes)

    # One rank per node has a card to itself, and no more than that; eight have four cards, as before.
    assert alone_s("all_gather", data_parallel) == pytest.approx(7 / 8 * GB / 20e9)
    assert alone_s("send_recv", stages) == pytest.approx(GB / 20e9)
    assert alone_s("all_gather", Group(64)) == pytest.approx(time_s("all_gather", GB, Group(64), nodes))
    # Two groups of four per node, or one: each of the four has a card.
    four = Group(32, stride=2)
    assert time_s("all_gather", GB, four, nodes) == pytest.approx(31 / 32 * GB / 40e9)
    assert alone_s("all_gather", four) == pytest.approx(31 / 32 * GB / 80e9)


def test_a_bridge_joins_four_cards_and_the_rest_is_the_hosts_tree() -> None:
    """MLU370-X8: two bridges of four cards, two devices each, and a link between the sockets."""
    server = hardware_db.cluster("mlu370-x8-server")
    bridged, all_cards = Group(8), Group(16)
    assert time_s("all_gather", GB, bridged, server) == pytest.approx(7 / 8 * GB / 37.5e9, rel=0.01)
    assert time_s("all_gather", GB, all_cards, server) == pytest.approx(15 / 16 * GB / 22e9, rel=0.01)
    # Pairs over the sockets share their link: eight at once get an eighth each, one alone all of it.
    pair = Collective("send_recv", GB, Group(2, stride=8))
    assert collective_time_s(pair, server) == pytest.approx(8 * GB / 22e9, rel=0.01)
    assert collective_time_s(replace(pair, alone=True), server) == pytest.approx(GB / 22e9, rel=0.01)


def test_pcie_pairs_under_one_switch_are_faster_than_pairs_over_the_root_and_the_sockets() -> None:
    host = hardware_db.cluster("pcie-8xl40s")
    times = [time_s("all_reduce", GB, Group(2, stride), host) for stride in (1, 2, 4)]
    assert times == sorted(times)
    assert times[1] / times[0] == pytest.approx(2, rel=0.01)  # two cards share their switch's uplink
    assert time_s("all_reduce", GB, Group(8), host) == pytest.approx(2 * 7 / 8 * GB / 22e9, rel=0.02)


def test_an_open_torus_takes_twice_as_long(machine: Callable[..., Cluster]) -> None:
    closed = machine(Level("x", 8, 90e9, 0.0, "torus"))
    half_of_it = time_s("all_gather", 7 / 8 * GB, Group(4), closed) / (3 / 4 * 7 / 8)
    assert half_of_it == pytest.approx(2 * time_s("all_gather", GB, Group(8), closed) / (7 / 8))


def test_a_torus_gathers_over_all_axes_at_once(machine: Callable[..., Cluster]) -> None:
    # "How to Scale Your Model": S / (d * 2 * b) for d axes of two links of b; here b = 45 GB/s, d = 3.
    torus = machine(*(Level(axis, 4 ** (i + 1), 90e9, 1e-6, "torus") for i, axis in enumerate("xyz")))
    expected_s = 63 / 64 * GB / (3 * 2 * 45e9) + (4 + 4 + 4) / 2 * 1e-6
    assert time_s("all_gather", GB, Group(64), torus) == pytest.approx(expected_s)


def test_all_to_all_on_a_ring_is_a_quarter_of_the_gather_of_the_full_array(
    machine: Callable[..., Cluster],
) -> None:
    # "How to Scale Your Model", sharding: n ranks that hold S each exchange in a quarter of the time of an
    # all_gather of n * S.
    ring = machine(Level("x", 16, 90e9, 0.0, "torus"))
    quarter_s = time_s("all_gather", 16 * GB, Group(16), ring) / 4
    assert time_s("all_to_all", GB, Group(16), ring) == pytest.approx(quarter_s)


def test_four_nodes_of_b200_reduce_4_gib_in_about_the_measured_time(machine: Callable[..., Cluster]) -> None:
    """22.05 ms on 4 nodes x 8 B200, EFA 400 Gbit/s per GPU ("Machine Learning Engineering", network)."""
    b200 = machine(
        Level("nvswitch", 8, 682e9, 3.4e-6, "switch"),  # ring bus bandwidth measured inside a node
        Level("efa", 32, 50e9, 14e-6, "fat_tree"),  # line rate
    )
    assert time_s("all_reduce", 4 * 2**30, Group(32), b200) == pytest.approx(22.05e-3, rel=0.1)
