"""Slices of tori against the published shapes and against a search by brute force."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest

import hardware_db
from hardware_db import Cluster, HardwareError, slice_shapes
from hardware_db.torus import cube_shapes, numberings, slice_shape

CUBE, BELOW = (4, 4, 4), [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]


@pytest.mark.parametrize(
    ("num_chips", "num_axes", "wrap_multiple", "shape"),
    [
        (64, 3, 4, (4, 4, 4)),  # one TPU v4 cube
        (128, 3, 4, (4, 4, 8)),  # two cubes, not the equally compact (2, 8, 8)
        (512, 3, 4, (8, 8, 8)),
        (4096, 3, 4, (16, 16, 16)),  # a TPU v4 pod
        (8960, 3, 4, (16, 20, 28)),  # a TPU v5p pod
        (64, 2, 16, (8, 8)),
        (256, 2, 16, (16, 16)),  # a TPU v5e pod
        (1, 3, 4, (1, 1, 1)),
        (7, 2, 16, (1, 7)),
    ],
)
def test_shapes(num_chips: int, num_axes: int, wrap_multiple: int, shape: tuple[int, ...]) -> None:
    assert slice_shape(num_chips, num_axes, wrap_multiple) == shape


@pytest.mark.parametrize("num_chips", [6, 24, 36, 48, 60])
def test_no_box_of_the_same_size_is_more_compact(num_chips: int) -> None:
    sides = range(1, num_chips + 1)
    boxes = [box for box in product(sides, repeat=3) if prod(box) == num_chips]
    assert max(slice_shape(num_chips, 3, 4)) == min(max(box) for box in boxes)


def sides(cluster: Cluster) -> tuple[int, ...]:
    sizes = [1, *(level.num_devices for level in cluster.levels)]
    return tuple(outer // inner for inner, outer in pairwise(sizes))


@pytest.mark.parametrize("num_chips", [4, 32, 64, 256, 512, 1536, 4096])
def test_shapes_of_cubes_are_all_boxes_of_multiples_of_4_and_those_below(num_chips: int) -> None:
    """The rule of the pods' documentation; shapes differ by more than the order of their sides."""
    large = [box for box in product(range(4, 257, 4), repeat=3) if prod(box) == num_chips]
    small = [box for box in BELOW if prod(box) == num_chips]
    expected = {tuple(sorted(box)) for box in (*large, *small)}
    found = cube_shapes(num_chips, CUBE, BELOW)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [max(shape) for shape in found] == sorted(max(shape) for shape in found)


def test_a_shape_can_be_numbered_in_every_order_of_its_sides() -> None:
    assert numberings((4, 4, 8)) == ((4, 4, 8), (4, 8, 4), (8, 4, 4))
    assert len(numberings((4, 8, 16))) == 6


def test_chips_of_a_reconfigurable_pod_come_in_several_shapes() -> None:
    chips = hardware_db.cluster("tpu-v4*512")
    shapes = slice_shapes(chips)
    assert [shape.id for shape in shapes] == ["tpu-v4-8x8x8", "tpu-v4-4x8x16", "tpu-v4-4x4x32"]
    assert [sides(shape) for shape in shapes] == [(8, 8, 8), (4, 8, 16), (4, 4, 32)]
    assert {shape.num_devices for shape in shapes} == {512}
    assert shapes[0].levels == chips.levels  # the most compact one is the default
    numbered = slice_shapes(chips, every_numbering=True)
    assert len(numbered) == len({shape.levels for shape in numbered}) == 1 + 6 + 3


@pytest.mark.parametrize("spec", ["tpu-v4*512", "tpu-v5p*128", "tpu-v7*256", "tpu-v5e*128", "tpu-v4*32"])
def test_a_shape_is_known_by_its_name(spec: str) -> None:
    for shape in slice_shapes(hardware_db.cluster(spec), every_numbering=True):
        named = hardware_db.cluster(shape.id)
        assert (named.id, named.levels, named.device) == (shape.id, shape.levels, shape.device)
        assert slice_shapes(named) == (named,)


def test_what_is_no_torus_or_was_given_has_one_shape() -> None:
    for spec in ("dgx-h100*4", "tpu-v4-pod", "tpu-v4-4x8x16", "aws-trn2"):
        only = hardware_db.cluster(spec)
        assert slice_shapes(only, every_numbering=True) == (only,)


def test_slices_are_joined_by_the_network_of_the_data_centre() -> None:
    two = hardware_db.cluster("tpu-v4-4x4x8*2")
    assert [(level.name, level.num_devices) for level in two.levels] == [
        ("ici x", 4), ("ici y", 16), ("ici z", 128), ("network", 256)
    ]  # fmt: skip
    assert (two.id, two.num_nodes) == ("tpu-v4-4x4x8*2", 64)


def test_an_axis_that_does_not_close_is_a_line_of_single_links() -> None:
    pod, part = hardware_db.cluster("tpu-v5e-16x16"), hardware_db.cluster("tpu-v5e-8x16")
    assert [(level.topology, level.line_rate_bytes_per_s) for level in pod.levels] == [("torus", 90e9)] * 2
    assert [(level.topology, level.line_rate_bytes_per_s) for level in part.levels] == [
        ("line", 45e9), ("torus", 90e9)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tpu-v4*100", "100 chips of tpu-v4 are no slice: .* use 64 or 128"),
        ("tpu-v4*24", "24 chips .* use 16 or 32"),
        ("tpu-v4-2x4x8", "no slice of tpu-v4 is 2x4x8; 64 chips come as tpu-v4-4x4x4"),
        ("tpu-v4-8x8", "no slice of tpu-v4 is 8x8"),
        ("tpu-v5e-4x4x4", "torus has 2 axes and at most 256 chips, got 3 axes and 64 chips"),
        ("tpu-v5e-16x32", "at most 256 chips, got 2 axes and 512 chips"),
        ("tpu-v5e*12", "12 chips of tpu-v5e do not fill hosts of 8"),
        ("tpu-v4", r"say how many chips, 'tpu-v4\*64', or which slice, 'tpu-v4-4x4x4'"),
    ],
)
def test_errors_name_what_can_be_had(spec: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        hardware_db.cluster(spec)
