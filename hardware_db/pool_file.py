"""A file of pools: clusters of different devices, and what joins them.

    name: old-and-new
    pools:
      - dgx-h100*32
      - {node: dgx-a100, count: 32, scale_out_bytes_per_s_per_device: 12.5e9}
    between: {gbit_per_s: 800, latency_s: 20e-6}

A pool is what `hardware_db.cluster` takes (paths are relative to this file), or a cluster in either form of
`hardware_db.cluster_file`. `between` says what a node sends to nodes of other pools, in one direction:
`gbit_per_s` or `bytes_per_s`, and the `latency_s` of a message. What it leaves out is that of the slowest of
the pools' own networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from hardware_db.cluster_file import parse_cluster, validated
from hardware_db.cluster_form import PoolsForm
from hardware_db.errors import ClusterFileError, HardwareError
from hardware_db.machine import Cluster
from hardware_db.pools import Pools, join_pools


def parse_pools(
    document: Mapping[object, object],
    named: Callable[[str], Cluster],
    *,
    origin: str = "pools",
    default_name: str = "pools",
    folder: Path = Path(),
) -> Pools:
    """The pools in an already loaded document; `named` makes a cluster of what a user calls one.

    `origin` opens each error message. Raises ClusterFileError.
    """
    form = validated(PoolsForm, document, origin)
    if form.between.gbit_per_s is not None and form.between.bytes_per_s is not None:
        raise ClusterFileError(f"{origin}: between: has both `gbit_per_s` and `bytes_per_s`; give one")
    pools = []
    for index, pool in enumerate(form.pools):
        where = f"{origin}: pools[{index}]"
        if isinstance(pool, str):
            try:
                pools.append(named(pool))
            except ClusterFileError:
                raise
            except HardwareError as error:
                raise ClusterFileError(f"{where}: {error}") from error
        else:
            name = _usual_name(pool, f"pool{index}")
            pools.append(parse_cluster(pool, origin=where, default_name=name, folder=folder))
    try:
        return join_pools(
            pools,
            name=form.name or default_name,
            link_bytes_per_s=form.between.link_bytes_per_s,
            link_latency_s=form.between.latency_s,
        )
    except HardwareError as error:
        raise ClusterFileError(f"{origin}: {error}") from error


def _usual_name(pool: Mapping[str, object], default: str) -> str:
    return f"{pool['node']}*{pool.get('count', 1)}" if "node" in pool else default
