"""Fresh parameters, the same on any mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.hashing import hashed
from autopar.runtime.layout import Layout, Placements, fill, matches
from autopar.runtime.modules import saved_tensor

Recipe = tuple[tuple[Any, ...], ...]
"""How a parameter is initialised: names of in-place ops with their numbers, one after the other;
`("zero_row", i)` makes row i zero, `("saved",)` is the value that lies beside the program."""


def initialize(
    model: nn.Module,
    mesh: DeviceMesh,
    placements: Placements,
    recipes: Mapping[Recipe, Sequence[str]] = MappingProxyType({}),
    seed: int = 0,
) -> None:
    """Fresh parameters, the same on any mesh, of which each rank makes little more than its part.

    `recipes` tell how, with patterns of the names; without any, matrices are normal with deviation 0.02,
    vectors 1, biases 0. Buffers keep the values they were built with.
    Raises ValueError where there are recipes, but none for a parameter.
    """
    for name, parameter in model.named_parameters():
        patterns = ((recipe, pattern) for recipe, each in recipes.items() for pattern in each)
        recipe = next((recipe for recipe, pattern in patterns if matches(name, pattern)), None)
        if recipe is None and recipes:
            raise ValueError(
                f"nothing is known of how {name} is initialised: no module of the model tells, and it had "
                "no finite value; give the weights of the model (--weights)"
            )
        layout = Layout.of(name, parameter, mesh, placements)
        usual = (
            ("normal_", 0.0, 0.02) if len(layout.shape) > 1 else ("fill_", float(not name.endswith("bias")))
        )
        is_narrow = parameter.dtype.itemsize < 4
        dtype = torch.float32 if is_narrow else parameter.dtype
        fill(name, parameter, _Drawn(name, layout.shape, dtype, recipe or (usual,), seed), mesh, placements)


@dataclass(frozen=True)
class _Drawn:
    """A fresh parameter of the original model. It is drawn by blocks of rows, each from a seed of its own, of
    which slicing makes those that it needs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    recipe: Recipe
    seed: int

    def __getitem__(self, part: Any) -> Tensor:
        if not self.shape:
            return self._rows(0, 1)[0]
        size = max(1, 2**20 // max(1, math.prod(self.shape[1:])))
        start, stop = part[0].start, part[0].stop
        blocks = range(start // size * size, stop, size)
        rows = torch.cat([self._rows(first, min(first + size, self.shape[0])) for first in blocks])
        return rows[(slice(start - blocks.start, stop - blocks.start), *part[1:])]

    def _rows(self, first: int, last: int) -> Tensor:
        generator = torch.Generator().manual_seed(hashed(f"{self.seed} {self.name} {first}"))
        rows = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        for op, *numbers in self.recipe:
            if op == "trunc_normal_":
                mean, deviation, low, high = numbers
                nn.init.trunc_normal_(rows, mean, deviation, low, high, generator)
            elif op in ("normal_", "uniform_"):
                getattr(rows, op)(*numbers, generator=generator)
            elif op == "saved":
                rows.copy_(saved_tensor(self.name).reshape(self.shape or 1)[first:last])
            elif op != "zero_row":
                getattr(rows, op)(*numbers)
            elif first <= numbers[0] < last:
                rows[numbers[0] - first] = 0.0
        return rows
