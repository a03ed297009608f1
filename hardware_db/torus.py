"""The shape of a torus slice: how many chips lie along each axis."""

from __future__ import annotations

from collections.abc import Iterator


def slice_shape(num_chips: int, num_axes: int, wrap_multiple: int) -> tuple[int, ...]:
    """Side lengths, ascending, of the most compact box of `num_chips` chips.

    Compact means the shortest longest side; among those, the most sides that close to a ring (a multiple of
    `wrap_multiple`), then the longest shortest side. 64 chips of a TPU v4 are (4, 4, 4), 256 of a v5e (16,
    16).
    """

    def cost(shape: tuple[int, ...]) -> tuple[int, int, int]:
        open_axes = sum(side % wrap_multiple != 0 for side in shape)
        return (max(shape), open_axes, -min(shape))

    return min(_factorisations(num_chips, num_axes), key=cost)


def _factorisations(number: int, count: int, smallest: int = 1) -> Iterator[tuple[int, ...]]:
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
