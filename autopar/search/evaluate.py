"""The cost of one candidate: a chain of units under a given parallelism and given cuts.

One code path for the search and for `autopar.evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from autopar.errors import InvalidParallelismError
from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.data_axes import (
    accumulation_s,
    data_groups,
    data_traffic,
    host_excess_bytes,
    mesh_groups,
    optimizer_s,
)
from autopar.search.ledger import rank_ledgers
from autopar.search.pieces import Choices, Piece, Pieces
from autopar.search.recent import Recent
from autopar.search.saved import MODES
from autopar.search.units import Chain, Unit
from costmodel import Ledger, OptimizerPolicy, Overlap, Software, StageWork, StepCost, step_cost
from costmodel.orders import rank_stages
from hardware_db import Cluster

MOST_CHAINS = 64
"""The chains whose pieces are known at a time, with what these cost: each takes about a megabyte of a large
model."""


@dataclass(frozen=True)
class Evaluated:
    """A candidate with its price. `cuts` are the numbers of the units of the chain that begin the (virtual)
    stages, 0 first, `choices` the name of what each unit keeps, and `stages` what they cost; `ledgers` has
    one entry per pipeline rank; `excess_bytes` is above zero where the fullest rank does not fit, its device
    or, with offloaded states, its part of the host's memory (`host_excess_bytes`)."""

    parallelism: Parallelism
    chain: Chain
    cuts: tuple[int, ...]
    choices: tuple[str, ...]
    stages: tuple[StageWork, ...]
    step: StepCost
    ledgers: tuple[Ledger, ...]
    memory_bytes: float
    host_excess_bytes: float = -inf

    @property
    def step_s(self) -> float:
        return self.step.total_s

    @property
    def peak_memory_bytes(self) -> float:
        return max(ledger.total_bytes for ledger in self.ledgers)

    @property
    def excess_bytes(self) -> float:
        return max(self.peak_memory_bytes - self.memory_bytes, self.host_excess_bytes)

    @property
    def fits(self) -> bool:
        return self.excess_bytes <= 0

    def units(self, stage: int) -> tuple[Unit, ...]:
        """What one of the stages is made of."""
        ends = (*self.cuts, len(self.chain.units))
        return self.chain.units[ends[stage] : ends[stage + 1]]


class Evaluator:
    """Prices candidates on one cluster for one optimizer policy and one era of software.

    Whatever candidates have in common is worked out once: prices of a chain's kernels and, as long as it is
    one of the last `MOST_CHAINS`, the stages that it is cut into (`autopar.search.pieces`), and what these
    cost under equal data axes.
    """

    def __init__(self, cluster: Cluster, policy: OptimizerPolicy, era: Software | None = None) -> None:
        self.cluster = cluster
        self.policy = policy
        self.pricer = Pricer(cluster, {}, era)
        self.era = self.pricer.era
        self.overlap = Overlap(
            self.era.gradient_sync_overlap, self.era.parameter_gather_overlap, self.era.contention
        )
        # By the identity of chains, which are kept alive with what was made of them.
        self._priced: dict[tuple[object, ...], tuple[Chain, Chain]] = {}
        self._pieces = Recent(Pieces, MOST_CHAINS)

    def placed(self, p: Parallelism) -> Pricer:
        """The pricer for the mesh of a parallelism."""
        return Pricer(self.cluster, mesh_groups(p), like=self.pricer)

    def priced(self, chain: Chain, p: Parallelism) -> Chain:
        """The chain with its prices on the mesh of a parallelism."""
        pricer = self.placed(p)
        key = (id(chain), *(pricer.groups[axis] for axis in ("tp", "cp", "ep")))
        if key not in self._priced:
            self._priced[key] = chain, chain.priced(pricer)
        return self._priced[key][1]

    def evaluate(
        self, chain: Chain, p: Parallelism, cuts: Sequence[int], choices: Sequence[str] | None = None
    ) -> Evaluated:
        """The candidate's price. The `chain` has prices; `cuts` and `choices` as in `Evaluated`.

        Without `choices` all blocks follow the parallelism's mode, and with them that is set to what they
        come to. Raises InvalidParallelismError for "mixed" without choices.
        """
        cuts = tuple(cuts)
        pricer = self.placed(p)
        pieces = self._pieces.of(chain)
        p, chosen = _chosen(pieces, p, choices)
        cut = pieces.cut(cuts)
        parts = tuple(zip(cut, pieces.choices(cuts, chosen), strict=True))
        works = {part: self._work(*part, p, pricer) for part in dict.fromkeys(parts)}
        stages = tuple(works[part] for part in parts)
        step = self.step(stages, chain, p, cuts)
        device = self.cluster.device
        ledgers = rank_ledgers(pieces, cuts, p, self.policy, device, chosen)
        names = pieces.names(chosen)
        states = (
            pieces.parameters(cuts, rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages)).elements
            for rank in range(p.pp)
        )
        excess_bytes = host_excess_bytes(states, p, self.policy, self.cluster)
        return Evaluated(p, chain, cuts, names, stages, step, ledgers, device.memory_bytes, excess_bytes)

    def fits_with(self, evaluated: Evaluated, choices: Sequence[str]) -> bool:
        """Whether a candidate that fits does so with other choices, which are not priced."""
        pieces, p = self._pieces.of(evaluated.chain), evaluated.parallelism
        chosen = pieces.shortest(tuple(choices))
        ledgers = rank_ledgers(pieces, evaluated.cuts, p, self.policy, self.cluster.device, chosen)
        return all(ledger.total_bytes <= evaluated.memory_bytes for ledger in ledgers)

    def step(
        self, stages: Sequence[StageWork], chain: Chain, p: Parallelism, cuts: Sequence[int]
    ) -> StepCost:
        """The cost of a step over stages of a chain, with the messages between them."""
        messages_s = self.messages_s(chain, p)
        return step_cost(
            stages,
            p.num_microbatches,
            p.schedule,
            p.num_virtual_stages,
            [messages_s[first] for first in cuts[1:]],
            self.overlap,
            blocking_sends=self.era.blocking_sends,
            overhead_s=self.era.step_overhead_s,
        )

    def messages_s(self, chain: Chain, p: Parallelism) -> list[float]:
        """The messages with which each unit would begin a stage."""
        pricer = self.placed(p)
        received = [unit.received_bytes for unit in chain.units]
        known = {num_bytes: self._message_s(num_bytes, p, pricer) for num_bytes in set(received)}
        return [known[num_bytes] for num_bytes in received]

    def _message_s(self, num_bytes: float, p: Parallelism, pricer: Pricer) -> float:
        """What passes from a stage to the next; without sequence parallelism all of a tensor axis have it."""
        if p.tp == 1 or p.sequence_parallel is not False or not self.era.scattered_messages:
            return pricer.collective_s("send_recv", num_bytes, pricer.groups["pp"])
        part_s = pricer.collective_s("send_recv", num_bytes / p.tp, pricer.groups["pp"])
        return part_s + pricer.collective_s("all_gather", num_bytes, pricer.groups["tp"])

    def _work(self, piece: Piece, choices: Choices, p: Parallelism, pricer: Pricer) -> StageWork:
        own_microbatches = p.num_microbatches if p.zero_stage >= 2 else p.num_microbatches > 1
        mesh = (pricer.groups["tp"], data_groups(p), data_groups(p, experts=True))
        key = (choices, own_microbatches, mesh, p.zero_stage, p.offload)
        if key not in piece.works:
            piece.works[key] = self._priced_work(piece, choices, p, pricer)
        return piece.works[key]

    def _priced_work(self, piece: Piece, choices: Choices, p: Parallelism, pricer: Pricer) -> StageWork:
        traffic = data_traffic(piece.buckets, p, pricer, self.policy)
        cost, exposed = piece.cost, self.era.tensor_parallel_exposed
        backward_s = cost.backward_s + accumulation_s(piece.elements, p, self.policy, pricer)
        return StageWork(
            forward_s=cost.forward_s,
            backward_s=backward_s,
            recompute_s=piece.recompute_s(choices),
            forward_communication_s=exposed * cost.forward_communication_s,
            backward_communication_s=exposed * cost.backward_communication_s,
            forward_gather_s=traffic.forward_s,
            backward_gather_s=traffic.backward_s,
            gradient_sync_s=traffic.step_s,
            partial_sum_s=pricer.bucketed_s("all_reduce", piece.partial_bytes, pricer.groups["tp"]),
            optimizer_s=optimizer_s(piece.elements, p, self.policy, pricer, backward_s),
            num_units=piece.num_sharding_units,
            weight_s=cost.weight_s,
        )


def _chosen(pieces: Pieces, p: Parallelism, choices: Sequence[str] | None) -> tuple[Parallelism, Choices]:
    """What units keep, and the parallelism with the mode that this comes to."""
    if choices is not None:
        found = pieces.shortest(tuple(choices), p.recompute)
        mode = found if isinstance(found, str) else "mixed"
        return p if p.recompute == mode else p.model_copy(update={"recompute": mode}), found
    if p.recompute == "mixed":
        raise InvalidParallelismError(
            "recompute='mixed' does not say what each block keeps; give one mode for all blocks: "
            f"{', '.join(MODES)}"
        )
    return p, p.recompute
