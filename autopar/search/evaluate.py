"""The cost of one candidate: a chain of units under a given parallelism and given cuts.

One code path for the search and for `autopar.evaluate`. Communication of the data axes follows `fully_shard`:

    ZeRO 0   gradients all_reduced over all replicas, once a step
    ZeRO 1   once a step: gradients reduce_scattered, updated parameters all_gathered; between replicas of the
    shards
             an all_reduce of the shard
    ZeRO 2   as 1, but gradients are reduce_scattered with every microbatch, or they could not stay sharded
    ZeRO 3   as 2, and instead of once a step parameters are gathered in every forward and every backward
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch

from autopar.plan import Parallelism
from autopar.pricing import Pricer, total
from autopar.search.units import Chain, ParameterShard, Unit
from costmodel import (
    Group,
    Ledger,
    OptimizerPolicy,
    StageWork,
    StepCost,
    model_state_ledger,
    peak_activation_bytes,
    step_cost,
)
from hardware_db import Cluster


def mesh_groups(parallelism: Parallelism) -> dict[str, Group]:
    """Where the ranks of each mesh axis lie; `dp` is both data axes together."""
    p = parallelism
    groups: dict[str, Group] = {}
    stride = 1
    for axis, size in (
        ("tp", p.tp),
        ("cp", p.cp),
        ("dp_shard", p.dp_shard),
        ("dp_replicate", p.dp_replicate),
        ("pp", p.pp),
    ):
        groups[axis] = Group(size, stride)
        stride *= size
    groups["dp"] = Group(p.dp, p.tp * p.cp)
    return groups


@dataclass(frozen=True)
class Stage:
    """One (virtual) pipeline stage: its units, and what it costs."""

    units: tuple[Unit, ...]
    work: StageWork
    parameters: Mapping[str, ParameterShard]
    saved_bytes: float
    partial_sum_s: float


@dataclass(frozen=True)
class Evaluated:
    """A candidate with its price. `ledgers` has one entry per pipeline rank; `excess_bytes` is above zero
    where the fullest rank does not fit."""

    parallelism: Parallelism
    stages: tuple[Stage, ...]
    step: StepCost
    ledgers: tuple[Ledger, ...]
    memory_bytes: float

    @property
    def step_s(self) -> float:
        return self.step.total_s

    @property
    def peak_memory_bytes(self) -> float:
        return max(ledger.total_bytes for ledger in self.ledgers)

    @property
    def excess_bytes(self) -> float:
        return self.peak_memory_bytes - self.memory_bytes

    @property
    def fits(self) -> bool:
        return self.excess_bytes <= 0


class Evaluator:
    """Prices candidates on one cluster for one optimizer policy."""

    def __init__(self, cluster: Cluster, policy: OptimizerPolicy) -> None:
        self.cluster = cluster
        self.policy = policy

    def evaluate(self, chain: Chain, parallelism: Parallelism, cuts: Sequence[int]) -> Evaluated:
        """The candidate's price. `cuts` are the numbers of the units that begin the stages, 0 first."""
        pricer = Pricer(self.cluster, mesh_groups(parallelism))
        bounds = zip(cuts, [*cuts[1:], len(chain.units)], strict=True)
        stages = tuple(self._stage(chain, parallelism, chain.units[a:b], pricer) for a, b in bounds)
        sends_s = [
            pricer.collective_s("send_recv", chain.units[cut].received_bytes, pricer.groups["pp"])
            for cut in cuts[1:]
        ]
        step = step_cost(
            [stage.work for stage in stages],
            parallelism.num_microbatches,
            parallelism.schedule,
            parallelism.num_virtual_stages,
            sends_s,
        )
        ledgers = self._ledgers(stages, parallelism)
        return Evaluated(
            parallelism, stages, _partial_sums_as_sync(step, stages, parallelism.pp), ledgers,
            self.cluster.device.memory_bytes,
        )  # fmt: skip

    def _stage(self, chain: Chain, p: Parallelism, units: tuple[Unit, ...], pricer: Pricer) -> Stage:
        cost = total(unit.cost for unit in units)
        parameters = {name: chain.parameters[name] for unit in units for name in unit.parameters}
        traffic = _DataTraffic.of(units, parameters, p, pricer, self.policy)
        num_elements = sum(shard.num_elements for shard in parameters.values())
        sharded = num_elements / (p.dp_shard if p.zero_stage else 1)
        update_s = pricer.work_s(0, self.policy.update_bytes * sharded, torch.float32)
        partial_bytes = sum(shard.num_bytes for shard in parameters.values() if shard.is_partial)
        partial_sum_s = pricer.bucketed_s("all_reduce", partial_bytes, pricer.groups["tp"])
        work = StageWork(
            forward_s=cost.forward_s,
            backward_s=cost.backward_s,
            recompute_s=sum(unit.recompute_s[p.recompute] for unit in units),
            forward_communication_s=cost.forward_communication_s,
            backward_communication_s=cost.backward_communication_s,
            forward_gather_s=traffic.forward_s,
            backward_gather_s=traffic.backward_s,
            gradient_sync_s=traffic.step_s,
            optimizer_s=update_s + partial_sum_s,
            num_units=max(1, sum(bool(unit.parameters) for unit in units)),
        )
        return Stage(units, work, parameters, _saved_bytes(units, p), partial_sum_s)

    def _ledgers(self, stages: Sequence[Stage], p: Parallelism) -> tuple[Ledger, ...]:
        activations = peak_activation_bytes(
            p.schedule,
            p.pp,
            p.num_microbatches,
            [stage.saved_bytes for stage in stages],
            p.num_virtual_stages,
        )
        return tuple(
            self._ledger(stages[rank :: p.pp], p) + Ledger(activations_bytes=num_bytes)
            for rank, num_bytes in enumerate(activations)
        )

    def _ledger(self, stages: Sequence[Stage], p: Parallelism) -> Ledger:
        """What a rank holds besides saved activations."""
        parameters = reduce(lambda a, b: {**a, **b}, (stage.parameters for stage in stages))
        num_elements = sum(shard.num_elements for shard in parameters.values())
        states = model_state_ledger(num_elements, self.policy, p.zero_stage, p.dp_shard)
        units = [unit for stage in stages for unit in stage.units]
        largest = max(sum(parameters[name].num_elements for name in unit.parameters) for unit in units)
        buffers = working_bytes(units, p)
        if p.zero_stage >= 2 and p.dp_shard > 1:
            buffers += self.policy.gradient_bytes * largest
        if p.zero_stage >= 3 and p.dp_shard > 1:
            buffers += 2 * self.policy.parameter_bytes * largest  # one that computes, one being gathered
        reserved = self.cluster.device.efficiency.reserved_memory_bytes
        return states + Ledger(buffers_bytes=buffers, reserved_bytes=reserved)


def working_bytes(units: Iterable[Unit], p: Parallelism) -> float:
    """The largest op's operands, results and gradients, and what recomputing one block brings back."""
    units = tuple(units)
    recomputed = max(unit.saved["none"].num_bytes - unit.saved[p.recompute].num_bytes for unit in units)
    return max(unit.working_bytes for unit in units) + max(0, recomputed)


@dataclass(frozen=True)
class _DataTraffic:
    """Seconds of communication over the data axes: with every forward, with every backward, and once a step."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    step_s: float = 0.0

    @staticmethod
    def of(
        units: Sequence[Unit],
        parameters: Mapping[str, ParameterShard],
        p: Parallelism,
        pricer: Pricer,
        policy: OptimizerPolicy,
    ) -> _DataTraffic:
        seen: set[str] = set()
        parts = []
        for unit in units:
            own = [parameters[name] for name in unit.parameters if name not in seen]
            seen.update(unit.parameters)
            parts.append(_unit_traffic(own, p, pricer, policy))
        return reduce(
            lambda a, b: _DataTraffic(
                a.forward_s + b.forward_s, a.backward_s + b.backward_s, a.step_s + b.step_s
            ),
            parts,
            _DataTraffic(),
        )


def _unit_traffic(
    own: Sequence[ParameterShard], p: Parallelism, pricer: Pricer, policy: OptimizerPolicy
) -> _DataTraffic:
    parameter_bytes = sum(shard.num_bytes for shard in own)
    gradient_bytes = policy.gradient_bytes * sum(shard.num_elements for shard in own)
    groups = pricer.groups
    context_s = pricer.collective_s("all_reduce", gradient_bytes, groups["cp"])
    if p.zero_stage == 0:
        return _DataTraffic(
            step_s=context_s + pricer.collective_s("all_reduce", gradient_bytes, groups["dp"])
        )
    gather_s = pricer.collective_s("all_gather", parameter_bytes, groups["dp_shard"])
    scatter_s = pricer.collective_s("reduce_scatter", gradient_bytes, groups["dp_shard"])
    replicas_s = pricer.collective_s("all_reduce", gradient_bytes / p.dp_shard, groups["dp_replicate"])
    step_s = context_s + replicas_s + scatter_s
    if p.zero_stage == 1:
        return _DataTraffic(step_s=step_s + gather_s)
    # The last microbatch's reduce_scatter is part of the step's; the others run behind their own backward.
    earlier_s = scatter_s * (p.num_microbatches - 1) / p.num_microbatches
    if p.zero_stage == 2:
        return _DataTraffic(backward_s=earlier_s, step_s=step_s + gather_s)
    return _DataTraffic(gather_s, gather_s + earlier_s, step_s)


def _saved_bytes(units: Sequence[Unit], p: Parallelism) -> float:
    """What a stage keeps of one microbatch; a storage that several units save counts once."""
    storages: dict[str, int] = {}
    internal_bytes = 0
    for unit in units:
        saved = unit.saved[p.recompute]
        storages.update(saved.storages)
        internal_bytes += saved.internal_bytes
    return sum(storages.values()) + internal_bytes


def _partial_sums_as_sync(step: StepCost, stages: Sequence[Stage], num_ranks: int) -> StepCost:
    """Sums of partial gradients over `tp` run after the backward, like the optimizer, but are
    synchronisation."""
    moved_s = reduce(add, (stage.partial_sum_s for stage in stages[step.bottleneck_rank :: num_ranks]), 0.0)
    terms = dict(step.terms)
    terms["optimizer"] -= moved_s
    terms["gradient_sync"] += moved_s
    return replace(step, terms=terms)
