"""Levels from link classes: a rate and a technology become what a collective gets of them.

Every rate is a published one times the share of it that collectives reach; both are data
(`scale_up.efficiency` of the card, else `links.json`). Reductions in switches and measured tables are in
`collectives.json`.
"""

from __future__ import annotations

from math import prod

from hardware_db import catalog
from hardware_db.machine import Level, LevelTopology
from hardware_db.schema import Accelerator, CollectiveTable, LinkClass, Node, ProtocolFacts
from hardware_db.transport import InNetworkReduction, MeasuredCollective, Protocol


def level_of(
    name: str,
    link: str,
    num_devices: int,
    bytes_per_s: float,
    topology: LevelTopology,
    *,
    efficiency: float | None = None,
    alone_bytes_per_s: float | None = None,
    reduction: InNetworkReduction | None = None,
    measured: tuple[MeasuredCollective, ...] = (),
    num_switches: int = 1,
    library: LinkClass | None = None,
) -> Level:
    """A level of links of class `link` at a line rate of `bytes_per_s` for each device.

    `efficiency` replaces the class's; a message passes up to `num_switches` switches. `library` is the class
    whose library drives these links, if not their own: a network is used as the cards' own links let it.
    Raises MissingFactError for a class without latency or efficiency.
    """
    links = catalog.links()[link]
    share = efficiency or links.efficiency.require(f"links.{link}.efficiency")
    latency_s = links.latency_s.require(f"links.{link}.latency_s")
    switches_s = (num_switches - 1) * (links.switch_latency_s.value or 0.0)
    return Level(
        name,
        num_devices,
        bytes_per_s * share,
        latency_s + switches_s,
        topology,
        line_rate_bytes_per_s=bytes_per_s,
        alone_bytes_per_s=None if alone_bytes_per_s is None else alone_bytes_per_s * share,
        start_s=links.start_s.value or 0.0,
        protocols=tuple(
            _protocol(f"links.{link}.{name}", name, facts, switches_s)
            for name, facts in links.protocols.items()
            if library is None or name in library.protocols
        ),
        concurrent_messages=int(links.concurrent_messages.value or 1),
        level_by_level=(library or links).level_by_level,
        tree_bandwidth_share=links.tree_bandwidth_share.value or 1.0,
        reduction=reduction,
        measured=measured,
    )


def library_of(card: Accelerator) -> LinkClass:
    """The link class whose library drives these cards."""
    return catalog.links()[card.scale_up.link or "pcie"]


def switch_reduction(card: Accelerator) -> InNetworkReduction | None:
    """What the scale-up switches of this card reduce, None where they cannot or nobody measured it."""
    if not card.scale_up.in_network_reduction:
        return None
    for facts in catalog.collective_facts().reductions:
        if card.id in facts.accelerators:
            what = f"collectives.json: reduction of {card.id}"
            return InNetworkReduction(
                facts.all_reduce_bytes_per_s.require(what),
                facts.start_s.require(what),
                int(facts.min_peers.require(what)),
            )
    return None


def network_reduction(link: str, bytes_per_s: float) -> InNetworkReduction:
    """The reduction of network switches, at the share of the rate that collectives reach."""
    links = catalog.links()[link]
    return InNetworkReduction(
        bytes_per_s * links.efficiency.require(f"links.{link}.efficiency"),
        links.reduction_start_s.require(f"links.{link}.reduction_start_s"),
    )


def measured_inside(card: Accelerator, num_devices: int) -> tuple[MeasuredCollective, ...]:
    """The tables of a whole scale-up domain of `num_devices` such cards."""
    return tuple(_measured(table) for table in _tables(card) if table.shape == (num_devices,))


def measured_across(node: Node, card: Accelerator, count: int) -> tuple[MeasuredCollective, ...]:
    """The tables of up to `count` such nodes."""
    num_devices = node.num_cards * card.logical_devices_per_card
    return tuple(
        _measured(table)
        for table in _tables(card)
        if node.id in table.nodes
        and table.shape[0] == num_devices
        and prod(table.shape) <= count * num_devices
    )


def _tables(card: Accelerator) -> list[CollectiveTable]:
    return [table for table in catalog.collective_facts().tables if card.id in table.accelerators]


def _measured(table: CollectiveTable) -> MeasuredCollective:
    return MeasuredCollective.from_bus_bandwidth(table.kind, table.shape, table.rows)


def _protocol(what: str, name: str, facts: ProtocolFacts, switches_s: float) -> Protocol:
    return Protocol(
        name,
        facts.start_s.require(f"{what}.start_s"),
        facts.step_s.require(f"{what}.step_s") + switches_s,
        facts.bandwidth_share.require(f"{what}.bandwidth_share"),
    )
