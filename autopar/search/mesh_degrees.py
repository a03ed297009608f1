"""The degrees that a given mesh of devices leaves: every axis of it serves one role."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

from autopar.plan import Parallelism


class MeshDegrees(NamedTuple):
    """One way to give the axes of a mesh their roles: the product of the axes of each role."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.dp_replicate * self.dp_shard

    @staticmethod
    def of(p: Parallelism) -> MeshDegrees:
        """The degrees of a parallelism."""
        return MeshDegrees(p.dp_replicate, p.dp_shard, p.cp, p.tp, p.pp)


MESH_SETTINGS = frozenset({*MeshDegrees._fields, "dp"})
"""The settings that a mesh narrows."""


@lru_cache(maxsize=64)
def degrees_of_mesh(mesh: tuple[int, ...]) -> frozenset[MeshDegrees]:
    """All degrees that a mesh can have."""
    found = {(1,) * len(MeshDegrees._fields)}
    for size in mesh:
        roles = range(len(MeshDegrees._fields))
        found = {
            tuple(degree * (size if role == chosen else 1) for role, degree in enumerate(degrees))
            for degrees, chosen in product(found, roles)
        }
    return frozenset(MeshDegrees(*degrees) for degrees in found)
