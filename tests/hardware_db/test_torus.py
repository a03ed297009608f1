"""Slice shapes against the published ones and against a search by brute force."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest

from hardware_db.torus import slice_shape


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
