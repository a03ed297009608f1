"""Lookup of accelerators, nodes, named clusters, links and sources by id or alias.

The data files are read once per process, when the first lookup needs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Protocol, TypeVar

from pydantic import TypeAdapter

from hardware_db.errors import UnknownHardwareError, did_you_mean
from hardware_db.facts import Record, Source
from hardware_db.schema import (
    Accelerator,
    ClusterEntry,
    CollectiveFacts,
    CollectiveLibrary,
    EfficiencyDefaults,
    LinkClass,
    Node,
)


class _Named(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]: ...


R = TypeVar("R", bound=Record)
N = TypeVar("N", bound=_Named)


def accelerators() -> tuple[str, ...]:
    """The ids of all accelerators, sorted."""
    return tuple(sorted(_accelerators()))


def nodes() -> tuple[str, ...]:
    """The ids of all nodes, sorted."""
    return tuple(sorted(_nodes()))


def clusters() -> tuple[str, ...]:
    """The ids of all named clusters, sorted."""
    return tuple(sorted(_clusters()))


def accelerator(id: str) -> Accelerator:
    """The accelerator card with this id or alias ("h100-sxm", "h100"); raises UnknownHardwareError."""
    return _lookup("accelerator", id, _accelerators())


def node(id: str) -> Node:
    """The node with this id or alias ("dgx-h100"); raises UnknownHardwareError."""
    return _lookup("node", id, _nodes())


def cluster_entry(id: str) -> ClusterEntry:
    """The named cluster's data as stored; `hardware_db.cluster` builds the machine from it."""
    return _lookup("cluster", id, _clusters())


def find_node(id: str) -> Node | None:
    """The node with this id or alias, or None."""
    return _find(id, _nodes())


def find_cluster_entry(id: str) -> ClusterEntry | None:
    """The named cluster with this id or alias, or None."""
    return _find(id, _clusters())


def find_accelerator(id: str) -> Accelerator | None:
    """The accelerator with this id or alias, or None."""
    return _find(id, _accelerators())


def names_of(items: Iterable[str], kind: str) -> tuple[str, ...]:
    """`items` and their aliases, for suggestions; `kind` is "accelerator", "node" or "cluster"."""
    tables: dict[str, Mapping[str, _Named]] = {
        "accelerator": _accelerators(),
        "node": _nodes(),
        "cluster": _clusters(),
    }
    table = tables[kind]
    return tuple(name for item in items for name in (item, *table[item].aliases))


@cache
def links() -> Mapping[str, LinkClass]:
    """Latency and reachable share of line rate per link technology."""
    return MappingProxyType(TypeAdapter(dict[str, LinkClass]).validate_python(_read(_data() / "links.json")))


@cache
def collective_facts() -> CollectiveFacts:
    """Reductions in switches and measured tables of collectives."""
    return CollectiveFacts.model_validate(_read(_data() / "collectives.json"))


@cache
def collective_libraries() -> Mapping[str, CollectiveLibrary]:
    """The collective library of every vendor that has one."""
    adapter = TypeAdapter(dict[str, CollectiveLibrary])
    return MappingProxyType(adapter.validate_python(_read(_data() / "libraries.json")))


@cache
def sources() -> Mapping[str, Source]:
    """Every document that a fact cites, by its key."""
    return MappingProxyType(TypeAdapter(dict[str, Source]).validate_python(_read(_data() / "sources.json")))


@cache
def efficiency_defaults() -> EfficiencyDefaults:
    """Efficiencies to assume per vendor and kind."""
    return EfficiencyDefaults.model_validate(_read(_data() / "efficiency.json"))


@cache
def _accelerators() -> Mapping[str, Accelerator]:
    defaults = efficiency_defaults()
    cards = _load("accelerators", Accelerator)
    filled = {
        card.id: card.model_copy(
            update={"efficiency_facts": card.efficiency_facts.over(defaults.of(card.kind, card.vendor))}
        )
        for card in cards
    }
    return MappingProxyType(filled)


@cache
def _nodes() -> Mapping[str, Node]:
    return MappingProxyType({item.id: item for item in _load("nodes", Node)})


@cache
def _clusters() -> Mapping[str, ClusterEntry]:
    return MappingProxyType({item.id: item for item in _load("clusters", ClusterEntry)})


def _lookup(kind: str, id: str, table: Mapping[str, N]) -> N:
    if (item := _find(id, table)) is not None:
        return item
    known = names_of(table, kind)
    suggestion = did_you_mean(_normal(id), known)
    raise UnknownHardwareError(
        f"unknown {kind} {id!r}{suggestion} (hardware_db.{kind}s() lists all {len(table)})"
    )


def _find(id: str, table: Mapping[str, N]) -> N | None:
    wanted = _normal(id)
    if wanted in table:
        return table[wanted]
    return next((item for item in table.values() if wanted in item.aliases), None)


def _normal(id: str) -> str:
    return id.strip().lower().replace("_", "-").replace(" ", "-")


def _data() -> Traversable:
    return files("hardware_db") / "data"


def _load(folder: str, model: type[R]) -> list[R]:
    paths = sorted((_data() / folder).iterdir(), key=lambda path: path.name)
    return [model.model_validate(_read(path)) for path in paths if path.name.endswith(".json")]


def _read(path: Traversable) -> object:
    loaded: object = json.loads(path.read_text(encoding="utf-8"))
    return loaded
