"""What the data axes do to parameters: where they are sharded, and what moves for it.

Communication follows `fully_shard`:

    ZeRO 0   gradients all_reduced over all replicas, once a step
    ZeRO 1   once a step: gradients reduce_scattered, updated parameters all_gathered; between replicas of the
             shards an all_reduce of the shard
    ZeRO 2   as 1, but gradients are reduce_scattered with every microbatch, or they could not stay sharded
    ZeRO 3   as 2, and instead of once a step parameters are gathered in every forward and every backward

Ranks of a context axis compute gradients of the same parameters from other tokens, so they are replicas too,
and ZeRO shards over them as well (as Megatron-LM's distributed optimizer and torchtitan's FSDP do). Experts
that are dealt out over `ep` ranks live on the data axes that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd
from operator import add

from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.pieces import Bucket, Elements
from costmodel import Group, Ledger, OptimizerPolicy, model_state_ledger


def mesh_groups(p: Parallelism) -> dict[str, Group]:
    """Where the ranks of each mesh axis lie: row-major over `(pp, dp_replicate, dp_shard, cp, tp)`."""
    groups: dict[str, Group] = {}
    stride = 1
    sizes = {"tp": p.tp, "cp": p.cp, "dp_shard": p.dp_shard, "dp_replicate": p.dp_replicate, "pp": p.pp}
    for axis, size in sizes.items():
        groups[axis] = Group(size, stride)
        stride *= size
    return groups | {"ep": Group(p.ep, p.tp * p.cp)}


def data_groups(p: Parallelism, *, experts: bool = False) -> tuple[Group, Group]:
    """The ranks that shard a parameter under ZeRO, and those that have the same shard."""
    sharding = p.dp_shard * p.cp if p.zero_stage else 1
    replicas = p.dp * p.cp // sharding
    inside = gcd(sharding, p.ep) if experts else 1
    outside = max(1, p.ep // inside) if experts else 1
    shard = Group(sharding // inside, p.tp * inside)
    return shard, Group(max(1, replicas // outside), p.tp * sharding * outside)


def held_states(elements: Elements, p: Parallelism, policy: OptimizerPolicy) -> Ledger:
    """Parameters, gradients and optimizer states of one rank."""
    ledgers = [
        model_state_ledger(num_elements, policy, p.zero_stage, data_groups(p, experts=experts)[0].size)
        for experts, num_elements in elements.items()
    ]
    return reduce(add, ledgers)


def updated_elements(elements: Elements, p: Parallelism) -> float:
    """How many parameters one rank's optimizer updates."""
    return sum(
        num_elements / (data_groups(p, experts=experts)[0].size if p.zero_stage else 1)
        for experts, num_elements in elements.items()
    )


@dataclass(frozen=True, slots=True)
class DataTraffic:
    """Seconds of communication over the data and context axes: with every forward, with every backward, and
    once a step."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    step_s: float = 0.0


def data_traffic(
    buckets: Mapping[Bucket, int], p: Parallelism, pricer: Pricer, policy: OptimizerPolicy
) -> DataTraffic:
    """What a stage's parameters move, a collective for each bucket."""
    forward_s = backward_s = step_s = 0.0
    for bucket, count in buckets.items():
        one = _bucket_traffic(bucket, p, pricer, policy)
        forward_s += count * one.forward_s
        backward_s += count * one.backward_s
        step_s += count * one.step_s
    return DataTraffic(forward_s, backward_s, step_s)


def _bucket_traffic(bucket: Bucket, p: Parallelism, pricer: Pricer, policy: OptimizerPolicy) -> DataTraffic:
    shard, replicate = data_groups(p, experts=bucket.is_expert)
    gradient_bytes = policy.gradient_bytes * bucket.num_elements
    gather_s = pricer.collective_s("all_gather", bucket.num_bytes, shard)
    scatter_s = pricer.collective_s("reduce_scatter", gradient_bytes, shard)
    step_s = scatter_s + pricer.collective_s("all_reduce", gradient_bytes / shard.size, replicate)
    if p.zero_stage <= 1:
        return DataTraffic(step_s=step_s + gather_s)
    # The last microbatch's reduce_scatter is part of the step's; the others run behind their own backward.
    earlier_s = scatter_s * (p.num_microbatches - 1) / p.num_microbatches
    if p.zero_stage == 2:
        return DataTraffic(backward_s=earlier_s, step_s=step_s + gather_s)
    return DataTraffic(gather_s, gather_s + earlier_s, step_s)
