"""Pools: a cluster of different devices, as one homogeneous cluster for each kind.

A pipeline runs through the pools one after another, so all that crosses from one to the next is what a stage
sends to its neighbour. Hence the devices of two pools need not share a collective library (NCCL, HCCL, CNCL,
a TPU's compiler): their groups never mix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from hardware_db import catalog
from hardware_db.build import cluster_of_nodes
from hardware_db.errors import HardwareError
from hardware_db.machine import Cluster, Level
from hardware_db.network import one_network
from hardware_db.schema import Accelerator


@dataclass(frozen=True)
class Pools:
    """Two or more clusters and what joins them.

    `link_bytes_per_s` is what a node sends to nodes of other pools, in one direction, while all nodes do;
    `link_latency_s` what a message between pools takes besides. Raises HardwareError for fewer than two
    pools, for two of one id, and for a link that is none.
    """

    id: str
    name: str
    pools: tuple[Cluster, ...]
    link_bytes_per_s: float
    link_latency_s: float

    def __post_init__(self) -> None:
        if len(self.pools) < 2:
            raise HardwareError(f"pools {self.id}: {len(self.pools)} is too few; one pool is a cluster")
        twice = [id for id, count in Counter(pool.id for pool in self.pools).items() if count > 1]
        if twice:
            raise HardwareError(f"pools {self.id}: several are called {twice[0]!r}; give each a `name`")
        if self.link_bytes_per_s <= 0 or self.link_latency_s < 0:
            raise HardwareError(
                f"pools {self.id}: the link between pools needs a rate above 0 and a latency from 0, "
                f"got {self.link_bytes_per_s:g} bytes/s and {self.link_latency_s:g} s"
            )

    @property
    def num_devices(self) -> int:
        """Devices of all pools together."""
        return sum(pool.num_devices for pool in self.pools)

    def collapsed(self) -> Cluster | Pools:
        """The same with pools of equal device, node and network made one; a cluster where that leaves one.

        Pools that are joined by less than their own network stay apart.
        """
        if self.link_bytes_per_s < (1 - 1e-9) * _slowest_link(self.pools)[0]:
            return self
        merged: list[Cluster] = []
        for pool in self.pools:
            whole = [_merged(other, pool) for other in merged]
            at = next((index for index, found in enumerate(whole) if found is not None), None)
            if at is None:
                merged.append(pool)
            else:
                merged[at] = whole[at] or pool
        if len(merged) == 1:
            return merged[0]
        return replace(self, pools=tuple(merged))


def join_pools(
    pools: Iterable[Cluster],
    *,
    name: str | None = None,
    link_bytes_per_s: float | None = None,
    link_latency_s: float | None = None,
) -> Pools:
    """Pools joined by the link given, or else by the slowest of their own networks.

    Pools of one id are numbered, and a torus keeps the shape that it has. Raises HardwareError as `Pools`
    does.
    """
    apart = tuple(replace(pool, slices=()) for pool in _numbered(pools))
    rate, latency_s = _slowest_link(apart) if apart else (0.0, 0.0)
    id = name or " + ".join(pool.id for pool in apart)
    return Pools(
        id=id,
        name=name or " + ".join(pool.name for pool in apart),
        pools=apart,
        link_bytes_per_s=rate if link_bytes_per_s is None else link_bytes_per_s,
        link_latency_s=latency_s if link_latency_s is None else link_latency_s,
    )


def collective_library(device: Accelerator) -> str:
    """The name of the library through which such devices communicate; the vendor's where none is known."""
    known = catalog.collective_libraries().get(device.vendor)
    return device.vendor if known is None else known.name


def _numbered(pools: Iterable[Cluster]) -> tuple[Cluster, ...]:
    seen: Counter[str] = Counter()
    apart = []
    for pool in pools:
        seen[pool.id] += 1
        again = f" ({seen[pool.id]})" if seen[pool.id] > 1 else ""
        apart.append(replace(pool, id=pool.id + again, name=pool.name + again) if again else pool)
    return tuple(apart)


def _slowest_link(pools: Iterable[Cluster]) -> tuple[float, float]:
    """Bytes/s of a node and seconds of a message, of the slowest of the pools' networks."""
    networks = [(pool.devices_per_node, _network(pool)) for pool in pools]
    return (
        min(per_node * level.bandwidth_bytes_per_s for per_node, level in networks),
        max(level.start_s + level.latency_s for _, level in networks),
    )


def _network(pool: Cluster) -> Level:
    """What leads out of a pool: its outermost level, or its nodes' network cards where scale-up links join
    all of it."""
    if pool.node_id is None or _leaves_scale_up(pool):
        return pool.levels[-1]
    node = catalog.node(pool.node_id)
    return one_network(node, catalog.accelerator(node.accelerator_id), 2, None, 1.0)[0]


def _leaves_scale_up(pool: Cluster) -> bool:
    """Whether the outermost level of a pool of known nodes is a network between scale-up domains."""
    if pool.node_id is None:
        return pool.num_devices > pool.devices_per_node
    node = catalog.node(pool.node_id)
    parts = catalog.accelerator(node.accelerator_id).logical_devices_per_card
    domain_cards = int(node.scale_up.domain_cards.value or 1)
    return pool.num_devices > parts * max(node.num_cards, domain_cards)


def _merged(one: Cluster, other: Cluster) -> Cluster | None:
    """Both as one cluster if they are of a kind, else None."""
    return _more_nodes(one, other) or _wider(one, other)


def _more_nodes(one: Cluster, other: Cluster) -> Cluster | None:
    """The cluster of the nodes of both, if both are plain clusters of one node and stay whole in it."""
    if one.node_id is None or one.node_id != other.node_id:
        return None
    node = catalog.node(one.node_id)
    try:
        per_node = cluster_of_nodes(node, 1).num_devices
        counts = [pool.num_devices // per_node for pool in (one, other)]
        plain = [cluster_of_nodes(node, count) for count in counts]
        both = cluster_of_nodes(node, sum(counts))
    except HardwareError:  # scale-up domains that the sum does not fill
        return None
    is_plain = [_unnamed(one), _unnamed(other)] == list(map(_unnamed, plain))
    return both if is_plain and _inside(one) == _inside(other) == _inside(both) else None


def _wider(one: Cluster, other: Cluster) -> Cluster | None:
    """One cluster with a wider outermost level, if they differ in nothing but size."""
    if not (_leaves_scale_up(one) and _leaves_scale_up(other)) or _kind(one) != _kind(other):
        return None
    num_devices = one.num_devices + other.num_devices
    return replace(
        one,
        id=f"{one.id} + {other.id}",
        name=f"{one.name} + {other.name}",
        num_devices=num_devices,
        levels=(*one.levels[:-1], replace(one.levels[-1], num_devices=num_devices)),
    )


def _unnamed(pool: Cluster) -> Cluster:
    return replace(pool, id="", name="")


def _inside(pool: Cluster) -> tuple[Level, ...]:
    """The levels below the network."""
    return pool.levels[:-1] if _leaves_scale_up(pool) else pool.levels


def _kind(pool: Cluster) -> tuple[object, ...]:
    """All but name and size."""
    outermost = replace(pool.levels[-1], num_devices=1)
    others = {each.name for each in fields(Cluster)} - {"id", "name", "num_devices", "levels", "notes"}
    return pool.levels[:-1], outermost, *(getattr(pool, name) for name in sorted(others))
