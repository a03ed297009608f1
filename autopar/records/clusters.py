"""The cluster of a record: exactly its devices, with links as fast as its words say.

A catalogue node with the record's accelerator gives what the words leave out (host memory, NICs). It is cut
or joined to the record's shape: `devices_per_node`, the scale-up domain (a node, an NVL72 rack or a TPU
slice) and the network rate of `inter_node_link`, such as

    8x HDR200 IB per node        4x Omni-Path 100 Gb/s per node        1600 Gbps RoCE per node
    400 Gb/s RDMA per GPU        not stated (3200 Gbps per node typical)
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import Final

from pydantic import TypeAdapter

from autopar.records.schema import ClusterFacts, Record, RecordError
from hardware_db import Accelerator, Cluster, Node, catalog
from hardware_db.build import cluster_of_nodes
from hardware_db.facts import UNKNOWN, Fact
from hardware_db.schema import NodeScaleOut

_RATE: Final = re.compile(
    r"""
    (?: (?P<links> \d+) \s* x \s* )?                                # 8x
    (?: [a-z] [a-z\ -]* )?                                           # HDR, Omni-Path
    (?P<rate> \d+ (?: \.\d+ )? ) \s*                                # 200
    (?P<scale> [gt] )? (?P<kind> b )? (?: it )? (?: /s | ps | e )? \b  # Gb/s, Gbps, GbE, G, or nothing
    (?: [^()\d]*? \b per \  (?P<unit> node | server | host | gpu | chip | device | card) )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WHOLE_NODE: Final = ("node", "server", "host")
_RACK: Final = re.compile(r"across (?P<devices>\d+)", re.IGNORECASE)


def accelerator_of(record: Record) -> Accelerator:
    """The catalogue's card for a record's accelerator.

    Raises `hardware_db.UnknownHardwareError`, with what may have been meant.
    """
    name = record.cluster.accelerator
    return catalog.accelerator(_aliases().get(name.lower(), name))


def cluster_of(record: Record) -> Cluster:
    """The cluster a record ran on, of exactly `n_devices` devices.

    Raises `RecordError` where the devices do not fill their nodes or slices, and the errors of `hardware_db`
    for an accelerator or a link rate that it does not know.
    """
    facts = record.cluster
    card = accelerator_of(record)
    cards = min(facts.devices_per_node, facts.n_devices)
    if facts.n_devices % cards or (facts.n_devices // facts.slices) % cards:
        raise RecordError(
            f"record {record.id}: {facts.n_devices} devices in {facts.slices} slices do not fill nodes "
            f"of {cards}; check cluster.n_devices, slices and devices_per_node"
        )
    node = _shaped(_reference_node(card, facts), facts, cards)
    return cluster_of_nodes(node, facts.n_devices // cards, card=card)


def _reference_node(card: Accelerator, facts: ClusterFacts) -> Node:
    """The catalogue node with this card that is most like the record's.

    The same number of cards counts first, then the same kind of network (InfiniBand and Ethernet are one
    kind, and what is meant where none is named), then a network as fast as the vendor's own nodes have.
    """
    nodes = [node for id in catalog.nodes() if (node := catalog.node(id)).accelerator_id == card.id]
    if not nodes:
        return _lone_node(card, facts)
    words = re.findall("[a-z]+", (facts.inter_node_link or "").lower())
    link = next((link for link in catalog.links() if link in words), "network")
    usual_gbit = card.scale_out.gbit_per_s_per_card.value

    def unlikeness(node: Node) -> tuple[bool, bool, bool, str]:
        nics, gbit = node.scale_out.num_nics.value, node.scale_out.gbit_per_s_per_nic.value
        per_card = None if nics is None or gbit is None else nics * gbit / node.num_cards
        return (
            node.num_cards != facts.devices_per_node,
            node.scale_out.link != link,
            per_card != usual_gbit,
            node.id,
        )

    return min(nodes, key=unlikeness)


def _lone_node(card: Accelerator, facts: ClusterFacts) -> Node:
    """A node of a card that no catalogue node holds: its own links, and nothing known beside them."""
    nothing = {"value": None}
    return Node.model_validate(
        {
            "id": f"{card.id}-node",
            "name": f"node of {card.name}",
            "accelerator_id": card.id,
            "cards_per_node": _fact(facts.devices_per_node),
            "scale_up": {
                "name": card.scale_up.name,
                "topology": card.scale_up.topology,
                "domain_cards": _fact(facts.devices_per_node),
                "num_switches": nothing,
            },
            "scale_out": {"num_nics": nothing, "gbit_per_s_per_nic": nothing},
            "num_storage_nics": nothing,
            "host_memory_bytes": nothing,
            "local_nvme_bytes": nothing,
            "num_host_cpus": nothing,
            "max_power_watts": nothing,
            "release_year": nothing,
        }
    )


def _shaped(node: Node, facts: ClusterFacts, cards: int) -> Node:
    """`node` with the record's cards, scale-up domain and network cards."""
    share, note = cards / node.num_cards, f"{cards} of {node.num_cards} cards"
    scale_up = node.scale_up.model_copy(update={"domain_cards": _fact(_domain(node, facts, cards))})
    own = node.scale_out.model_copy(update={"num_nics": node.scale_out.num_nics.scaled(share, note)})
    scale_out = _network_cards(own, facts, cards)
    host_memory = node.host_memory.model_copy(
        update={"bytes_per_s": node.host_memory.bytes_per_s.scaled(share, note)}
    )
    return node.model_copy(
        update={
            "id": _id(node.id, own, scale_out),
            "cards_per_node": _fact(cards),
            "cards_per_host": UNKNOWN,
            "scale_up": scale_up,
            "scale_out": scale_out,
            "host_memory_bytes": node.host_memory_bytes.scaled(share, note),
            "host_memory": host_memory,
        }
    )


def _network_cards(own: NodeScaleOut, facts: ClusterFacts, cards: int) -> NodeScaleOut:
    """The network cards that `inter_node_link` tells of, else the node's own.

    A rate of the whole node is shared by as many network cards as the node has.
    """
    said = _network_rate(facts.inter_node_link or "")
    if said is None or facts.n_devices <= cards:
        return own
    links, gbit, is_whole_node = said
    if not is_whole_node:
        links = cards
    elif links is None:
        links = max(1, round(own.num_nics.value or cards))
        gbit /= links
    return own.model_copy(update={"num_nics": _fact(links), "gbit_per_s_per_nic": _fact(gbit)})


def _network_rate(words: str) -> tuple[int | None, float, bool] | None:
    """Links, the Gbit/s of each (of all where links are not told), and whether of a node or of a card.

    None where no rate stands in the words, or one of which nobody can tell whose it is.
    """
    for match in _RATE.finditer(words):
        if match["links"] or (match["scale"] and match["kind"]):
            break
    else:
        return None
    links = int(match["links"]) if match["links"] else None
    if links is None and match["unit"] is None:
        return None
    gbit = float(match["rate"]) * (1000 if (match["scale"] or "").lower() == "t" else 1)
    gbit *= 8 if match["kind"] == "B" else 1
    unit = (match["unit"] or "node").lower()
    return links, gbit, unit in _WHOLE_NODE


def _id(id: str, own: NodeScaleOut, given: NodeScaleOut) -> str:
    """Another name for a node with another network, for which measurements of the original do not hold."""
    nics, gbit = given.num_nics.value, given.gbit_per_s_per_nic.value
    if (nics, gbit) == (own.num_nics.value, own.gbit_per_s_per_nic.value):
        return id
    return f"{id}-{nics:g}x{gbit:g}g"


def _domain(node: Node, facts: ClusterFacts, cards: int) -> int:
    """Cards that reach each other at scale-up rate: a slice, a rack or a node, as far as the record fills it.

    Of a rack of 72 that 64 or 256 devices do not fill evenly, the largest equal parts are used.
    """
    if node.scale_up.topology == "torus":
        return facts.n_devices // facts.slices
    rack = _RACK.search(facts.intra_node_link or "")
    largest = int(rack["devices"]) if rack else cards
    sizes = range(cards, min(largest, facts.n_devices) + 1, cards)
    return max(size for size in sizes if facts.n_devices % size == 0)


def _fact(value: float) -> Fact:
    return Fact(value=value, source="record", confidence="read")


@cache
def _aliases() -> dict[str, str]:
    """Names of accelerators that records use and the catalogue does not know, in lower case."""
    text = (resources.files("autopar") / "data" / "accelerator_aliases.json").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, str]).validate_python(json.loads(text))
