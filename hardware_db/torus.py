"""The shapes of a torus slice: how many chips lie along each axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import prod

Sides = tuple[int, ...]


def cube_shapes(num_chips: int, cube: Sides, below_cube: Sequence[Sides]) -> tuple[Sides, ...]:
    """The boxes, sides ascending, in which `num_chips` chips of a reconfigurable torus can be had, the most
    compact first: one of `below_cube`, or whole cubes side by side. None for a number that cannot be had."""
    small = [tuple(sorted(shape)) for shape in below_cube if prod(shape) == num_chips]
    num_cubes, rest = divmod(num_chips, prod(cube))
    whole = () if rest or not num_cubes else _factorisations(num_cubes, len(cube))
    large = [tuple(sorted(side * count for side, count in zip(cube, box, strict=True))) for box in whole]
    return tuple(sorted({*small, *large}, key=lambda shape: (max(shape), -min(shape))))


def numberings(shape: Sides) -> tuple[Sides, ...]:
    """Every order of the sides, ascending ones first: chips are numbered along the first side first."""
    return tuple(sorted(set(permutations(shape))))


def slice_shape(num_chips: int, num_axes: int, wrap_multiple: int) -> Sides:
    """Side lengths, ascending, of the most compact box of `num_chips` chips.

    Compact means the shortest longest side; among those, the most sides that close to a ring (a multiple of
    `wrap_multiple`), then the longest shortest side. 64 chips of a TPU v4 are (4, 4, 4), 256 of a v5e (16,
    16).
    """

    def cost(shape: Sides) -> tuple[int, int, int]:
        open_axes = sum(side % wrap_multiple != 0 for side in shape)
        return (max(shape), open_axes, -min(shape))

    return min(_factorisations(num_chips, num_axes), key=cost)


def _factorisations(number: int, count: int, smallest: int = 1) -> Iterator[Sides]:
    """Ascending tuples of `count` factors, each at least `smallest`, whose product is `number`."""
    if count == 1:
        if number >= smallest:
            yield (number,)
        return
    factor = smallest
    while factor**count <= number:
        if number % factor == 0:
            for rest in _factorisations(number // factor, count - 1, factor):
                yield (factor, *rest)
        factor += 1
