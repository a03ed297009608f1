"""The local programs that candidates run: one per microbatch size, tensor-parallel degree and price of
memory.

Candidates that differ in pipeline, ZeRO, recomputation or schedule run the same local program, so each is
made once: capture at the microbatch size, localize over the data axis, choose strategies on the tensor axis,
localize again, price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from autopar.data_parallel import data_parallel
from autopar.localize import Assignment, Localized, localize
from autopar.placements import Shard
from autopar.plan import Parallelism, Recompute
from autopar.pricing import Pricer
from autopar.search.axis_problem import AxisProblem, ClusterPrices
from autopar.search.block_ilp import MANY_MICROBATCHES, AxisSolution, BlockIlp, MemoryPrice
from autopar.search.experts import deal_out_experts
from autopar.search.pinned import Degrees, PinnedStrategies, RegionRule
from autopar.search.replicas import Replica, make_replica, strategy_keys
from autopar.search.shallow import Shallow, local_counts, shallow
from autopar.search.stages import StageTable
from autopar.search.units import Chain, build_chain
from costmodel import Group, Software
from graphs import Capture
from graphs.ir import OpGraph
from hardware_db import Cluster

MEMORY_PRICES = (0.0, 1.0, 10.0)
"""What filling a device's memory costs, in times of the microbatch: the sweep from fastest to smallest
program."""

PINNED = -1
"""In place of one of the prices: the strategies that a person would have pinned (`autopar.search.pinned`)."""

STATE_BYTES_PER_PARAMETER_BYTE = 8
"""Mixed-precision AdamW keeps 16 bytes for a parameter of 2, plain AdamW 16 for 4: what memory is priced by.
"""


@dataclass(frozen=True)
class Program:
    """A local program with its price.

    `strategies` maps the axes to the strategy key of every representative op; `solution` is None without a
    tensor axis.
    """

    chain: Chain
    solution: AxisSolution | None
    strategies: Mapping[str, Mapping[str, str]]

    def sample_s(self, p: Parallelism) -> float:
        """What a sample costs, all stages together."""
        return self.microbatch_s / p.microbatch_size

    @cached_property
    def microbatch_s(self) -> float:
        return sum(unit.cost.total_s for unit in self.chain.units)

    @cached_property
    def tables(self) -> dict[Recompute, StageTable]:
        return {}

    def table(self, recompute: Recompute) -> StageTable:
        """Stage sums under one recompute mode."""
        if recompute not in self.tables:
            self.tables[recompute] = StageTable(self.chain, recompute)
        return self.tables[recompute]


class ProgramKey(NamedTuple):
    """What distinguishes programs."""

    microbatch_size: int
    data_size: int
    cp: int
    ep: int
    tp: int
    sequence_parallel: bool | None
    num_microbatches: int
    price_level: int


class Programs:
    """Makes the programs of one model on one cluster, each once.

    Programs for the search are of the shallow model, whose chain is as long as the full one's; `finished`
    makes the program of the full model, with the names that it will be written with.
    """

    def __init__(
        self,
        capture: Capture,
        cluster: Cluster,
        era: Software | None = None,
        *,
        time_limit_s: float | None = None,
        shorten: bool = True,
    ) -> None:
        self.capture = capture
        self.shallow = shallow(capture) if shorten else Shallow(capture, {})
        self.cluster = cluster
        self.era = era
        self.pinned = PinnedStrategies(self.shallow.counts)
        self.time_limit_s = time_limit_s
        self.num_solved = 0
        self._replicas: dict[tuple[int, int, int], Replica] = {}
        self._ilps: dict[ProgramKey, BlockIlp] = {}
        self._programs: dict[ProgramKey, Program] = {}
        self._propagated: Assignment | None = None

    def given(self, p: Parallelism) -> Program:
        """The program of a parallelism that a person gave: its strategies depend on the model and the degree
        alone, not on the cluster. Sequence parallelism is on unless it is said to be off."""
        return self.program(p, PINNED)

    def program(self, p: Parallelism, price_level: int = 0) -> Program:
        """The program of a candidate at one of the `MEMORY_PRICES`, or as `PINNED`."""
        key = self._key(p, price_level)
        if key not in self._programs:
            self._programs[key] = self._make(key)
        return self._programs[key]

    def lightest(self, p: Parallelism) -> Program:
        """The program of two replicas in place of `p.dp`: where samples meet, more of them have only more to
        do."""
        if p.dp <= 2:
            return self.program(p)
        return self.program(p.model_copy(update={"dp_replicate": 2, "dp_shard": 1}))

    def finished(self, p: Parallelism, price_level: int = 0) -> Program:
        """The same program at full depth."""
        program = self.program(p, price_level)
        if not self.shallow.repeats:
            return program
        key = self._key(p, price_level)
        whole = self.capture.at(key.microbatch_size * key.data_size)
        short = self.replica(key.microbatch_size, key.data_size, key.cp)
        dp = short.assignments.get("dp")
        replica = make_replica(whole, None if dp is None else deepened(dp, short.whole, whole), key.cp)
        local, solution = replica.local, program.solution
        if solution is not None:
            assignment = deepened(solution.assignment, short.local.graph, local.graph)
            solution = replace(solution, assignment=assignment)
            local = localize(local, assignment)
        return Program(self._chain(whole, local, key, {}), solution, program.strategies)

    def floor_s(self, microbatch_size: int, tp: int) -> float:
        """No program of this tensor-parallel degree takes less for a microbatch, whatever memory costs.

        Also per sample for every smaller microbatch: each price is the larger of constants and terms linear
        in the batch, so half the batch costs at least half as much.
        """
        if tp == 1:
            return self.program(Parallelism(microbatch_size=microbatch_size)).microbatch_s
        ilp = self._ilp(ProgramKey(microbatch_size, 1, 1, 1, tp, None, 1, 0))
        self.num_solved += 1
        return ilp.solve(MANY_MICROBATCHES).bound_s

    def replica(self, microbatch_size: int, data_size: int, cp: int = 1) -> Replica:
        """The program of one data-parallel replica, or of one context-parallel rank of it."""
        key = (microbatch_size, data_size, cp)
        if key not in self._replicas:
            whole = self.shallow.capture.at(microbatch_size * data_size)
            dp = self._propagate(whole, data_size) if data_size > 1 else None
            self._replicas[key] = make_replica(whole, dp, cp)
        return self._replicas[key]

    def _key(self, p: Parallelism, price_level: int) -> ProgramKey:
        if p.tp == 1:
            return ProgramKey(p.microbatch_size, self._data_size(p), p.cp, p.ep, 1, None, 1, 0)
        # A parameter's reduction is thought to be shared by few microbatches, or by many.
        shared = 1 if p.num_microbatches < 4 else 16
        split = p.sequence_parallel
        if price_level == PINNED:
            shared, split = 16, split is not False
        return ProgramKey(p.microbatch_size, self._data_size(p), p.cp, p.ep, p.tp, split, shared, price_level)

    def _data_size(self, p: Parallelism) -> int:
        """How many replicas stand for `p.dp`: local shapes are the same for any number, so two do, unless
        samples meet in the forward and what is gathered grows with their number. Under expert parallelism
        every replica routes its own tokens."""
        if p.dp == 1 or p.ep > 1:
            return 1
        return p.dp if self.replica(p.microbatch_size, 2).gathered else 2

    def _propagate(self, whole: OpGraph, size: int) -> Assignment:
        """Data parallelism; what it decided for one microbatch size holds for all where no sections depend on
        it."""
        if self._propagated is not None and self._propagated.size == size:
            return self._propagated
        assignment = data_parallel(whole, size)
        states = (state for choice in assignment.choice for state in (*choice.operands, *choice.results))
        if not any(isinstance(state.value, Shard) and state.value.sections for state in states):
            self._propagated = assignment
        return assignment

    def _make(self, key: ProgramKey) -> Program:
        replica = self.replica(key.microbatch_size, key.data_size, key.cp)
        keys = dict(replica.keys)
        local, solution = replica.local, None
        if key.tp > 1:
            solution = self._solution(key)
            self.num_solved += 1
            keys["tp"] = strategy_keys(local.graph, solution.assignment)
            local = localize(local, solution.assignment)
        return Program(self._chain(replica.whole, local, key, self.shallow.repeats), solution, keys)

    def _chain(self, whole: OpGraph, local: Localized, key: ProgramKey, repeats: Mapping[str, int]) -> Chain:
        pricer = Pricer(self.cluster, self._groups(key.data_size, key.cp, key.ep, key.tp), self.era)
        chain = build_chain(whole, local, pricer.kernels, repeats)
        if key.ep > 1:
            chain = deal_out_experts(chain, local.graph, key.ep)
        return chain.priced(pricer)

    def _ilp(self, key: ProgramKey) -> BlockIlp:
        """The problem at this cluster's prices, within the region that the sequence parallelism asked for
        leaves."""
        key = key._replace(ep=1, num_microbatches=1, price_level=0)
        if key not in self._ilps:
            graph = self.replica(key.microbatch_size, key.data_size, key.cp).local.graph
            counts = local_counts(graph.ops, self.shallow.counts)
            pricer = Pricer(self.cluster, self._groups(key.data_size, key.cp, 1, key.tp), self.era)
            split = key.sequence_parallel
            rule = None if split is None else RegionRule(graph, sequence_parallel=split)
            problem = AxisProblem(graph, "tp", key.tp, ClusterPrices(pricer, "tp"), counts, rule)
            self._ilps[key] = BlockIlp(problem)
        return self._ilps[key]

    def _solution(self, key: ProgramKey) -> AxisSolution:
        if key.price_level == PINNED:
            split = key.sequence_parallel is True
            degrees = Degrees.of(key.microbatch_size, key.data_size, key.cp, key.tp, split)
            graph = self.replica(degrees.batch, key.data_size, key.cp).local.graph
            return self.pinned.solution(graph, degrees)
        ilp = self._ilp(key)
        return ilp.solve(key.num_microbatches, self._price(ilp.problem, key.price_level), self.time_limit_s)

    def _price(self, problem: AxisProblem, level: int) -> MemoryPrice:
        """Memory's worth: at price 1, all of a device's costs as much as the microbatch's arithmetic."""
        fastest_s = sum(min(times_s) for times_s in problem.op_times_s.values())
        per_byte = MEMORY_PRICES[level] * fastest_s / self.cluster.device.memory_bytes
        return MemoryPrice(per_byte, STATE_BYTES_PER_PARAMETER_BYTE * per_byte)

    def _groups(self, data_size: int, cp: int, ep: int, tp: int) -> dict[str, Group]:
        """The data axis as wide as it can be: what crosses it in the forward (the count of a loss) is that
        dear."""
        widest = self.cluster.num_devices // (tp * cp) if data_size == 2 else data_size
        return {
            "tp": Group(tp, 1),
            "cp": Group(cp, tp),
            "ep": Group(ep, tp * cp),
            "dp": Group(max(1, widest), tp * cp),
        }


def deepened(assignment: Assignment, graph: OpGraph, full: OpGraph) -> Assignment:
    """The assignment of a shallow graph, carried over to the full one by the names of representative ops."""
    chosen = {op.name: strategy for op, strategy in zip(graph.ops, assignment.choice, strict=True)}
    choice = tuple(chosen[full.ops[index].name] for index in full.representative)
    position = {op.name: index for index, op in enumerate(graph.ops)}
    sources = dict(assignment.sources)
    for parameter in full.parameters:
        readers = full.consumers[parameter.tensor]
        if parameter.tensor not in sources and readers:
            operand = full.ops[readers[0]].inputs.index(parameter.tensor)
            alike = graph.ops[position[full.ops[full.representative[readers[0]]].name]]
            sources[parameter.tensor] = assignment.sources[alike.inputs[operand]]
    return replace(assignment, choice=choice, sources=sources)
