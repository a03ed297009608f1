from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from costmodel import CostModelError, Group, spans
from hardware_db import Cluster, Level


def shape(group: Group, cluster: Cluster) -> list[tuple[str, int, int]]:
    return [("+".join(s.level_names), s.num_peers, s.num_inside) for s in spans(group, cluster)]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group(1), []),
        (Group(8), [("inside", 8, 1)]),
        (Group(4, stride=2), [("inside", 4, 1)]),
        (Group(16, stride=8), [("across", 16, 1)]),
        (Group(16, stride=4), [("inside", 2, 1), ("across", 8, 2)]),
        (Group(128), [("inside", 8, 1), ("across", 16, 8)]),
        (Group(2, stride=64), [("across", 2, 1)]),
    ],
)
def test_a_group_is_a_tree_of_levels(
    group: Group, expected: list[tuple[str, int, int]], cluster: Cluster
) -> None:
    assert shape(group, cluster) == expected


@pytest.mark.parametrize("size", [3, 6, 12, 24])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_size_that_does_not_nest_still_reaches_everyone(size: int, stride: int, cluster: Cluster) -> None:
    assert math.prod(s.num_peers for s in spans(Group(size, stride), cluster)) == size


def test_of_12_ranks_the_units_that_nodes_of_8_hold_whole_are_4(cluster: Cluster) -> None:
    assert shape(Group(12), cluster) == [("inside", 4, 1), ("across", 3, 4)]


def test_a_group_that_does_not_fit_says_how_many_devices_it_needs(cluster: Cluster) -> None:
    with pytest.raises(CostModelError, match=r"reaches over 225 devices.*has 128"):
        spans(Group(8, stride=32), cluster)


def test_a_full_mesh_gives_a_pair_one_link(machine: Callable[..., Cluster]) -> None:
    mesh = machine(Level("links", 8, 70e9, 1e-6, "mesh"))
    (pair,), (whole,) = spans(Group(2), mesh), spans(Group(8), mesh)
    assert pair.bandwidth_bytes_per_s == pytest.approx(10e9)
    assert whole.bandwidth_bytes_per_s == pytest.approx(70e9)
    assert whole.pair_bandwidth_bytes_per_s == pytest.approx(10e9)


def test_interleaved_groups_share_a_ring(machine: Callable[..., Cluster]) -> None:
    ring = machine(Level("ring", 8, 100e9, 1e-6, "ring"))
    assert spans(Group(4, stride=2), ring)[0].bandwidth_bytes_per_s == pytest.approx(50e9)
    assert spans(Group(4), ring)[0].bandwidth_bytes_per_s == pytest.approx(100e9)


@pytest.fixture
def torus(machine: Callable[..., Cluster]) -> Cluster:
    return machine(Level("x", 4, 90e9, 1e-6, "torus"), Level("y", 16, 90e9, 1e-6, "torus"))


def test_filled_torus_axes_work_at_once(torus: Cluster) -> None:
    (both,) = spans(Group(16), torus)
    assert both.level_names == ("x", "y")
    assert both.bandwidth_bytes_per_s == pytest.approx(180e9)
    assert both.num_steps == 4  # half way round each axis: sum(dims) / 2


def test_an_open_torus_axis_has_half_its_bandwidth(torus: Cluster) -> None:
    line, ring = spans(Group(2), torus)[0], spans(Group(4), torus)[0]
    assert line.bandwidth_bytes_per_s == pytest.approx(ring.bandwidth_bytes_per_s / 2)


def test_an_interleaved_group_that_goes_all_around_a_ring_shares_it(machine: Callable[..., Cluster]) -> None:
    ring = machine(Level("x", 8, 90e9, 1e-6, "torus"))
    (every_second,), (half,) = spans(Group(4, stride=2), ring), spans(Group(4), ring)
    assert every_second.bandwidth_bytes_per_s == pytest.approx(45e9)  # all around; two groups share the links
    assert every_second.num_steps == 4  # hops: half way round
    assert half.bandwidth_bytes_per_s == pytest.approx(45e9)  # there and back on one link
    (alone,) = spans(Group(4, stride=2), ring, alone=True)
    assert alone.bandwidth_bytes_per_s == pytest.approx(90e9)


def test_a_line_gives_any_neighbours_its_single_link(machine: Callable[..., Cluster]) -> None:
    line = machine(Level("x", 8, 45e9, 1e-6, "line"), Level("y", 64, 45e9, 1e-6, "line"))
    for size in (2, 4, 8):
        (span,) = spans(Group(size), line)
        assert span.bandwidth_bytes_per_s == span.pair_bandwidth_bytes_per_s == pytest.approx(45e9)
        assert span.num_steps == size - 1
    (both,) = spans(Group(64), line)
    assert both.bandwidth_bytes_per_s == pytest.approx(90e9)
    (apart,) = spans(Group(4, stride=2), line)
    assert apart.bandwidth_bytes_per_s == pytest.approx(22.5e9)


def test_a_group_in_runs_is_on_the_levels_of_all_its_parts(cluster: Cluster) -> None:
    """Ranks 0 to 3 and the same on every second node: other axes lie between."""
    group = Group.of((4, 1), (8, 16))
    assert (group.size, group.stride, group.outer, group.reach) == (32, 1, ((8, 16),), 116)
    assert shape(group, cluster) == [("inside", 4, 1), ("across", 8, 4)]
    assert Group.of((8, 8), (1, 3), (4, 2)) == Group(32, 2)  # axes that nest are one
    assert Group.of((1, 4)) == Group(1)


def test_a_dragonfly_reaches_half_of_its_global_links_wherever_traffic_goes(
    machine: Callable[..., Cluster],
) -> None:
    dragonfly = machine(
        Level("group", 16, 10e9, 1e-6, "switch"), Level("global", 128, 8e9, 2e-6, "dragonfly")
    )
    everyone, two, six = Group(8, stride=16), Group(2, stride=16), Group(6, stride=16)
    rates = [spans(group, dragonfly)[0].bandwidth_bytes_per_s for group in (everyone, two, six)]
    assert rates == pytest.approx([8e9, 4e9, 8e9 * 5 / 7])
    assert spans(everyone, dragonfly)[0].pair_bandwidth_bytes_per_s == pytest.approx(4e9)


def test_a_group_alone_has_what_its_node_has_up_to_what_devices_drive(
    machine: Callable[..., Cluster],
) -> None:
    nodes = machine(
        Level("inside", 8, 100e9, 1e-6, "switch"),
        Level("across", 64, 5e9, 1e-6, "fat_tree", alone_bytes_per_s=20e9),
    )
    for stride, per_member in ((8, 20e9), (4, 20e9), (2, 10e9), (1, 5e9)):
        group = Group(64 // stride, stride)
        (*_, shared), (*_, alone) = spans(group, nodes), spans(group, nodes, alone=True)
        assert shared.bandwidth_bytes_per_s == 5e9
        assert alone.bandwidth_bytes_per_s == pytest.approx(per_member)
