"""Builds a cluster from nodes: which devices are joined by which links, at what rate.

From the inside out, each level present only where it joins more devices than the one before:

1. the dies of one card, where software sees several;
2. scale-up: the cards that the node's own links join. One level for a switch, mesh or ring; one per axis for
   a torus, at the rate of two links (both ways round the ring) where the axis closes and of one where not;
3. PCIe: the rest of the host, where the scale-up domain is smaller than the node;
4. the network: the node's NICs shared by its devices, then the tiers of a named cluster. Oversubscription
   ratios of nested tiers multiply.

Every rate is a published one times the share of it that collectives reach; both are data
(`scale_up.efficiency` of the card, else `links.json`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from operator import mul

from hardware_db import catalog
from hardware_db.errors import HardwareError, MissingFactError
from hardware_db.machine import Cluster, Level
from hardware_db.schema import Accelerator, ClusterEntry, NetworkLevel, Node
from hardware_db.torus import slice_shape
from hardware_db.units import bytes_per_s_from_gbit


def cluster_of_nodes(
    node: Node,
    count: int,
    *,
    card: Accelerator | None = None,
    scale_out_bytes_per_s_per_device: float | None = None,
    oversubscription: float = 1.0,
) -> Cluster:
    """`count` nodes on one network without tiers.

    `card`, `scale_out_bytes_per_s_per_device` and `oversubscription` replace the node's own. Raises
    HardwareError for a count that does not fill the node's scale-up domains, MissingFactError for a link rate
    that nobody has published.
    """
    _check_count(node, count)
    card = card or catalog.accelerator(node.accelerator_id)
    levels = _inside(node, card, count, torus_dims=None)
    num_devices = _devices_per_node(node, card) * count
    if levels[-1].num_devices < num_devices:
        rate = scale_out_bytes_per_s_per_device or _nic_bytes_per_s(node, card)
        levels.append(_network_level("network", "network", num_devices, rate, oversubscription))
    return _assemble(f"{node.id}*{count}", f"{count} x {node.name}", node, card, count, levels)


def named_cluster(entry: ClusterEntry) -> Cluster:
    """A named cluster with the tiers of its network.

    A tier whose size does not divide the cluster's (127 nodes in units of 32) is merged into the next one.
    """
    node = catalog.node(entry.node_id)
    card = catalog.accelerator(node.accelerator_id)
    count = int(entry.node_count.require(f"{entry.id}: node_count"))
    levels = _inside(node, card, count, entry.torus_dims.value if entry.torus_dims else None)
    levels.extend(_tiers(entry, node, card, count))
    return _assemble(entry.id, entry.name, node, card, count, levels)


def _assemble(id: str, name: str, node: Node, card: Accelerator, count: int, levels: list[Level]) -> Cluster:
    num_devices = _devices_per_node(node, card) * count
    per_host = num_devices if node.single_host else _devices_per_host(node, card)
    host_memory = node.host_memory_bytes.value
    price = card.price_usd_per_card_hour
    parts = card.logical_devices_per_card
    return Cluster(
        id=id,
        name=name,
        device=card.logical_device(),
        num_devices=num_devices,
        devices_per_node=per_host,
        levels=tuple(levels),
        host_memory_bytes_per_device=None
        if host_memory is None
        else host_memory / _devices_per_node(node, card),
        price_usd_per_device_hour=None if price is None else price / parts,
        node_id=node.id,
        notes=node.notes,
    )


def _inside(node: Node, card: Accelerator, count: int, torus_dims: tuple[int, ...] | None) -> list[Level]:
    """Levels 1 to 3; at least one, so that a lone device has a level of its own."""
    levels = [level for level in _package(card) if level.num_devices <= _devices_per_node(node, card)]
    if node.scale_up.topology != "none":
        levels += _scale_up(node, card, count, torus_dims)
    inside = levels[-1].num_devices if levels else 0
    if inside < _devices_per_node(node, card):
        levels.append(_pcie_level(node, card))
    return levels


def _package(card: Accelerator) -> Iterator[Level]:
    rate = card.scale_up.intra_card_bytes_per_s.value
    if card.logical_devices_per_card > 1 and rate is not None:
        yield _level("package", "package", card.logical_devices_per_card, rate, "switch")


def _scale_up(node: Node, card: Accelerator, count: int, torus_dims: tuple[int, ...] | None) -> list[Level]:
    domain = _domain_cards(node, count)
    name = node.scale_up.name or card.scale_up.name or "scale-up"
    if node.scale_up.topology == "torus":
        return _torus_levels(name, node, card, torus_dims or _torus_shape(node, card, domain))
    parts = card.logical_devices_per_card
    total = card.scale_up.total_bytes_per_s.require(f"{card.id}: scale_up.total_bytes_per_s")
    return [_scale_up_level(name, card, domain * parts, total / parts, node.scale_up.topology)]


def _torus_shape(node: Node, card: Accelerator, num_chips: int) -> tuple[int, ...]:
    axes = node.scale_up.torus_axes or card.scale_up.torus_axes or 2
    return slice_shape(num_chips, axes, _wrap_multiple(card))


def _torus_levels(name: str, node: Node, card: Accelerator, dims: tuple[int, ...]) -> list[Level]:
    parts = card.logical_devices_per_card
    link = card.scale_up.link_bytes_per_s.require(f"{card.id}: scale_up.link_bytes_per_s")
    sides = [side for side in dims if side > 1] or [1]
    closed = _closed_axes(card, dims)
    return [
        _scale_up_level(
            f"{name} {axis}",
            card,
            size * parts,
            link * (2 if side in closed else 1) / parts,
            "torus",
        )
        for axis, side, size in zip("xyzw", sides, accumulate(sides, mul), strict=False)
    ]


def _closed_axes(card: Accelerator, dims: tuple[int, ...]) -> frozenset[int]:
    """The side lengths whose axis closes to a ring."""
    closed = frozenset(side for side in dims if side % _wrap_multiple(card) == 0)
    if card.scale_up.torus_wraps_whole_cubes_only and len(closed) < len(frozenset(dims)):
        return frozenset()
    return closed


def _wrap_multiple(card: Accelerator) -> int:
    return int(card.scale_up.torus_wrap_multiple.require(f"{card.id}: scale_up.torus_wrap_multiple"))


def _domain_cards(node: Node, count: int) -> int:
    """Cards in one scale-up domain of this cluster; domains larger than a node hold whole nodes."""
    whole = int(node.scale_up.domain_cards.require(f"{node.id}: scale_up.domain_cards"))
    total = node.num_cards * count
    domain = min(whole, total)
    unit = node.num_cards if domain >= node.num_cards else domain
    if domain % unit or total % domain:
        raise HardwareError(
            f"{node.id}*{count}: {total} cards do not fill scale-up domains of {whole}; "
            f"use a multiple of {max(1, whole // node.num_cards)} nodes, or fewer"
        )
    return domain


def _pcie_level(node: Node, card: Accelerator) -> Level:
    rate = card.host_link.bytes_per_s.require(f"{card.id}: host_link.bytes_per_s")
    parts = card.logical_devices_per_card
    return _level("pcie", "pcie", _devices_per_node(node, card), rate / parts, "pcie")


def _tiers(entry: ClusterEntry, node: Node, card: Accelerator, count: int) -> Iterator[Level]:
    per_node = _devices_per_node(node, card)
    nodes, ratio = 1, 1.0
    for position, tier in enumerate(entry.levels):
        child_devices = nodes * per_node
        nodes *= int(tier.num_children.require(f"{entry.id}: levels[{position}].num_children"))
        ratio *= tier.oversubscription.require(f"{entry.id}: levels[{position}].oversubscription")
        outermost = position == len(entry.levels) - 1
        if outermost or count % nodes == 0:
            rate = _tier_bytes_per_s(tier, child_devices, node, card)
            yield _network_level(
                tier.name, tier.link, (count if outermost else nodes) * per_node, rate, ratio
            )


def _tier_bytes_per_s(tier: NetworkLevel, child_devices: int, node: Node, card: Accelerator) -> float:
    per_child = tier.child_bytes_per_s.value
    return _nic_bytes_per_s(node, card) if per_child is None else per_child / child_devices


def _network_level(name: str, link: str, num_devices: int, rate: float, oversubscription: float) -> Level:
    return _level(name, link, num_devices, rate / oversubscription, "fat_tree")


def _nic_bytes_per_s(node: Node, card: Accelerator) -> float:
    """Network rate per logical device: the node's NICs, else the card's in its vendor's reference node."""
    nics, gbit = node.scale_out.num_nics.value, node.scale_out.gbit_per_s_per_nic.value
    if nics is not None and gbit is not None:
        return bytes_per_s_from_gbit(nics * gbit) / _devices_per_node(node, card)
    reference = card.scale_out.gbit_per_s_per_card.value
    if reference is not None:
        return bytes_per_s_from_gbit(reference) / card.logical_devices_per_card
    raise MissingFactError(
        f"{node.id}: scale_out.num_nics and gbit_per_s_per_nic are unknown, so nodes cannot be joined; "
        f"write a cluster file with `node: {node.id}`, `count` and `scale_out_bytes_per_s_per_device`"
    )


def _scale_up_level(name: str, card: Accelerator, num_devices: int, rate: float, topology: str) -> Level:
    return _level(
        name, card.scale_up.link or "network", num_devices, rate, topology, card.scale_up.efficiency.value
    )


def _level(
    name: str, link: str, num_devices: int, rate: float, topology: str, efficiency: float | None = None
) -> Level:
    link_class = catalog.links()[link]
    share = efficiency or link_class.efficiency.require(f"links.{link}.efficiency")
    latency = link_class.latency_s.require(f"links.{link}.latency_s")
    return Level(name, num_devices, rate * share, latency, topology, line_rate_bytes_per_s=rate)


def _devices_per_node(node: Node, card: Accelerator) -> int:
    return node.num_cards * card.logical_devices_per_card


def _devices_per_host(node: Node, card: Accelerator) -> int:
    cards = node.cards_per_host.value
    return _devices_per_node(node, card) if cards is None else int(cards) * card.logical_devices_per_card


def _check_count(node: Node, count: int) -> None:
    if count < 1:
        raise HardwareError(f"{node.id}*{count}: the number of nodes must be at least 1")
