"""What the arguments of `autopar.plan` and `autopar.evaluate` stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import hardware_db
from autopar.errors import InvalidParallelismError
from autopar.pricing import DEFAULT_SOFTWARE
from autopar.search.summaries import main_dtype
from autopar.search.wording import size
from costmodel import OptimizerPolicy, Software, optimizer_policy, software
from graphs.ir import OpGraph
from hardware_db import Cluster, Pools

Precision = Literal["fp8", "fp4"]
"""What products with parameters inside repeated blocks may run in, if not in the model's own precision."""


def cluster_of(cluster: Cluster | str | Path, memory_bytes: float | None = None) -> Cluster:
    """The cluster, with no more than `memory_bytes` of each device to be used. Raises HardwareError."""
    found = cluster if isinstance(cluster, Cluster) else hardware_db.cluster(str(cluster))
    return found if memory_bytes is None else with_memory(found, memory_bytes, "given by the user")


def machine_of(cluster: Cluster | Pools | str | Path, memory_bytes: float | None = None) -> Cluster | Pools:
    """The same for what may be pools of different devices, each with so much memory."""
    found = cluster if isinstance(cluster, Cluster | Pools) else hardware_db.cluster_or_pools(str(cluster))
    found = found.collapsed() if isinstance(found, Pools) else found
    if isinstance(found, Cluster):
        return cluster_of(found, memory_bytes)
    return replace(found, pools=tuple(cluster_of(pool, memory_bytes) for pool in found.pools))


def with_memory(cluster: Cluster, memory_bytes: float, why: str) -> Cluster:
    """The cluster with `memory_bytes` on each device. Raises InvalidParallelismError for none."""
    device = cluster.device
    if memory_bytes <= 0:
        raise InvalidParallelismError(f"{size(memory_bytes)} of memory on each device hold nothing")
    capacity = device.memory.capacity_bytes.scaled(memory_bytes / device.memory_bytes, why)
    memory = device.memory.model_copy(update={"capacity_bytes": capacity})
    return replace(cluster, device=device.model_copy(update={"memory": memory}))


def software_of(given: Software | str | None) -> Software:
    """The era of software; by default what emitted programs run on. Raises CostModelError."""
    return given if isinstance(given, Software) else software(given or DEFAULT_SOFTWARE)


def policy_of(given: OptimizerPolicy | str | None, graph: OpGraph) -> OptimizerPolicy:
    """The optimizer's policy; by default AdamW in the precision of the model. Raises CostModelError."""
    if given is None:
        return training_policy(graph)
    return given if isinstance(given, OptimizerPolicy) else optimizer_policy(given)


def training_policy(graph: OpGraph) -> OptimizerPolicy:
    """AdamW in the precision of the model: with fp32 master weights where it is narrower than fp32."""
    dtype = main_dtype(graph)
    if dtype.itemsize == 8:
        return OptimizerPolicy("adamw-fp64", 8, 8, (("exp_avg", 8), ("exp_avg_sq", 8)), 8)
    return optimizer_policy("adamw-mixed" if dtype.itemsize <= 2 else "adamw-fp32")
