from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import pytest

from costmodel import Collective, CollectiveKind, Group, algorithms, collective_time_s
from hardware_db import Cluster, Level

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
