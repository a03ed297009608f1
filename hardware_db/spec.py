"""Reads what a user calls a cluster: NODE*COUNT, a named cluster, or a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hardware_db import catalog
from hardware_db.build import cluster_of_nodes, named_cluster
from hardware_db.calibration import calibrated
from hardware_db.cluster_file import load_cluster
from hardware_db.errors import HardwareError, UnknownHardwareError, did_you_mean
from hardware_db.machine import Cluster
from hardware_db.profile import Profile, load_profile

_SUFFIXES = (".yaml", ".yml", ".json")


def cluster(spec: str | os.PathLike[str], profile: Profile | str | os.PathLike[str] | None = None) -> Cluster:
    """The cluster that `spec` names, as published or as measured by `profile` (or the file that holds it).

    `"dgx-h100*16"` is sixteen nodes on one network (`"dgx-h100"` is one), `"meta-roce-24k"` a named cluster,
    and a path that ends in .yaml, .yml or .json a file of the user's own (see `hardware_db.cluster_file`).
    Raises UnknownHardwareError for an unknown name, ClusterFileError for a bad file, MissingFactError when a
    link rate that the cluster needs is unpublished, HardwareError for a count that cannot be or a profile of
    another device.
    """
    if profile is not None:
        measured = profile if isinstance(profile, Profile) else load_profile(Path(profile))
        return calibrated(cluster(spec), measured)
    if isinstance(spec, os.PathLike) or spec.lower().endswith(_SUFFIXES):
        return load_cluster(Path(spec))
    name, star, count = (part.strip() for part in spec.partition("*"))
    if star and not re.fullmatch(r"\d+", count):
        raise HardwareError(
            f"cluster {spec!r}: expected NODE*COUNT with a whole COUNT, as in 'dgx-h100*16', got {count!r}"
        )
    if (node := catalog.find_node(name)) is not None:
        return cluster_of_nodes(node, int(count) if star else 1)
    if not star and (entry := catalog.find_cluster_entry(name)) is not None:
        return named_cluster(entry)
    raise UnknownHardwareError(_unknown(spec, name, bool(star)))


def _unknown(spec: str, name: str, counted: bool) -> str:
    if counted and (entry := catalog.find_cluster_entry(name)) is not None:
        return f"cluster {spec!r}: {entry.id!r} is a whole cluster; its nodes are '{entry.node_id}*COUNT'"
    if (card := catalog.find_accelerator(name)) is not None:
        holders = [id for id in catalog.nodes() if catalog.node(id).accelerator_id == card.id]
        usable = f"nodes with it: {', '.join(holders)}" if holders else "no node has it; write a cluster file"
        return f"cluster {spec!r}: {card.id!r} is an accelerator, not a node; {usable}"
    known = catalog.names_of(catalog.nodes(), "node")
    if not counted:
        known += catalog.names_of(catalog.clusters(), "cluster")
    return (
        f"unknown cluster {spec!r}{did_you_mean(name.lower(), known)} "
        "(a cluster is NODE*COUNT, a named cluster, or a .yaml or .json file)"
    )
