"""Where a plan runs: the axes of its mesh, who communicates along each, and its pools of devices."""

from __future__ import annotations

from collections.abc import Iterable

from autopar.plan import Plan
from autopar.ranks import RankGroups
from autopar.report.values import Axis, Pool, Ranks
from costmodel import OptimizerPolicy


def axes(plan: Plan) -> tuple[Axis, ...]:
    """The axes of the mesh, outermost first; none of a pipeline through pools, whose meshes differ."""
    if plan.pools:
        return ()
    p = plan.parallelism
    zero = {
        0: "every replica holds the whole training state",
        1: "ZeRO-1: optimizer states sharded",
        2: "ZeRO-2: optimizer states and gradients sharded",
        3: "ZeRO-3: parameters, gradients and optimizer states sharded",
    }[p.zero_stage]
    meanings = {
        "pp": f"pipeline of {p.pp * p.num_virtual_stages} stages, schedule {p.schedule}",
        "dp_replicate": "data-parallel replicas",
        "dp_shard": f"data-parallel replicas; {zero}",
        "cp": "context parallel: the sequence is split, keys and values are gathered",
        "tp": "tensor and sequence parallel, op by op as listed below",
    }
    found = []
    stride = p.world_size
    for name, size in p.mesh.items():
        stride //= size
        found.append(Axis(name, size, stride, stride * size <= plan.cluster.devices_per_node, meanings[name]))
    return tuple(found)


def pools(plan: Plan) -> tuple[Pool, ...]:
    """The legs of a pipeline through pools, in its order."""
    return tuple(
        Pool(
            pool.cluster.id,
            pool.cluster.device,
            pool.cluster.num_devices,
            pool.collective_library,
            pool.first_rank,
            pool.first_stage,
            pool.parallelism.pp,
            str(pool.parallelism),
            ranks(pool.rank_groups),
        )
        for pool in plan.pools
    )


def ranks(groups: Iterable[RankGroups]) -> tuple[Ranks, ...]:
    """Who communicates, along each axis and on each level of links."""
    return tuple(
        Ranks(
            each.axis,
            each.size,
            each.stride,
            each.num_groups,
            each.members,
            each.starts,
            each.first,
            each.met_on,
        )
        for each in groups
    )


def settings(plan: Plan) -> tuple[tuple[str, str], ...]:
    """What the mesh does not say, each with its name."""
    p = plan.parallelism
    found = [
        ("microbatches", f"{p.num_microbatches} of {p.microbatch_size} samples on each of {p.dp} replicas"),
        ("recompute", p.recompute),
        ("ZeRO stage", str(p.zero_stage)),
        ("training", _training(plan.policy)),
        ("software", plan.prediction.software),
    ]
    if plan.low_precision is not None:
        found.append(("products in blocks", f"priced in {plan.low_precision}"))
    if p.ep > 1:
        found.append(("experts", f"divided over {p.ep} of the data-parallel ranks"))
    return tuple(found)


def _training(policy: OptimizerPolicy) -> str:
    """What a policy keeps of a parameter."""
    kept = policy.parameter_bytes + policy.gradient_bytes + policy.optimizer_bytes
    return (
        f"{policy.name}: {kept:g} bytes a parameter, {policy.gradient_bytes:g} of them for its gradient, "
        f"{policy.optimizer_bytes:g} for the optimizer"
    )
