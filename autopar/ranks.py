"""Which ranks communicate along each mesh axis, in a form that stays small for many ranks.

The ranks of a mesh are numbered row-major, so a group is a start plus every sum of multiples of a few
strides, and the starts of all groups of an axis are such sums too: `tp` of 8 in a mesh of 16,384 ranks is
`members ((8, 1),)` and `starts ((2048, 8),)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise, product
from math import prod

from pydantic import BaseModel, ConfigDict

__all__ = ["Link", "RankGroups", "Steps"]

Steps = tuple[tuple[int, int], ...]
"""(count, stride), innermost first: all sums of one multiple below `count` of every stride."""


class Link(BaseModel):
    """Links on which `num_peers` units of a group meet, and their line rate: bytes/s of a device in one
    direction, as published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_peers: int
    bytes_per_s: float


class RankGroups(BaseModel):
    """All groups of one mesh axis (`ep`: of the ranks that divide the experts among them).

    Iterating yields the world ranks of each group, in ascending order of their first one. `links` are what a
    group meets on, innermost first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axis: str
    size: int
    members: Steps
    starts: Steps
    links: tuple[Link, ...] = ()

    @property
    def stride(self) -> int:
        """How far neighbours of a group lie apart."""
        return self.members[0][1]

    @property
    def num_groups(self) -> int:
        return prod(count for count, _ in self.starts)

    def groups(self) -> Iterator[tuple[int, ...]]:
        """The world ranks of every group."""
        offsets = tuple(_sums(self.members))
        for start in _sums(self.starts):
            yield tuple(start + offset for offset in offsets)

    @property
    def first(self) -> str:
        """The first two groups, for people: `0-7, 8-15, ...`."""
        shown = ", ".join(map(_shown, islice(self.groups(), 2)))
        return f"{shown}, ..." if self.num_groups > 2 else shown

    @property
    def met_on(self) -> str:
        """The links, innermost first, for people: `nvswitch 450 GB/s, network 50 GB/s`."""
        return ", ".join(f"{link.name} {link.bytes_per_s / 1e9:.4g} GB/s" for link in self.links)

    def __str__(self) -> str:
        """For example `tp8: ranks 0-7, 8-15, ...; nvswitch 450 GB/s`."""
        return f"{self.axis}{self.size}: ranks {self.first}" + (f"; {self.met_on}" if self.links else "")


def _sums(steps: Steps) -> Iterator[int]:
    """All sums of one multiple of every stride, the innermost counting fastest."""
    for multiples in product(*(range(count) for count, _ in reversed(steps))):
        yield sum(index * stride for index, (_, stride) in zip(multiples, reversed(steps), strict=True))


def _shown(ranks: tuple[int, ...]) -> str:
    """Ranks for people: `0-7`, `(0, 8, ... 56)`, or all of them where they are few."""
    strides = {after - before for before, after in pairwise(ranks)}
    if strides == {1} and len(ranks) > 2:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(strides) == 1 and len(ranks) > 4:
        return f"({ranks[0]}, {ranks[1]}, ... {ranks[-1]})"
    if len(ranks) > 8:
        return f"({', '.join(map(str, ranks[:6]))}, ... {ranks[-1]})"
    return f"({', '.join(map(str, ranks))})"
