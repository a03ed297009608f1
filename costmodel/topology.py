"""How a group of ranks lies on a cluster's levels, and what of their links it gets.

A level with L devices holds m = gcd(size, L / stride) members of a group side by side (one, where the stride
does not divide L), and the product of these for a group in runs. That is exact where sizes nest, which powers
of two on usual machines do; where they do not, it is the largest unit that every group of the mesh axis falls
into, so the worst placed group sets the price. m divides the next level's m, hence a group is a tree:
`num_inside` members form a unit, and `num_peers` units meet on the links of a level. Every device owns its
share of a level's bandwidth, so a unit talks through `num_inside` shares at once, and groups that run side by
side on a switch do not slow each other down.

What k peers out of n children of a level, `spacing` children apart, get of a device's bandwidth B there:

    switch, fat_tree, rails   B
    mesh                      B (k - 1) / (n - 1)             a link for every pair
    dragonfly                 B max((k - 1) / (n - 1), 1/2)   a mesh of groups; a detour over a third group
                                                              takes two links (Valiant routing; Kim et al.,
                                                              ISCA 2008)
    ring, pcie                B / spacing                     the groups between share the links
    torus                     B / spacing                     the same; half where the k do not go all around
    line                      B / spacing                     a torus axis that is no ring; B is one link

Adjacent torus levels that a group fills work at once: their bandwidths add ("How to Scale Your Model").

That is while all groups of the axis communicate, as they do in a training step: B is a device's part of the
network cards and uplinks that it shares. A group `alone` shares with no one: each member gets what one device
can drive (`Level.alone_bytes_per_s`), as far as its node or subtree has it. One device drives one card: of
two nodes of eight A100, a single pair reached the 12.5 GB/s of its own card, eight pairs 91 GB/s together
(Alpa's measurements on CoreWeave).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

from costmodel.errors import CostModelError
from costmodel.work import Group

if TYPE_CHECKING:
    from hardware_db import Cluster, Level


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a group that one level connects: `num_peers` units of `num_inside` members.

    Bandwidths are per member and one direction: in a collective of the peers, and between two neighbours. A
    collective's ring takes `num_steps` steps of `latency_s`; a message to a random peer passes `mean_hops`
    links. Axes of a torus that the group fills are one span of several levels, `level` being the outermost.
    """

    level: Level
    level_names: tuple[str, ...]
    num_peers: int
    num_inside: int
    bandwidth_bytes_per_s: float
    pair_bandwidth_bytes_per_s: float
    latency_s: float
    num_steps: int
    mean_hops: float
    fills_axis: bool = False

    @property
    def unit_bytes_per_s(self) -> float:
        """What all members of one unit move together."""
        return self.num_inside * self.bandwidth_bytes_per_s


def spans(group: Group, cluster: Cluster, *, alone: bool = False) -> tuple[Span, ...]:
    """Where members of `group` meet, innermost first; the product of `num_peers` is the group's size.

    `alone` is whether the cluster's other devices are quiet meanwhile.
    Raises CostModelError when the cluster has fewer devices than the group reaches over.
    """
    if group.reach > cluster.num_devices:
        raise CostModelError(
            f"a group of {group.size} ranks with stride {group.stride} reaches over {group.reach} devices, "
            f"but cluster {cluster.name!r} has {cluster.num_devices}; use a smaller mesh or a larger cluster"
        )
    merged: list[Span] = []
    for span in _single_spans(group, cluster, alone):
        if span.fills_axis and merged and merged[-1].fills_axis:
            merged[-1] = _both_axes(merged[-1], span)
        else:
            merged.append(span)
    return tuple(merged)


def _single_spans(group: Group, cluster: Cluster, alone: bool) -> Iterator[Span]:
    """One span for each level on which members meet."""
    inside, num_inside, num_below = [1] * len(group.parts), 1, 1
    for level in cluster.levels:
        is_outermost = level is cluster.levels[-1]
        here = [size if is_outermost else _num_members(size, stride, level) for size, stride in group.parts]
        num_members = prod(here)
        if num_members > num_inside:
            widest = max(
                stride
                for (_, stride), now, before in zip(group.parts, here, inside, strict=True)
                if now > before
            )
            children = _Children(level.num_devices // num_below, max(1, widest // num_below), not alone)
            num_sharing = num_below / num_inside if alone else 1.0
            yield _span(level, num_members // num_inside, num_inside, children, num_sharing)
        inside, num_inside, num_below = here, num_members, level.num_devices


def _num_members(size: int, stride: int, level: Level) -> int:
    num_slots, remainder = divmod(level.num_devices, stride)
    return 1 if remainder or not num_slots else gcd(size, num_slots)


class _Children(NamedTuple):
    """How peers lie among the children of a level: out of `number`, `spacing` apart; and whether the groups
    between them communicate too."""

    number: int
    spacing: int
    are_shared: bool


def _span(level: Level, num_peers: int, num_inside: int, children: _Children, num_sharing: float) -> Span:
    """One span. A member may use the parts of `num_sharing` devices, up to what one device can drive."""
    limit = level.alone_bytes_per_s or level.bandwidth_bytes_per_s
    member = level.bandwidth_bytes_per_s
    if num_sharing > 1:
        member = max(member, min(limit, num_sharing * member))
    collective = pair = member
    num_steps, mean_hops, fills_axis = num_peers - 1, 1.0, False
    spacing = children.spacing if children.are_shared else 1
    match level.topology:
        case "mesh":
            pair = member / max(1, children.number - 1)
            collective = pair * (num_peers - 1)
        case "dragonfly":
            pair = member * max(1 / max(1, children.number - 1), 0.5)
            collective = member * max((num_peers - 1) / max(1, children.number - 1), 0.5)
        case "ring" | "pcie":
            collective = pair = member / spacing
            mean_hops = num_peers / 4 if level.topology == "ring" else 1.0
        case "torus" | "line":
            goes_around = level.topology == "torus" and num_peers * children.spacing == children.number
            fills_axis = goes_around or (level.topology == "line" and num_peers == children.number)
            both_ways = 2 if level.topology == "torus" else 1  # links of the axis in `member`
            pair = member / spacing / both_ways
            collective = both_ways * pair if goes_around else pair
            num_hops = num_peers // 2 if goes_around else num_peers - 1
            num_steps, mean_hops = num_hops * children.spacing, num_peers / 4
    return Span(
        level=level,
        level_names=(level.name,),
        num_peers=num_peers,
        num_inside=num_inside,
        bandwidth_bytes_per_s=collective,
        pair_bandwidth_bytes_per_s=pair,
        latency_s=level.latency_s,
        num_steps=num_steps,
        mean_hops=max(1.0, mean_hops),
        fills_axis=fills_axis,
    )


def _both_axes(inner: Span, outer: Span) -> Span:
    """Two filled parts of a torus as one. A message's hops are split over the axes, each with its own
    links."""
    bandwidth_bytes_per_s = inner.bandwidth_bytes_per_s + outer.bandwidth_bytes_per_s
    busiest = max(axis.mean_hops / axis.bandwidth_bytes_per_s for axis in (inner, outer))
    return Span(
        level=outer.level,
        level_names=inner.level_names + outer.level_names,
        num_peers=inner.num_peers * outer.num_peers,
        num_inside=inner.num_inside,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        pair_bandwidth_bytes_per_s=min(inner.pair_bandwidth_bytes_per_s, outer.pair_bandwidth_bytes_per_s),
        latency_s=max(inner.latency_s, outer.latency_s),
        num_steps=inner.num_steps + outer.num_steps,
        mean_hops=busiest * bandwidth_bytes_per_s,
        fills_axis=True,
    )
