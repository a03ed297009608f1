"""The cost of one candidate: a chain of units under a given parallelism and given cuts.

One code path for the search and for `autopar.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar.plan import Parallelism
from autopar.pricing import Pricer, total
from autopar.search.data_axes import data_traffic, mesh_groups, updated_elements
from autopar.search.ledger import rank_ledgers
from autopar.search.units import Chain, ParameterShard, Unit
from costmodel import Ledger, OptimizerPolicy, Overlap, Software, StageWork, StepCost, step_cost
from costmodel.orders import rank_stages
from hardware_db import Cluster


@dataclass(frozen=True)
class Stage:
    """One (virtual) pipeline stage: its units, and what it costs."""

    units: tuple[Unit, ...]
    work: StageWork
    parameters: Mapping[str, ParameterShard]
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
    """Prices candidates on one cluster for one optimizer policy and one era of software.

    A stage is priced once for all candidates that run it under equal data axes: of a deep model's stages few
    differ, and a sweep meets the same ones again and again.
    """

    def __init__(self, cluster: Cluster, policy: OptimizerPolicy, era: Software | None = None) -> None:
        self.cluster = cluster
        self.policy = policy
        self.pricer = Pricer(cluster, {}, era)
        self.era = self.pricer.era
        self.overlap = Overlap(
            self.era.gradient_sync_overlap, self.era.parameter_gather_overlap, self.era.contention
        )
        self._stages: dict[object, Stage] = {}

    def evaluate(self, chain: Chain, parallelism: Parallelism, cuts: Sequence[int]) -> Evaluated:
        """The candidate's price. `cuts` are the numbers of the units that begin the stages, 0 first."""
        pricer = self.placed(parallelism)
        bounds = zip(cuts, [*cuts[1:], len(chain.units)], strict=True)
        stages = tuple(self._stage(chain, parallelism, chain.units[a:b], pricer) for a, b in bounds)
        sends_s = [self._message_s(chain.units[cut].received_bytes, parallelism, pricer) for cut in cuts[1:]]
        step = step_cost(
            [stage.work for stage in stages],
            parallelism.num_microbatches,
            parallelism.schedule,
            parallelism.num_virtual_stages,
            sends_s,
            self.overlap,
            blocking_sends=self.era.blocking_sends,
            overhead_s=self.era.step_overhead_s,
        )
        ledgers = rank_ledgers(chain, cuts, parallelism, self.policy, self.cluster.device)
        return Evaluated(
            parallelism, stages, _partial_sums_as_sync(step, stages, parallelism), ledgers,
            self.cluster.device.memory_bytes,
        )  # fmt: skip

    def placed(self, parallelism: Parallelism) -> Pricer:
        """The pricer for the mesh of a parallelism."""
        return Pricer(self.cluster, mesh_groups(parallelism), like=self.pricer)

    def _message_s(self, num_bytes: float, p: Parallelism, pricer: Pricer) -> float:
        """What passes from a stage to the next; without sequence parallelism all of a tensor axis have it."""
        if p.tp == 1 or p.sequence_parallel is not False or not self.era.scattered_messages:
            return pricer.collective_s("send_recv", num_bytes, pricer.groups["pp"])
        part_s = pricer.collective_s("send_recv", num_bytes / p.tp, pricer.groups["pp"])
        return part_s + pricer.collective_s("all_gather", num_bytes, pricer.groups["tp"])

    def _stage(self, chain: Chain, p: Parallelism, units: tuple[Unit, ...], pricer: Pricer) -> Stage:
        # The units stay alive in the stage that is kept, so no other can take their identity.
        kernels = tuple(id(unit.kernels) for unit in units)
        own_microbatches = p.num_microbatches if p.zero_stage >= 2 else p.num_microbatches > 1
        key = (kernels, p.recompute, p.zero_stage, p.dp_shard, p.dp_replicate, p.cp, p.ep, own_microbatches)
        stage = self._stages.get(key)
        if stage is None:
            stage = self._stages[key] = self._priced_stage(chain, p, units, pricer)
        return stage

    def _priced_stage(self, chain: Chain, p: Parallelism, units: tuple[Unit, ...], pricer: Pricer) -> Stage:
        cost = total(unit.cost for unit in units)
        parameters = {name: chain.parameters[name] for unit in units for name in unit.parameters}
        traffic = data_traffic(units, parameters, p, pricer, self.policy)
        updated = updated_elements(parameters.values(), p)
        update_s = pricer.work_s(0, self.policy.update_bytes * updated, torch.float32)
        partial_bytes = sum(shard.num_bytes for shard in parameters.values() if shard.is_partial)
        partial_sum_s = pricer.bucketed_s("all_reduce", partial_bytes, pricer.groups["tp"])
        exposed = 1 - self.era.tensor_parallel_overlap
        work = StageWork(
            forward_s=cost.forward_s,
            backward_s=cost.backward_s + self._accumulation_s(parameters.values(), p, pricer),
            recompute_s=sum(unit.recompute_s[p.recompute] for unit in units),
            forward_communication_s=exposed * cost.forward_communication_s,
            backward_communication_s=exposed * cost.backward_communication_s,
            forward_gather_s=traffic.forward_s,
            backward_gather_s=traffic.backward_s,
            gradient_sync_s=traffic.step_s,
            optimizer_s=update_s + partial_sum_s,
            num_units=max(1, sum(bool(unit.parameters) for unit in units)),
            weight_s=cost.weight_s,
        )
        return Stage(units, work, parameters, partial_sum_s)

    def _accumulation_s(self, shards: Iterable[ParameterShard], p: Parallelism, pricer: Pricer) -> float:
        """Adding a microbatch's gradients to those before, where the products that make them do not."""
        if self.era.fused_gradient_accumulation or p.num_microbatches == 1:
            return 0.0
        held = sum(shard.num_elements for shard in shards) / (p.dp_shard if p.zero_stage >= 2 else 1)
        per_element = self.policy.parameter_bytes + 2 * self.policy.gradient_bytes
        return pricer.work_s(0, per_element * held, torch.float32)


def _partial_sums_as_sync(step: StepCost, stages: Sequence[Stage], p: Parallelism) -> StepCost:
    """Sums of partial gradients over `tp` run after the backward, like the optimizer, but are
    synchronisation."""
    mine = rank_stages(p.schedule, step.bottleneck_rank, p.pp, p.num_virtual_stages)
    moved_s = sum(stages[index].partial_sum_s for index in mine)
    terms = dict(step.terms)
    terms["optimizer"] -= moved_s
    terms["gradient_sync"] += moved_s
    return replace(step, terms=terms)
