"""Builds a cluster from nodes: which devices are joined by which links, at what rate.

From the inside out, each level present only where it joins more devices than the one before:

1. the dies of one card, where software sees several;
2. scale-up: the cards that the node's own links join. One level for a switch, mesh or ring; one per axis for
   a torus (`hardware_db.slices`);
3. PCIe: the rest of the host, where the scale-up domain is smaller than the node: the cards of one switch, of
   one socket, of both sockets. An uplink is shared by all that lies below it;
4. the network (`hardware_db.network`): the node's cards shared by its devices, then the tiers of a named
   cluster. Cards that nobody has published are assumed to be the typical ones of `links.json`, with a note on
   the cluster.

`hardware_db.level` turns the rates into levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from hardware_db import catalog
from hardware_db.errors import HardwareError
from hardware_db.level import level_of, measured_inside, switch_reduction
from hardware_db.machine import Cluster, Level, Slice
from hardware_db.network import one_network, tiers
from hardware_db.schema import Accelerator, ClusterEntry, Node
from hardware_db.slices import shapes_of, slice_name, torus_levels
from hardware_db.torus import Sides, numberings


def cluster_of_nodes(
    node: Node,
    count: int,
    *,
    card: Accelerator | None = None,
    scale_out_bytes_per_s_per_device: float | None = None,
    oversubscription: float = 1.0,
    torus_sides: Sides | None = None,
) -> Cluster:
    """`count` nodes on one network without tiers.

    `card`, `scale_out_bytes_per_s_per_device` and `oversubscription` replace the node's own; `torus_sides`
    makes slices of that shape, which is else the most compact one. Raises HardwareError for a count that does
    not fill the node's scale-up domains, MissingFactError for the rate of a link inside the node that nobody
    has published.
    """
    _check_count(node, count)
    card = card or catalog.accelerator(node.accelerator_id)
    shapes = _shapes(node, card, count, torus_sides)
    levels = _inside(node, card, count, shapes[0] if shapes else None)
    num_devices = _devices_per_node(node, card) * count
    outside: list[Level] = []
    notes: tuple[str, ...] = ()
    if levels[-1].num_devices < num_devices:
        network, notes = one_network(node, card, count, scale_out_bytes_per_s_per_device, oversubscription)
        outside = [network]
    slices = [
        Slice(
            slice_name(card, sides, node.num_cards * count // prod(sides)),
            sides,
            (*_inside(node, card, count, sides), *outside),
        )
        for sides in shapes
        if len(shapes) > 1
    ]
    id, name = f"{node.id}*{count}", f"{count} x {node.name}"
    if torus_sides is not None:
        id = slice_name(card, torus_sides, node.num_cards * count // prod(torus_sides))
        name = f"{name}, {'x'.join(map(str, torus_sides))}"
    return _assemble(id, name, node, card, count, [*levels, *outside], notes, tuple(slices))


def named_cluster(entry: ClusterEntry) -> Cluster:
    """A named cluster with the tiers of its network."""
    node = catalog.node(entry.node_id)
    card = catalog.accelerator(node.accelerator_id)
    count = int(entry.node_count.require(f"{entry.id}: node_count"))
    given = entry.torus_dims.value if entry.torus_dims else None
    shapes = _shapes(node, card, count, given)
    levels = _inside(node, card, count, shapes[0] if shapes else None)
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
    slices: tuple[Slice, ...] = (),
) -> Cluster:
    num_devices = _devices_per_node(node, card) * count
    per_host = num_devices if node.single_host else _devices_per_host(node, card)
    per_node = _devices_per_node(node, card)
    price = card.price_usd_per_card_hour
    parts = card.logical_devices_per_card
    return Cluster(
        id=id,
        name=name,
        device=card.logical_device(),
        num_devices=num_devices,
        devices_per_node=per_host,
        levels=tuple(levels),
        host_memory_bytes_per_device=_part(node.host_memory_bytes.value, per_node),
        host_memory_bytes_per_s_per_device=_part(node.host_memory.bytes_per_s.value, per_node),
        host_link_bytes_per_s_per_device=_host_link_bytes_per_s(node, card),
        price_usd_per_device_hour=None if price is None else price / parts,
        node_id=node.id,
        notes=node.notes + notes,
        slices=slices,
    )


def _part(whole: float | None, num_devices: int) -> float | None:
    return None if whole is None else whole / num_devices


def _host_link_bytes_per_s(node: Node, card: Accelerator) -> float | None:
    """What a device gets of its card's link to the host while all devices use theirs."""
    rate, links = card.host_link.bytes_per_s.value, catalog.links()[card.host_link.link]
    if rate is None:
        return None
    num_sharing = (node.host_memory.cards_per_link.value or 1) * card.logical_devices_per_card
    return rate * links.efficiency.require(f"links.{card.host_link.link}.efficiency") / num_sharing


def _shapes(node: Node, card: Accelerator, count: int, given: Sides | None) -> tuple[Sides, ...]:
    """The shapes of a torus, each in all numberings, the one to take first; none for other links."""
    if node.scale_up.topology != "torus":
        return ()
    if given is not None:
        return (given,)
    ascending = shapes_of(node, card, _domain_cards(node, count))
    return (*ascending, *(order for shape in ascending for order in numberings(shape)[1:]))


def _inside(node: Node, card: Accelerator, count: int, torus_sides: Sides | None) -> list[Level]:
    """Levels 1 to 3; at least one, so that a lone device has a level of its own."""
    levels = [level for level in _package(card) if level.num_devices <= _devices_per_node(node, card)]
    levels += _scale_up(node, card, count, torus_sides)
    inside = levels[-1].num_devices if levels else 0
    levels += [level for level in _pcie_tree(node, card, inside) if level.num_devices > inside]
    return levels


def _package(card: Accelerator) -> Iterator[Level]:
    rate = card.scale_up.intra_card_bytes_per_s.value
    if card.logical_devices_per_card > 1 and rate is not None:
        yield level_of("package", "package", card.logical_devices_per_card, rate, "switch")


def _scale_up(node: Node, card: Accelerator, count: int, torus_sides: Sides | None) -> list[Level]:
    topology = node.scale_up.topology
    if topology == "none":
        return []
    if torus_sides is not None:
        return list(torus_levels(node, card, torus_sides))
    domain = _domain_cards(node, count)
    name = node.scale_up.name or card.scale_up.name or "scale-up"
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
