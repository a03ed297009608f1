"""The cost of one candidate: a chain of units under a given parallelism and given cuts.

One code path for the search and for `autopar.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar.plan import Parallelism
from autopar.pricing import Pricer, total
from autopar.search.data_axes import data_traffic, held_states, mesh_groups, updated_elements
from autopar.search.units import Chain, ParameterShard, Unit
from costmodel import Ledger, OptimizerPolicy, StageWork, StepCost, peak_activation_bytes, step_cost
from hardware_db import Cluster


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
        traffic = data_traffic(units, parameters, p, pricer, self.policy)
        updated = updated_elements(parameters.values(), p)
        update_s = pricer.work_s(0, self.policy.update_bytes * updated, torch.float32)
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
        parameters = {name: shard for stage in stages for name, shard in stage.parameters.items()}
        units = [unit for stage in stages for unit in stage.units]
        largest = max(sum(parameters[name].num_elements for name in unit.parameters) for unit in units)
        buffers = working_bytes(units, p)
        if p.zero_stage >= 2 and p.dp_shard > 1:
            buffers += self.policy.gradient_bytes * largest
        if p.zero_stage >= 3 and p.dp_shard > 1:
            buffers += 2 * self.policy.parameter_bytes * largest  # one that computes, one being gathered
        reserved = self.cluster.device.efficiency.reserved_memory_bytes
        return held_states(parameters.values(), p, self.policy) + Ledger(
            buffers_bytes=buffers, reserved_bytes=reserved
        )


def working_bytes(units: Iterable[Unit], p: Parallelism) -> float:
    """The largest op's operands, results and gradients, and what recomputing one block brings back."""
    units = tuple(units)
    recomputed = max(unit.saved["none"].num_bytes - unit.saved[p.recompute].num_bytes for unit in units)
    return max(unit.working_bytes for unit in units) + max(0, recomputed)


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
    moved_s = sum(stage.partial_sum_s for stage in stages[step.bottleneck_rank :: num_ranks])
    terms = dict(step.terms)
    terms["optimizer"] -= moved_s
    terms["gradient_sync"] += moved_s
    return replace(step, terms=terms)
