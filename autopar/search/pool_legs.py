"""What a leg runs, and what crosses from one leg to the next.

Programs, stage sums and strategies are those of the planner of the leg's pool. From the last stage of one leg
to the first of the next goes what a microbatch brings along, and in the backward its gradient: each sample
once over the link, whatever the degrees on both sides. The nodes of a stage share its samples, so the stage
with fewer nodes limits the rate. Ranks of a tensor axis that all want the whole gather it inside their pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluator
from autopar.search.ledger import rank_ledgers
from autopar.search.local_programs import Program
from autopar.search.planner import Planner
from autopar.search.pool_routes import Leg, Route, leg_ways
from autopar.search.runs import Array
from autopar.search.stage_table import StageTable
from autopar.search.units import Chain
from costmodel import Ledger, StageWork
from hardware_db import Pools


class LegEvaluator(Evaluator):
    """Prices some of the stages of a pipeline that goes on elsewhere."""

    def leg(
        self,
        chain: Chain,
        p: Parallelism,
        cuts: tuple[int, ...],
        first_stage: int,
        names: tuple[str, ...],
    ) -> tuple[tuple[StageWork, ...], tuple[Ledger, ...], list[float]]:
        """Work and ledgers of the `p.pp` stages from `first_stage` on, and seconds of the messages between
        them. `cuts` are those of the whole pipeline, and `names` say what each unit of the chain keeps."""
        pieces = self._pieces.of(chain)
        choices = pieces.shortest(names)
        own = slice(first_stage, first_stage + p.pp)
        pricer = self.placed(p)
        parts = list(zip(pieces.cut(cuts), pieces.choices(cuts, choices), strict=True))[own]
        stages = tuple(self._work(piece, chosen, p, pricer) for piece, chosen in parts)
        whole = p.model_copy(update={"pp": len(cuts)})
        ledgers = rank_ledgers(pieces, cuts, whole, self.policy, self.cluster.device, choices)[own]
        received = [chain.units[cut].received_bytes for cut in cuts[own][1:]]
        return stages, ledgers, [self._message_s(num_bytes, p, pricer) for num_bytes in received]


class Legs:
    """Programs and messages of the legs of routes through `pools`, with one planner for each pool."""

    def __init__(self, planners: Sequence[Planner], pools: Pools) -> None:
        self.planners = tuple(planners)
        self.pools = pools
        self.effort = self.planners[0].effort
        self.evaluators = tuple(LegEvaluator(p.cluster, p.policy, p.evaluator.era) for p in planners)
        self._ways: dict[Leg, tuple[Parallelism, ...]] = {}

    def ways(self, leg: Leg) -> tuple[Parallelism, ...]:
        """The ways to shard a leg over its data axes: over none, the fewest or the most replicas."""
        if leg not in self._ways:
            self._ways[leg] = leg_ways(self.planners[leg.pool], leg.layout)
        return self._ways[leg]

    def program(self, leg: Leg, price: int) -> Program:
        """The program of a leg at one of the prices of memory."""
        p = self._any_way(leg)
        return self.planners[leg.pool].programs.program(p, price if p.tp > 1 else 0)

    def table(self, leg: Leg, price: int) -> StageTable:
        """The sums of a leg's program."""
        return self.planners[leg.pool].layer.table(self.program(leg, price))

    def _any_way(self, leg: Leg) -> Parallelism:
        return self.ways(leg)[0]

    def sends_s(self, route: Route, number: int, price: int) -> Array:
        """Seconds of the message with which leg `number` begins, for each unit that it may begin with; the
        first leg receives none."""
        crossing_s = self.crossing_s(route, number)
        if not number:
            return crossing_s
        sides = (self._gathering_s(leg, price) for leg in route.legs[number - 1 : number + 1])
        sends_s: Array = crossing_s + np.maximum(*sides)
        return sends_s

    def crossing_s(self, route: Route, number: int) -> Array:
        """What of that the link takes."""
        if not number:
            return np.zeros_like(self._boundary_bytes)
        before, after = route.legs[number - 1 : number + 1]
        samples = after.layout.microbatch_size * after.layout.dp
        num_nodes = min(map(self._stage_nodes, (before, after)))
        bytes_per_s = self.pools.link_bytes_per_s * num_nodes
        crossing_s: Array = self.pools.link_latency_s + samples * self._boundary_bytes / bytes_per_s
        return crossing_s

    @cached_property
    def _boundary_bytes(self) -> Array:
        """What a sample brings into each unit."""
        units = self.planners[0].programs.program(Parallelism()).chain.units
        return np.array([float(unit.received_bytes) for unit in units])

    def _stage_nodes(self, leg: Leg) -> float:
        """Nodes of one stage of a leg, or its part of one."""
        cluster = self.pools.pools[leg.pool]
        return cluster.num_devices / leg.layout.pp / cluster.devices_per_node

    def _gathering_s(self, leg: Leg, price: int) -> Array:
        """Gathering on the tensor axis, at each unit before which all its ranks have the whole."""
        local = np.array([float(unit.received_bytes) for unit in self.table(leg, price).chain.units])
        whole = leg.layout.microbatch_size / leg.layout.cp * self._boundary_bytes
        pricer = self.evaluators[leg.pool].placed(self._any_way(leg))
        seconds = {n: pricer.collective_s("all_gather", n, pricer.groups["tp"]) for n in set(local.tolist())}
        gathered = (local > 0.5 * whole) & (leg.layout.tp > 1)
        return np.where(gathered, [seconds[num_bytes] for num_bytes in local.tolist()], 0.0)
