"""Which part of each tensor of the original model a rank holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from autopar.runtime.dealing import Sections, section_sizes
from autopar.runtime.tensors import local_part


@dataclass(frozen=True)
class Split:
    """A parameter is split along `dim`; with `sections`, every one of these parts of the dimension is."""

    dim: int
    sections: Sections = None


Placements = Mapping[str, Mapping[str, Split]]
"""Pattern of parameter names -> mesh axis -> how it is split there. What no pattern matches is replicated."""


def matches(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern` with a number for every `*`."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def placements_of(name: str, placements: Placements) -> Mapping[str, Split]:
    """How the parameter `name` is split."""
    return next((split for pattern, split in placements.items() if matches(name, pattern)), {})


Interval = tuple[int, int]
"""From the first up to the second, which is not in it."""


@dataclass(frozen=True)
class Layout:
    """Which rectangles of a tensor of the original model, of the shape `shape`, this rank holds.

    For each dimension the intervals that it holds, in the order in which they lie in its own memory.
    """

    shape: tuple[int, ...]
    intervals: tuple[tuple[Interval, ...], ...]

    @staticmethod
    def of(name: str, tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> Layout:
        """The layout of a parameter or buffer of a rank's model, split by `placements` and `fully_shard`."""
        splits = placements_of(name, placements)
        shape = list(tensor.shape)
        for axis, split in splits.items():
            shape[split.dim] *= mesh.get_group(axis).size()
        intervals: list[tuple[Interval, ...]] = [((0, size),) for size in shape]
        for axis, split in splits.items():
            held = intervals[split.dim]
            group, start = mesh.get_group(axis), 0
            mine: list[Interval] = []
            for size in section_sizes(sum(stop - first for first, stop in held), split.sections):
                begin = start + size // group.size() * group.rank()
                mine += _cut(held, begin, begin + size // group.size())
                start += size
            intervals[split.dim] = tuple(mine)
        if isinstance(tensor, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            intervals = [
                _cut(held, first, first + size)
                for held, first, size in zip(intervals, offsets, sizes, strict=True)
            ]
        return Layout(tuple(shape), tuple(intervals))

    def pieces(self, local: Tensor) -> Iterator[tuple[tuple[Interval, ...], Tensor]]:
        """Each rectangle, with the view of this rank's own memory where it lies."""
        for rectangle in product(*self.intervals):
            piece = local
            for dim, interval in enumerate(rectangle):
                before = self.intervals[dim][: self.intervals[dim].index(interval)]
                start = sum(stop - first for first, stop in before)
                piece = piece.narrow(dim, start, interval[1] - interval[0])
            yield rectangle, piece


def _cut(held: Sequence[Interval], start: int, stop: int) -> tuple[Interval, ...]:
    """What lies from `start` up to `stop` where the intervals lie one after the other."""
    found, position = [], 0
    for first, last in held:
        low, high = max(start, position), min(stop, position + last - first)
        if low < high:
            found.append((first + low - position, first + high - position))
        position += last - first
    return tuple(found)


def check_shape(name: str, shape: Sequence[int], layout: Layout) -> None:
    """Raises ValueError where a tensor of the weights has another shape than the program's."""
    if tuple(shape) != layout.shape:
        raise ValueError(
            f"{name} has the shape {tuple(shape)} in the weights, {layout.shape} in the program. Pass the "
            "state_dict() of the model that the plan was made for"
        )


@torch.no_grad()
def fill(name: str, tensor: Tensor, whole: Any, mesh: DeviceMesh, placements: Placements) -> None:
    """Give a tensor this rank's part of a whole value, which is sliced."""
    layout = Layout.of(name, tensor, mesh, placements)
    check_shape(name, whole.get_shape() if hasattr(whole, "get_shape") else whole.shape, layout)
    for rectangle, piece in layout.pieces(local_part(tensor)):
        part = whole[tuple(slice(*interval) for interval in rectangle)] if rectangle else whole[...]
        piece.copy_(part)
