"""The network between hosts: what of its cards each device gets, and the tiers of switches above them."""

from __future__ import annotations

from collections.abc import Iterator

from hardware_db import catalog
from hardware_db.level import level_of, library_of, measured_across, network_reduction
from hardware_db.machine import Level
from hardware_db.schema import Accelerator, ClusterEntry, Node
from hardware_db.units import bytes_per_s_from_gbit


def one_network(
    node: Node, card: Accelerator, count: int, bytes_per_s: float | None, oversubscription: float
) -> tuple[Level, tuple[str, ...]]:
    """`count` nodes on one network without tiers, and notes on where its rate is from.

    `bytes_per_s` per device replaces what the node's cards give. Tables that were measured between such nodes
    hold only where nothing is replaced.
    """
    given = None if bytes_per_s is None else (bytes_per_s, bytes_per_s, ())
    rate, alone, notes = given or _card_bytes_per_s(node, card)
    is_published = bytes_per_s is None and oversubscription == 1.0
    level = level_of(
        "network",
        node.scale_out.link,
        node.num_cards * card.logical_devices_per_card * count,
        rate / oversubscription,
        "fat_tree",
        alone_bytes_per_s=alone,
        measured=measured_across(node, card, count) if is_published else (),
        library=library_of(card),
    )
    return level, notes


def tiers(entry: ClusterEntry, node: Node, card: Accelerator, count: int) -> Iterator[Level]:
    """The tiers of a named cluster's network, from the inside out. Oversubscription ratios multiply.

    A tier whose size does not divide the cluster's is priced as the largest that does, if that is at least
    half of it (Frontier: 112 nodes for 128), else merged into the next one (127 nodes in units of 32). Each
    tier is two switches farther away than the one inside it.
    """
    per_node = node.num_cards * card.logical_devices_per_card
    nominal, whole, ratio = 1, 1, 1.0
    share, alone, _ = _card_bytes_per_s(node, card)
    for position, tier in enumerate(entry.levels):
        per_child = tier.child_bytes_per_s.value
        rate = share if per_child is None else per_child / (nominal * per_node)
        nominal *= int(tier.num_children.require(f"{entry.id}: levels[{position}].num_children"))
        ratio *= tier.oversubscription.require(f"{entry.id}: levels[{position}].oversubscription")
        num_nodes = count if position == len(entry.levels) - 1 else _largest_divisor(count, whole, nominal)
        if num_nodes == whole or (num_nodes < nominal / 2 and num_nodes != count):
            continue
        whole = num_nodes
        link = tier.link or node.scale_out.link
        yield level_of(
            tier.name,
            link,
            num_nodes * per_node,
            rate / ratio,
            tier.topology,
            alone_bytes_per_s=max(alone, rate / ratio),
            reduction=network_reduction(link, rate / ratio) if tier.in_network_reduction else None,
            num_switches=1 + 2 * position,
            library=library_of(card),
        )


def _largest_divisor(count: int, unit: int, limit: int) -> int:
    """The largest multiple of `unit`, up to `limit`, that divides `count`; `unit` does."""
    return next(size for size in range(limit - limit % unit, 0, -unit) if count % size == 0)


def _card_bytes_per_s(node: Node, card: Accelerator) -> tuple[float, float, tuple[str, ...]]:
    """Network rate of a device while all send, while it alone sends, and notes on where that is from.

    From the node's network cards, else those of the vendor's reference node, else the typical ones. A device
    sends through one card; it has several to itself where the node has more cards than devices.
    """
    parts = card.logical_devices_per_card
    nics, gbit = node.scale_out.num_nics.value, node.scale_out.gbit_per_s_per_nic.value
    if nics is not None and gbit is not None:
        share = bytes_per_s_from_gbit(nics * gbit) / (node.num_cards * parts)
        return share, max(share, bytes_per_s_from_gbit(gbit)), ()
    reference = card.scale_out.gbit_per_s_per_card.value
    notes: tuple[str, ...] = ()
    if reference is None:
        typical = catalog.links()[node.scale_out.link].typical_gbit_per_s_per_card
        reference = typical.require(f"links.{node.scale_out.link}.typical_gbit_per_s_per_card")
        notes = (
            f"The network cards of {node.id} are not published; assumed {reference:g} Gbit/s for each "
            "accelerator. Give `scale_out_bytes_per_s_per_device` in a cluster file of your own.",
        )
    return bytes_per_s_from_gbit(reference) / parts, bytes_per_s_from_gbit(reference), notes
