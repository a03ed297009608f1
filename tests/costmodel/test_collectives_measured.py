"""Collectives on machines of the database, against what was measured on such machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hardware_db
from costmodel import Collective, CollectiveKind, Group, algorithms, collective_time_s
from hardware_db import Cluster, catalog
from hardware_db.schema import CollectiveTable
from hardware_db.transport import bus_factor

GiB, MiB = 2**30, 2**20

# SimAI, astra-sim-alibabacloud/inputs/ratio: share of the bus bandwidth that rings over 8-GPU nodes with 8 x
# 400 Gbit/s reach, by nodes, for payloads in MiB.
NODES = (2, 4, 8, 16, 32, 64, 128)
RING_RATIOS = {
    16: (0.32, 0.24, 0.13, 0.05, 0.044, 0.021, 0.0087),
    64: (0.5, 0.53, 0.39, 0.21, 0.106, 0.051, 0.04405),
    256: (0.85, 0.77, 0.69, 0.57, 0.387, 0.209, 0.1027),
    1024: (0.92, 0.93, 0.9, 0.76, 0.74, 0.563, 0.314575),
    4096: (0.95, 0.95, 0.95, 0.95, 0.923, 0.755, 0.740175),
    16384: (0.96, 0.96, 0.96, 0.96, 0.957, 0.958, 0.919175),
}
ALL_TO_ALL_RATIOS = {
    16: (0.52, 0.67, 0.64, 0.62),
    64: (0.72, 0.83, 0.82, 0.66),
    256: (0.79, 0.92, 0.87, 0.75),
    1024: (0.81, 0.94, 0.92, 0.85),
    4096: (0.8, 0.95, 0.94, 0.89),
    16384: (0.8, 0.95, 0.94, 0.9),
}


def bus_bytes_per_s(kind: CollectiveKind, num_bytes: float, group: Group, cluster: Cluster) -> float:
    seconds = collective_time_s(Collective(kind, num_bytes, group), cluster)
    return bus_factor(kind, group.size) * num_bytes / seconds


def by_lines_alone(cluster: Cluster) -> Cluster:
    return replace(cluster, levels=tuple(replace(level, measured=()) for level in cluster.levels))


def placed(table: CollectiveTable) -> tuple[Cluster, Group]:
    node = {"a100x8-all-reduce": "dgx-a100", "h200x8-all-reduce": "dgx-h200", "b200x8-all-reduce": "dgx-b200"}
    size = 1
    for peers in table.shape:
        size *= peers
    return hardware_db.cluster(node.get(table.id) or f"{table.nodes[0]}*{table.shape[-1]}"), Group(size)


@pytest.mark.parametrize("table", catalog.collective_facts().tables, ids=lambda table: table.id)
def test_tables_are_reproduced_from_1_mib(table: CollectiveTable) -> None:
    cluster, group = placed(table)
    for num_bytes, measured in table.rows:
        if num_bytes >= MiB:
            assert bus_bytes_per_s("all_reduce", num_bytes, group, cluster) == pytest.approx(
                measured, rel=0.1
            )


def test_the_lines_alone_are_near_where_they_were_not_fitted() -> None:
    """NCCL's constants and one start of the in-switch reduction, against 8 H200."""
    (table,) = (t for t in catalog.collective_facts().tables if t.id == "h200x8-all-reduce")
    cluster, group = placed(table)
    for num_bytes, measured in table.rows:
        if num_bytes >= MiB:
            predicted = bus_bytes_per_s("all_reduce", num_bytes, group, by_lines_alone(cluster))
            assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("spec", "kind", "size", "num_bytes", "measured"),
    [
        # "Machine Learning Engineering", network.
        ("dgx-a100", "all_reduce", 8, 16 * GiB, 235e9),
        ("dgx-h100", "all_reduce", 8, 16 * GiB, 480e9),
        ("dgx-h200", "all_gather", 8, 16 * GiB, 361e9),
        ("dgx-h200", "reduce_scatter", 8, 16 * GiB, 363e9),
        ("dgx-h200", "all_reduce", 4, 8 * GiB, 363e9),
        ("dgx-h200", "all_reduce", 5, 8 * GiB, 414e9),
        ("dgx-h200", "all_reduce", 7, 8 * GiB, 460e9),
        ("dgx-b200", "all_reduce", 8, 16 * GiB, 846e9),
        ("dgx-b200", "all_reduce", 4, 8 * GiB, 673e9),
        ("dgx-b200", "all_reduce", 6, 8 * GiB, 778e9),
        ("gb200-nvl72", "all_reduce", 72, 64 * GiB, 850e9),
        ("dgx-h200*4", "all_reduce", 32, 4 * GiB, 365e9),
        ("mi300x-platform", "all_reduce", 8, 4 * GiB, 313e9),
        ("mi300x-platform", "all_reduce", 2, 4 * GiB, 47.7e9),
        # SimAI's constant for H800.
        ("hgx-h800", "all_reduce", 8, 16 * GiB, 215e9),
    ],
)
def test_plateaus(spec: str, kind: CollectiveKind, size: int, num_bytes: float, measured: float) -> None:
    cluster = hardware_db.cluster(spec)
    assert bus_bytes_per_s(kind, num_bytes, Group(size), cluster) == pytest.approx(measured, rel=0.08)


def test_nvl72_by_ring() -> None:
    """680 GB/s on 72 GB200 ("Machine Learning Engineering", network)."""
    assert bus_bytes_per_s(
        "all_gather", 64 * GiB, Group(72), hardware_db.cluster("gb200-nvl72")
    ) == pytest.approx(680e9, rel=0.02)


@pytest.mark.parametrize("spec", ["dgx-1v", "dgx-2", "dgx-a100", "hgx-a800", "mi300x-platform"])
def test_no_reduction_in_switches_that_have_none(spec: str) -> None:
    assert hardware_db.cluster(spec).levels[0].reduction is None


def test_switches_reduce_only_all_reduce_and_only_from_as_many_peers_as_the_library_asks() -> None:
    cluster = by_lines_alone(hardware_db.cluster("dgx-h100"))
    names = {
        (kind, size): {a.name for a in algorithms(kind, Group(size), cluster)}
        for kind in ("all_reduce", "all_gather", "reduce_scatter")
        for size in (4, 5, 8)
    }
    assert {key for key, found in names.items() if "in network" in found} == {
        ("all_reduce", 5),
        ("all_reduce", 8),
    }


@pytest.mark.parametrize("num_mib", RING_RATIOS)
def test_flat_rings_over_nodes_follow_simai(num_mib: int) -> None:
    """From bandwidth-bound on 2 nodes to bound by 1,023 steps on 128."""
    for num_nodes, ratio in zip(NODES, RING_RATIOS[num_mib], strict=True):
        cluster = hardware_db.cluster(f"dgx-h100*{num_nodes}")
        no_quick = replace(
            cluster, levels=tuple(replace(level, protocols=(), measured=()) for level in cluster.levels)
        )
        reached = bus_bytes_per_s("all_gather", num_mib * MiB, Group(8 * num_nodes), no_quick)
        assert reached == pytest.approx(ratio * 400e9, rel=0.35)


@pytest.mark.parametrize("num_mib", ALL_TO_ALL_RATIOS)
def test_all_to_all_over_nodes_follows_simai(num_mib: int) -> None:
    for num_nodes, ratio in zip((2, 4, 8, 16), ALL_TO_ALL_RATIOS[num_mib], strict=True):
        size = 8 * num_nodes
        seconds = collective_time_s(
            Collective("all_to_all", num_mib * MiB, Group(size)), hardware_db.cluster(f"dgx-h100*{num_nodes}")
        )
        leaving = (size - 8) / size * num_mib * MiB
        assert leaving / seconds == pytest.approx(ratio * 50e9, rel=0.55 if num_mib == 16 else 0.25)


def test_smaller_groups_and_halves_take_the_error_of_the_lines_that_a_table_shows() -> None:
    cluster = hardware_db.cluster("dgx-a100")
    whole, lines = Group(8), by_lines_alone(cluster)

    def error(kind: CollectiveKind, group: Group) -> float:
        collective = Collective(kind, 32 * MiB, group)
        return collective_time_s(collective, cluster) / collective_time_s(collective, lines)

    assert error("all_reduce", whole) > 1.3
    assert error("all_reduce", Group(4)) == pytest.approx(error("all_reduce", whole))
    assert error("all_gather", whole) == pytest.approx(error("all_reduce", whole))
    assert error("all_to_all", whole) == 1


def test_two_nodes_of_eight_a100_with_100_gbit_cards() -> None:
    """Alpa on CoreWeave: 97.6 GB/s of all_reduce, 12.5 GB/s of one pair, 91.5 GB/s of eight."""
    cluster = hardware_db.parse_cluster(
        {"node": "dgx-a100", "count": 2, "scale_out_bytes_per_s_per_device": 12.5e9}
    )
    assert bus_bytes_per_s("all_reduce", 2e9, Group(16), cluster) == pytest.approx(97.6e9, rel=0.1)
    pair = Collective("send_recv", 2e9, Group(2, stride=8))
    assert 2e9 / collective_time_s(replace(pair, alone=True), cluster) == pytest.approx(12.5e9, rel=0.1)
    assert 8 * 2e9 / collective_time_s(pair, cluster) == pytest.approx(91.5e9, rel=0.1)
