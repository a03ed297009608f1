"""Slices of a torus: in which shapes so many chips can be had, and the levels of each.

The chips of a reconfigurable pod (TPU v4, v5p, v7) sit in cubes whose faces meet on optical switches, so
whole cubes can be joined to any box of cubes (arXiv:2304.01433); below a cube a few shapes are offered. An
axis that closes is a ring with both ways round, two links for each chip; one that does not is a line, with
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from math import prod
from operator import mul

from hardware_db.errors import HardwareError
from hardware_db.level import level_of
from hardware_db.machine import Cluster, Level
from hardware_db.schema import Accelerator, Node
from hardware_db.torus import Sides, cube_shapes, slice_shape

__all__ = ["check_slice", "shapes_of", "slice_name", "slice_shapes", "torus_levels"]


def slice_shapes(cluster: Cluster, *, every_numbering: bool = False) -> tuple[Cluster, ...]:
    """The machine in each shape in which its chips can be had, the most compact one first; the machine alone
    where its links cannot be switched or its shape was given.

    Chips are numbered along the first side of a shape first, so which mesh axes have rings of their own
    depends on the order of the sides too: with `every_numbering` each order is a cluster of its own.
    """
    chosen = [each for each in cluster.slices if every_numbering or each.sides == tuple(sorted(each.sides))]
    if not chosen:
        return (cluster,)
    return tuple(
        replace(
            cluster,
            id=each.id,
            name=f"{cluster.name}, {'x'.join(map(str, each.sides))}",
            levels=each.levels,
            slices=(),
        )
        for each in chosen
    )


def slice_name(card: Accelerator, sides: Sides, num_slices: int) -> str:
    """What `hardware_db.cluster` knows this slice as: `tpu-v4-4x8x16`, or `tpu-v4-4x8x16*2`."""
    name = f"{card.id}-{'x'.join(map(str, sides))}"
    return name if num_slices == 1 else f"{name}*{num_slices}"


def shapes_of(node: Node, card: Accelerator, num_chips: int) -> tuple[Sides, ...]:
    """The shapes of a torus of `num_chips`, sides ascending and above 1, the most compact one first.

    Raises HardwareError for a number of chips that is no slice.
    """
    slices = card.scale_up.slices
    if slices is None:
        return (_proper(slice_shape(num_chips, _num_axes(node, card), _wrap_multiple(card))),)
    cube, below_cube = slices.cube.value, [shape.value for shape in slices.below_cube]
    found = cube_shapes(num_chips, cube, below_cube)
    if not found:
        smaller = ", ".join(str(prod(shape)) for shape in below_cube)
        raise HardwareError(
            f"{num_chips} chips of {card.id} are no slice: it comes in {smaller} chips, and in whole cubes "
            f"of {prod(cube)}; use {_nearest(num_chips, cube, below_cube)}"
        )
    return tuple(_proper(shape) for shape in found)


def check_slice(node: Node, card: Accelerator, sides: Sides) -> None:
    """Raises HardwareError, with the shapes of as many chips, where no slice has these sides in any order."""
    if card.scale_up.slices is not None:
        shapes = shapes_of(node, card, prod(sides))
        if _proper(tuple(sorted(sides))) not in shapes:
            raise HardwareError(
                f"no slice of {card.id} is {'x'.join(map(str, sides))}; {prod(sides)} chips come as "
                f"{', '.join(slice_name(card, shape, 1) for shape in shapes)}"
            )
    whole = int(node.scale_up.domain_cards.require(f"{node.id}: scale_up.domain_cards"))
    if len(_proper(sides)) > _num_axes(node, card) or prod(sides) > whole:
        raise HardwareError(
            f"no slice of {card.id} is {'x'.join(map(str, sides))}: its torus has {_num_axes(node, card)} "
            f"axes and at most {whole} chips, got {len(sides)} axes and {prod(sides)} chips"
        )


def torus_levels(node: Node, card: Accelerator, sides: Sides) -> Iterator[Level]:
    """One level for each axis; its devices are the cards' logical ones."""
    parts, sides = card.logical_devices_per_card, _proper(sides)
    link_bytes_per_s = card.scale_up.link_bytes_per_s.require(f"{card.id}: scale_up.link_bytes_per_s")
    closed = _closed_axes(card, sides, _num_axes(node, card))
    name = node.scale_up.name or card.scale_up.name or "scale-up"
    for axis, side, size in zip("xyzw", sides, accumulate(sides, mul), strict=False):
        yield level_of(
            f"{name} {axis}",
            card.scale_up.link or "network",
            size * parts,
            link_bytes_per_s * (2 if side in closed else 1) / parts,
            "torus" if side in closed else "line",
            efficiency=card.scale_up.efficiency.value,
        )


def _proper(sides: Sides) -> Sides:
    """The sides that are axes: those above 1, or a single 1."""
    return tuple(side for side in sides if side > 1) or (1,)


def _num_axes(node: Node, card: Accelerator) -> int:
    return node.scale_up.torus_axes or card.scale_up.torus_axes or 2


def _closed_axes(card: Accelerator, sides: Sides, num_axes: int) -> frozenset[int]:
    """The side lengths whose axis closes to a ring."""
    closed = frozenset(side for side in sides if side % _wrap_multiple(card) == 0)
    is_whole = len(sides) == num_axes and closed == frozenset(sides)
    return closed if is_whole or not card.scale_up.torus_wraps_whole_cubes_only else frozenset()


def _wrap_multiple(card: Accelerator) -> int:
    return int(card.scale_up.torus_wrap_multiple.require(f"{card.id}: scale_up.torus_wrap_multiple"))


def _nearest(num_chips: int, cube: Sides, below_cube: list[Sides]) -> str:
    """The next smaller and the next larger slice."""
    whole = num_chips // prod(cube) * prod(cube)
    sizes = sorted({*(prod(shape) for shape in below_cube), whole, whole + prod(cube)} - {0})
    below = [size for size in sizes if size < num_chips][-1:]
    return " or ".join(map(str, below + [size for size in sizes if size > num_chips][:1]))
