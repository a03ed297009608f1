"""Builds a cluster from nodes: which devices are joined by which links, at what rate.

From the inside out, each level present only where it joins more devices than the one before:

1. the dies of one card, where software sees several;
2. scale-up: the cards that the node's own links join. One level for a switch, mesh or ring; one per axis for
   a torus, at the rate of two links (both ways round the ring) where the axis closes and of one where not;
3. PCIe: the rest of the host, where the scale-up domain is smaller than the node: the cards of one switch, of
   one socket, of both sockets. An uplink is shared by all that lies below it;
4. the network (`hardware_db.network`): the node's cards shared by its devices, then the tiers of a named
   cluster. Cards that nobody has published are assumed to be the typical ones of `links.json`, with a note on
   the cluster.

`hardware_db.level` turns the rates into levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from operator import mul

from hardware_db import catalog
from hardware_db.errors import HardwareError
from hardware_db.level import level_of, measured_inside, switch_reduction
from hardware_db.machine import Cluster, Level
from hardware_db.network import one_network, tiers
from hardware_db.schema import Accelerator, ClusterEntry, Node
from hardware_db.torus import slice_shape


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
    HardwareError for a count that does not fill the node's scale-up domains, MissingFactError for the rate of
    a link inside the node that nobody has published.
    """
    _check_count(node, count)
    card = card or catalog.accelerator(node.accelerator_id)
    levels = _inside(node, card, count, torus_dims=None)
    num_devices = _devices_per_node(node, card) * count
    notes: tuple[str, ...] = ()
    if levels[-1].num_devices < num_devices:
        network, notes = one_network(node, card, count, scale_out_bytes_per_s_per_device, oversubscription)
        levels.append(network)
    return _assemble(f"{node.id}*{count}", f"{count} x {node.name}", node, card, count, levels, notes)


def named_cluster(entry: ClusterEntry) -> Cluster:
    """A named cluster with the tiers of its network."""
    node = catalog.node(entry.node_id)
    card = catalog.accelerator(node.accelerator_id)
    count = int(entry.node_count.require(f"{entry.id}: node_count"))
    levels = _inside(node, card, count, entry.torus_dims.value if entry.torus_dims else None)
    levels.extend(tiers(entry, node, card, count))
    return _assemble(entry.id, entry.name, node, card, count, levels)


def _assemble(
    id: str,
    name: str,
    node: Node,
    card: Accelerator,
    count: int,
    levels: list[Level],
    notes: tuple[str, ...] = (),
) -> Cluster:
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
        notes=node.notes + notes,
    )


def _inside(node: Node, card: Accelerator, count: int, torus_dims: tuple[int, ...] | None) -> list[Level]:
    """Levels 1 to 3; at least one, so that a lone device has a level of its own."""
    levels = [level for level in _package(card) if level.num_devices <= _devices_per_node(node, card)]
    levels += _scale_up(node, card, count, torus_dims)
    inside = levels[-1].num_devices if levels else 0
    levels += [level for level in _pcie_tree(node, card, inside) if level.num_devices > inside]
    return levels


def _package(card: Accelerator) -> Iterator[Level]:
    rate = card.scale_up.intra_card_bytes_per_s.value
    if card.logical_devices_per_card > 1 and rate is not None:
        yield level_of("package", "package", card.logical_devices_per_card, rate, "switch")


def _scale_up(node: Node, card: Accelerator, count: int, torus_dims: tuple[int, ...] | None) -> list[Level]:
    topology = node.scale_up.topology
    if topology == "none":
        return []
    domain = _domain_cards(node, count)
    name = node.scale_up.name or card.scale_up.name or "scale-up"
    if topology == "torus":
        return _torus_levels(name, node, card, torus_dims or _torus_shape(node, card, domain))
    parts = card.logical_devices_per_card
    total = card.scale_up.total_bytes_per_s.require(f"{card.id}: scale_up.total_bytes_per_s")
    num_devices = domain * parts
    is_switch = topology == "switch"
    return [
        level_of(
            name,
            card.scale_up.link or "network",
            num_devices,
            total / parts,
            topology,
            efficiency=card.scale_up.efficiency.value,
            reduction=switch_reduction(card) if is_switch else None,
            measured=measured_inside(card, num_devices) if is_switch else (),
        )
    ]


def _torus_shape(node: Node, card: Accelerator, num_chips: int) -> tuple[int, ...]:
    axes = node.scale_up.torus_axes or card.scale_up.torus_axes or 2
    return slice_shape(num_chips, axes, _wrap_multiple(card))


def _torus_levels(name: str, node: Node, card: Accelerator, dims: tuple[int, ...]) -> list[Level]:
    parts = card.logical_devices_per_card
    link = card.scale_up.link_bytes_per_s.require(f"{card.id}: scale_up.link_bytes_per_s")
    sides = [side for side in dims if side > 1] or [1]
    closed = _closed_axes(card, dims)
    return [
        level_of(
            f"{name} {axis}",
            card.scale_up.link or "network",
            size * parts,
            link * (2 if side in closed else 1) / parts,
            "torus",
            efficiency=card.scale_up.efficiency.value,
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


def _pcie_tree(node: Node, card: Accelerator, num_inside: int) -> Iterator[Level]:
    """The levels of the host's tree; none where the cards' own links join `num_inside`, the whole node."""
    parts, num_devices = card.logical_devices_per_card, _devices_per_node(node, card)
    if num_inside >= num_devices:
        return
    rate = card.host_link.bytes_per_s.require(f"{card.id}: host_link.bytes_per_s")
    tree = node.pcie
    per_switch, per_socket = tree.cards_per_switch.value, tree.cards_per_socket.value
    if per_switch is None or per_socket is None:
        yield level_of("pcie", "pcie", num_devices, rate / parts, "pcie")
        return
    between_sockets = tree.socket_bytes_per_s.require(f"{node.id}: pcie.socket_bytes_per_s")
    yield level_of("pcie switch", "pcie", int(per_switch) * parts, rate / parts, "switch")
    yield level_of(
        "pcie root",
        "pcie",
        int(per_socket) * parts,
        rate / per_switch / parts,
        "switch",
        alone_bytes_per_s=rate,
    )
    yield level_of(
        "sockets",
        "socket",
        num_devices,
        min(between_sockets, rate) / per_socket / parts,
        "switch",
        alone_bytes_per_s=min(between_sockets, rate),
    )


def _devices_per_node(node: Node, card: Accelerator) -> int:
    return node.num_cards * card.logical_devices_per_card


def _devices_per_host(node: Node, card: Accelerator) -> int:
    cards = node.cards_per_host.value
    return _devices_per_node(node, card) if cards is None else int(cards) * card.logical_devices_per_card


def _check_count(node: Node, count: int) -> None:
    if count < 1:
        raise HardwareError(f"{node.id}*{count}: the number of nodes must be at least 1")
