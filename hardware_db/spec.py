"""Reads what a user calls a cluster: NODE*COUNT, a named cluster, or a file; several with `+`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from hardware_db import catalog
from hardware_db.build import cluster_of_nodes, named_cluster
from hardware_db.calibration import calibrated
from hardware_db.cluster_file import parse_cluster, read_document
from hardware_db.errors import HardwareError, UnknownHardwareError, did_you_mean
from hardware_db.machine import Cluster
from hardware_db.pool_file import parse_pools
from hardware_db.pools import Pools, join_pools
from hardware_db.profile import Profile, load_profile
from hardware_db.slices import check_slice

_SUFFIXES = (".yaml", ".yml", ".json")


def cluster_or_pools(
    spec: str | os.PathLike[str], profile: Profile | str | os.PathLike[str] | None = None
) -> Cluster | Pools:
    """What `spec` names: a cluster, or pools of different devices.

    `"dgx-h100*32 + dgx-a100*32"` is two pools, and so is a file with `pools` (`hardware_db.pool_file`). Pools
    of equal devices that are joined by their own network are one cluster. Everything else, `profile` and
    errors as `cluster`.
    """
    parts = [os.fspath(spec)] if _is_file(spec) else [part.strip() for part in str(spec).split("+")]
    if len(parts) == 1:
        found = _from_file(Path(spec)) if _is_file(spec) else _named(parts[0])
    else:
        found = join_pools(_single(part) for part in parts)
    machine = found.collapsed() if isinstance(found, Pools) else found
    if profile is None:
        return machine
    if isinstance(machine, Pools):
        raise HardwareError(
            f"cluster {str(spec)!r}: a profile is of one kind of device, but it has {len(machine.pools)} "
            "pools; write a file of pools in which each names its own `profile`"
        )
    return calibrated(machine, profile if isinstance(profile, Profile) else load_profile(Path(profile)))


def cluster(spec: str | os.PathLike[str], profile: Profile | str | os.PathLike[str] | None = None) -> Cluster:
    """The cluster that `spec` names, as published or as measured by `profile` (or the file that holds it).

    `"dgx-h100*16"` is sixteen nodes on one network (`"dgx-h100"` is one), `"tpu-v4*512"` so many chips of a
    torus (`slice_shapes` has the shapes they come in, `"tpu-v4-8x8x8"` is one of them), `"meta-roce-24k"` a
    named cluster, and a path that ends in .yaml, .yml or .json a file of the user's own (see
    `hardware_db.cluster_file`).
    Raises UnknownHardwareError for an unknown name, ClusterFileError for a bad file, MissingFactError when a
    link rate that the cluster needs is unpublished, HardwareError for a count that cannot be, a profile of
    another device, or pools of different devices (`cluster_or_pools`).
    """
    found = cluster_or_pools(spec, profile)
    if isinstance(found, Pools):
        kinds = ", ".join(pool.id for pool in found.pools)
        raise HardwareError(
            f"cluster {str(spec)!r}: is {len(found.pools)} pools of different devices ({kinds}); "
            "give one of them, or read it with hardware_db.cluster_or_pools"
        )
    return found


def _single(spec: str) -> Cluster:
    if not spec:
        raise HardwareError("a part between '+' is empty; pools are written 'dgx-h100*32 + dgx-a100*32'")
    return cluster(spec)


def _is_file(spec: str | os.PathLike[str]) -> bool:
    is_pools = isinstance(spec, str) and "+" in spec and not Path(spec).exists()
    return isinstance(spec, os.PathLike) or (spec.lower().endswith(_SUFFIXES) and not is_pools)


def _from_file(path: Path) -> Cluster | Pools:
    document = read_document(path)
    if isinstance(document, Mapping) and "pools" in document:

        def named(spec: str) -> Cluster:
            return cluster(path.parent / spec if _is_file(spec) else spec)

        return parse_pools(document, named, origin=str(path), default_name=path.stem, folder=path.parent)
    return parse_cluster(document, origin=str(path), default_name=path.stem, folder=path.parent)


def _named(spec: str) -> Cluster:
    name, star, count = (part.strip() for part in spec.partition("*"))
    if star and not re.fullmatch(r"\d+", count):
        raise HardwareError(
            f"cluster {spec!r}: expected NODE*COUNT with a whole COUNT, as in 'dgx-h100*16', got {count!r}"
        )
    if (node := catalog.find_node(name)) is not None:
        return cluster_of_nodes(node, int(count) if star else 1)
    if not star and (entry := catalog.find_cluster_entry(name)) is not None:
        return named_cluster(entry)
    if (found := _slices(name, int(count) if star else None)) is not None:
        return found
    raise UnknownHardwareError(_unknown(spec, name, bool(star)))


def _slices(name: str, count: int | None) -> Cluster | None:
    """Chips of a torus, `tpu-v4*512`, or slices of one shape, `tpu-v4-8x8x8` or `tpu-v4-8x8x8*2`."""
    shape = re.fullmatch(r"(?P<card>.+)-(?P<sides>\d+(?:x\d+)+)", name)
    card = catalog.find_accelerator(shape["card"] if shape else name)
    hosts = [catalog.node(id) for id in catalog.nodes()] if card is not None else []
    hosts = [host for host in hosts if card and host.accelerator_id == card.id]
    if card is None or len(hosts) != 1 or hosts[0].scale_up.topology != "torus" or not (shape or count):
        return None
    sides = tuple(map(int, shape["sides"].split("x"))) if shape else None
    if sides is not None:
        check_slice(hosts[0], card, sides)
    num_chips = prod(sides) * (count or 1) if sides else count or 1
    num_hosts, rest = divmod(num_chips, hosts[0].num_cards)
    if rest:
        raise HardwareError(
            f"{num_chips} chips of {card.id} do not fill hosts of {hosts[0].num_cards}; use a multiple of it"
        )
    return cluster_of_nodes(hosts[0], num_hosts, torus_sides=sides)


def _unknown(spec: str, name: str, counted: bool) -> str:
    if counted and (entry := catalog.find_cluster_entry(name)) is not None:
        return f"cluster {spec!r}: {entry.id!r} is a whole cluster; its nodes are '{entry.node_id}*COUNT'"
    if (card := catalog.find_accelerator(name)) is not None:
        holders = [id for id in catalog.nodes() if catalog.node(id).accelerator_id == card.id]
        if card.scale_up.topology == "torus" and len(holders) == 1:
            sides = "x".join("4" * (card.scale_up.torus_axes or 2))
            return (
                f"cluster {spec!r}: say how many chips, '{card.id}*64', or which slice, '{card.id}-{sides}'"
            )
        usable = f"nodes with it: {', '.join(holders)}" if holders else "no node has it; write a cluster file"
        return f"cluster {spec!r}: {card.id!r} is an accelerator, not a node; {usable}"
    known = catalog.names_of(catalog.nodes(), "node")
    if not counted:
        known += catalog.names_of(catalog.clusters(), "cluster")
    return (
        f"unknown cluster {spec!r}{did_you_mean(name.lower(), known)} "
        "(a cluster is NODE*COUNT, TPU*CHIPS, a named cluster, or a .yaml or .json file)"
    )
