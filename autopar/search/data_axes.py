"""What the data axes do to parameters: where they are sharded, and what moves for it.

Communication follows `fully_shard`:

    ZeRO 0   gradients all_reduced over all replicas, once a step
    ZeRO 1   once a step: gradients reduce_scattered, updated parameters all_gathered; between replicas of the
             shards an all_reduce of the shard
    ZeRO 2   as 1, but gradients are reduce_scattered with every microbatch, or they could not stay sharded
    ZeRO 3   as 2, and instead of once a step parameters are gathered in every forward and every backward

Ranks of a context axis compute gradients of the same parameters from other tokens, so they are replicas too,
and ZeRO shards over them as well (as Megatron-LM's distributed optimizer and torchtitan's FSDP do). Experts
are dealt out over `ep` neighbours of `dp_shard`, then of `dp_replicate` and, where that does not suffice, of
`cp` and `tp` (as Megatron-LM folds them); what is left of these axes shards and replicates each expert.

Groups are where `Parallelism.axis_order` puts them. With offloaded states the update is the host's
(`costmodel.offload`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd, inf
from operator import add

import torch

from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.pieces import Bucket, Elements
from costmodel import (
    Group,
    Ledger,
    OptimizerPolicy,
    check_host,
    host_bytes_per_parameter,
    model_state_ledger,
    offloaded_update,
    on_device,
)
from hardware_db import Cluster

EXPERT_AXES = ("dp_shard", "dp_replicate", "cp", "tp")
"""Axes whose ranks divide experts among them, in the order in which they are taken."""

_MANY = 1e12
"""More parameters than a rank has."""


def strides(p: Parallelism) -> dict[str, int]:
    """How far neighbours along each mesh axis lie apart: row-major in `axis_order`."""
    found, stride = {}, 1
    for axis in reversed(p.axis_order):
        found[axis] = stride
        stride *= getattr(p, axis)
    return found


def mesh_groups(p: Parallelism) -> dict[str, Group]:
    """Where the ranks of each mesh axis lie, those of both data axes together (`dp`), and those that divide
    the experts among them (`ep`)."""
    steps = strides(p)
    groups = {axis: Group.of((getattr(p, axis), stride)) for axis, stride in steps.items()}
    both = Group.of(*((getattr(p, axis), steps[axis]) for axis in ("dp_shard", "dp_replicate")))
    experts = Group.of(*((share, steps[axis]) for axis, share in expert_shares(p).items()))
    return groups | {"dp": both, "ep": experts}


def expert_shares(p: Parallelism) -> dict[str, int]:
    """How many neighbours along each axis divide the experts among them; the product is `ep`."""
    shares, rest = {}, p.ep
    for axis in EXPERT_AXES:
        shares[axis] = gcd(getattr(p, axis), rest)
        rest //= shares[axis]
    return shares


def data_groups(p: Parallelism, *, experts: bool = False) -> tuple[Group, Group]:
    """The ranks that shard a parameter under ZeRO, and those that have the same shard."""
    steps, shares = strides(p), expert_shares(p) if experts else {}
    left = {
        axis: (getattr(p, axis) // shares.get(axis, 1), steps[axis] * shares.get(axis, 1))
        for axis in ("dp_replicate", "dp_shard", "cp")
    }
    sharding = [left.pop("dp_shard"), left.pop("cp")] if p.zero_stage else []
    return Group.of(*sharding), Group.of(*left.values())


def sharding_degree(p: Parallelism, *, experts: bool = False) -> int:
    """How many ranks shard a parameter under ZeRO: the size of the first of `data_groups`."""
    if not p.zero_stage:
        return 1
    shares = expert_shares(p) if experts and p.ep > 1 else {}
    return p.dp_shard * p.cp // (shares.get("dp_shard", 1) * shares.get("cp", 1))


def device_policy(p: Parallelism, policy: OptimizerPolicy) -> OptimizerPolicy:
    """What of the policy's states is on the device."""
    return on_device(policy) if p.offload == "optimizer" else policy


def held_states(elements: Elements, p: Parallelism, policy: OptimizerPolicy) -> Ledger:
    """Parameters, gradients and optimizer states of one rank, on its device."""
    here = device_policy(p, policy)
    ledgers = [
        model_state_ledger(num_elements, here, p.zero_stage, sharding_degree(p, experts=experts))
        for experts, num_elements in elements.items()
    ]
    return reduce(add, ledgers)


def host_excess_bytes(
    ranks: Iterable[Elements], p: Parallelism, policy: OptimizerPolicy, cluster: Cluster
) -> float:
    """By how much offloaded states of the fullest of the `ranks` exceed a device's part of its host's memory;
    minus infinity where nothing is offloaded.

    Raises CostModelError where nothing is known of the host.
    """
    if p.offload == "none":
        return -inf
    per_parameter = host_bytes_per_parameter(policy)
    held_bytes = max(per_parameter * updated_elements(elements, p) for elements in ranks)
    return held_bytes - check_host(cluster).memory_bytes


def updated_elements(elements: Elements, p: Parallelism) -> float:
    """How many parameters one rank updates."""
    return sum(
        num_elements / sharding_degree(p, experts=experts) for experts, num_elements in elements.items()
    )


def optimizer_s(
    elements: Elements, p: Parallelism, policy: OptimizerPolicy, pricer: Pricer, backward_s: float
) -> float:
    """Seconds that a rank's update takes at the end of a step.

    Offloaded, gradients go to the host behind the last microbatch's backward, which takes `backward_s`, as
    far as the software hides gradient synchronisation there. Raises CostModelError where nothing is known of
    the host.
    """
    num_updated = updated_elements(elements, p)
    if p.offload == "none":
        return pricer.work_s(0, policy.update_bytes * num_updated, torch.float32)
    update = offloaded_update(num_updated, policy, pricer.cluster)
    return update.exposed_s(pricer.era.gradient_sync_overlap * backward_s)


def least_update_s(p: Parallelism, policy: OptimizerPolicy, pricer: Pricer) -> float:
    """What `optimizer_s` is at least for each parameter that a rank updates: launching costs nothing, and
    gradients that go to the host hide altogether."""
    if p.offload == "none":
        return pricer.work_s(0, policy.update_bytes * _MANY, torch.float32) / _MANY
    return offloaded_update(1.0, policy, pricer.cluster).exposed_s(inf)


def accumulation_s(elements: Elements, p: Parallelism, policy: OptimizerPolicy, pricer: Pricer) -> float:
    """Seconds in which a rank adds a microbatch's gradients to those before, where the products that make
    them do not."""
    if pricer.era.fused_gradient_accumulation or p.num_microbatches == 1:
        return 0.0
    held = sum(elements.values()) / (p.dp_shard if p.zero_stage >= 2 else 1)
    per_element = policy.parameter_bytes + 2 * policy.gradient_bytes
    return pricer.work_s(0, per_element * held, torch.float32)


def least_accumulation_s(p: Parallelism, policy: OptimizerPolicy, pricer: Pricer) -> float:
    """What `accumulation_s` is at least for each parameter of a rank."""
    return accumulation_s({False: int(_MANY)}, p, policy, pricer) / _MANY


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
