"""The local programs that candidates run: one per microbatch size, tensor-parallel degree and price of
memory.

Candidates that differ in pipeline, ZeRO, recomputation or schedule run the same local program, so each is
made once: capture at the microbatch size, localize over the data axis, choose strategies on the tensor axis,
localize again, price.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from functools import cache, lru_cache, partial
from typing import NamedTuple, Protocol

from autopar.data_parallel import data_parallel
from autopar.localize import Assignment, Localized, localize
from autopar.placements import Placement, Shard
from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.axis_prices import ClusterPrices
from autopar.search.axis_problem import All, AxisProblem, Custom
from autopar.search.block_ilp import AxisSolution, BlockIlp, MemoryPrice
from autopar.search.context import ContextProblem
from autopar.search.effort import Effort, clocked
from autopar.search.experts import deal_out_experts, num_experts, routes_unseen, with_own_experts
from autopar.search.least_programs import LeastPrograms
from autopar.search.local_programs import MOST_PROBLEMS, Program, ProgramKey
from autopar.search.other_depths import OtherDepths
from autopar.search.pinned import Degrees, PinnedStrategies, RegionRule
from autopar.search.replicas import Replica, Samples, make_replica, strategy_keys, with_context
from autopar.search.shallow import Shallow, local_counts, shallow
from autopar.search.space import parallelism
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


class Rules(Protocol):
    """What pins say of the strategies on an axis."""

    def rule(self, graph: OpGraph, axis: str) -> Custom | None:
        """What narrows the choice there; None where nothing does."""
        ...


class Unpriced(NamedTuple):
    """A program whose experts are not dealt out: its local graph and chain, and what was chosen for it."""

    graph: OpGraph
    chain: Chain
    solution: AxisSolution | None
    keys: Mapping[str, Mapping[str, str]]


class Programs:
    """Makes the programs of one model on one cluster, each once.

    They are of the shallow model, whose chain is as long as the full one's; `depths` has those of the full
    model, with the names that they will be written with, and `least` what none of them can beat.
    """

    def __init__(
        self,
        capture: Capture,
        cluster: Cluster,
        era: Software | None = None,
        *,
        rules: Rules | None = None,
        shorten: bool = True,
        low_precision: str | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.capture = capture
        self.effort = effort or Effort()
        self.shorten = shorten
        self.shallow = shallow(capture) if shorten else Shallow(capture, {})
        self.cluster = cluster
        self.era = era
        self.low_precision = low_precision
        self.pinned = PinnedStrategies(self.shallow.counts)
        self.rules = rules
        self.routes_itself = routes_unseen(capture.graph)
        self._has_experts = num_experts(capture.graph) > 1
        self._graphs: dict[int, OpGraph] = {}
        self._replicas: dict[tuple[int, int, int, int | None], Replica] = {}
        self._programs: dict[ProgramKey, Program] = {}
        self._propagated: Assignment | None = None
        self._samples: defaultdict[int, dict[int, Mapping[str, Placement]]] = defaultdict(dict)
        self._forget_rules()

    def _forget_rules(self) -> None:
        """Begin anew with all that depends on the rules."""
        self._ilp_of = lru_cache(MOST_PROBLEMS)(self._ilp)
        # Without experts no two programs share one.
        self._unpriced_of = lru_cache(MOST_PROBLEMS if self._has_experts else 0)(self._unpriced)
        self.least = LeastPrograms(self)
        self.depths = OtherDepths(self)

    def under(self, rules: Rules, capture: Capture) -> Programs:
        """The same model under other rules, of which replicas and whole parameters know nothing unless they
        tell other blocks apart, as its capture then does."""
        if capture is not self.capture:
            return Programs(
                capture, self.cluster, self.era, rules=rules, shorten=self.shorten,
                low_precision=self.low_precision, effort=self.effort,
            )  # fmt: skip
        other = copy(self)
        other.rules = rules
        other._forget_rules()
        other._programs = {key: made for key, made in self._programs.items() if key.tp == 1}
        return other

    def given(self, p: Parallelism) -> Program:
        """The program of a parallelism that a person gave: its strategies depend on the model and the degree
        alone, not on the cluster. Sequence parallelism is on unless it is said to be off."""
        return self.program(p, PINNED)

    def program(self, p: Parallelism, price_level: int = 0) -> Program:
        """The program of a candidate at one of the `MEMORY_PRICES`, or as `PINNED`."""
        return self.made(self.key(p, price_level))

    def made(self, key: ProgramKey) -> Program:
        if key not in self._programs:
            self._programs[key] = self._make(key)
        return self._programs[key]

    def device(self, microbatch_size: int, ep: int = 1) -> Program:
        """The program of one device that has memory enough, its experts shared with `ep` others."""
        return self.program(on_device(microbatch_size, ep))

    def has_fastest(self, p: Parallelism) -> bool:
        """Whether the fastest program of a candidate was made."""
        return self.key(p, 0) in self._programs

    def graph(self, batch: int) -> OpGraph:
        """The shallow model's graph at a batch size."""
        if batch not in self._graphs:
            self._graphs[batch] = self.shallow.capture.at(batch)
        return self._graphs[batch]

    def replica(
        self, microbatch_size: int, data_size: int, cp: int = 1, beside_tp: int | None = None
    ) -> Replica:
        """The program of one data-parallel replica, or of one context-parallel rank of it: split in the
        customary way, or in the cheapest one beside a tensor axis of `beside_tp` ranks."""
        key = (microbatch_size, data_size, cp, beside_tp)
        if key not in self._replicas:
            if cp > 1:
                split = None if beside_tp is None else partial(self._split_context, data_size, beside_tp)
                found = with_context(self.replica(microbatch_size, data_size), cp, split)
            else:
                whole = self.graph(microbatch_size * data_size)
                found = make_replica(whole, self._propagate(whole, data_size) if data_size > 1 else None)
            self._replicas[key] = found
        return self._replicas[key]

    def replica_of(self, key: ProgramKey) -> Replica:
        beside_tp = key.tp if key.cp > 1 and key.price_level != PINNED else None
        return self.replica(key.microbatch_size, key.data_size, key.cp, beside_tp)

    @clocked("operators")
    def _split_context(self, data_size: int, tp: int, graph: OpGraph, cp: int) -> Assignment:
        prices = ClusterPrices(self.pricer(data_size, cp, 1, tp), "cp", frozenset(graph.parameter_tensors))
        counts = local_counts(graph.ops, self.shallow.counts)
        samples = Samples.of(graph, self._samples[data_size])
        problem = ContextProblem(graph, cp, prices, counts, whole_heads=tp > 1, samples=samples)
        return problem.solution(self.effort)

    def key(self, p: Parallelism, price_level: int) -> ProgramKey:
        if p.tp == 1:
            level = PINNED if price_level == PINNED and p.cp > 1 else 0
            return ProgramKey(p.microbatch_size, self._data_size(p), p.cp, p.ep, 1, None, 1, level)
        # A parameter's reduction is thought to be shared by few microbatches, or by many.
        shared = 1 if p.num_microbatches < 4 else 16
        split = p.sequence_parallel
        if price_level == PINNED:
            shared, split = 16, split is not False
        return ProgramKey(p.microbatch_size, self._data_size(p), p.cp, p.ep, p.tp, split, shared, price_level)

    def _data_size(self, p: Parallelism) -> int:
        """How many replicas stand for `p.dp`: local shapes are the same for any number, so two do, unless
        samples meet in the forward and what is gathered grows with their number. Replicas are thought to
        route their own tokens also where that cannot be seen."""
        if p.dp == 1 or self.routes_itself:
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

    @clocked("local programs")
    def _make(self, key: ProgramKey) -> Program:
        self.effort.solved("local programs")
        graph, chain, solution, keys = self._unpriced_of(key._replace(ep=1))
        return Program(key, self._priced(chain, graph, key), solution, keys)

    def _unpriced(self, key: ProgramKey) -> Unpriced:
        """The same for any number of ranks that experts are dealt out over."""
        replica = self.replica_of(key)
        keys = dict(replica.keys)
        local, solution = replica.local, None
        if key.tp > 1:
            solution = self._solution(key)
            keys["tp"] = strategy_keys(local.graph, solution.assignment)
            local = localize(local, solution.assignment)
        chain = build_chain(replica.whole, local, self._pricer(key).kernels, self.shallow.repeats)
        return Unpriced(local.graph, chain, solution, keys)

    def chain(self, whole: OpGraph, local: Localized, key: ProgramKey, repeats: Mapping[str, int]) -> Chain:
        """The chain of a local graph at this cluster's prices."""
        chain = build_chain(whole, local, self._pricer(key._replace(ep=1)).kernels, repeats)
        return self._priced(chain, local.graph, key)

    def _priced(self, chain: Chain, graph: OpGraph, key: ProgramKey) -> Chain:
        """A chain whose experts are not dealt out yet, as the key says and with prices."""
        pricer = self._pricer(key)
        if key.ep > 1:
            chain = deal_out_experts(with_own_experts(chain, graph, pricer.kernels), graph, key.ep)
        return chain.priced(pricer)

    def _pricer(self, key: ProgramKey) -> Pricer:
        return self.pricer(key.data_size, key.cp, key.ep, key.tp)

    @clocked("operators")
    def ilp(self, key: ProgramKey) -> BlockIlp:
        """The problem at this cluster's prices, within the region that the sequence parallelism asked for
        leaves."""
        return self._ilp_of(key._replace(ep=1, num_microbatches=1, price_level=0))

    def _ilp(self, key: ProgramKey) -> BlockIlp:
        graph = self.replica_of(key).local.graph
        counts = local_counts(graph.ops, self.shallow.counts)
        pricer = self.pricer(key.data_size, key.cp, 1, key.tp)
        split = key.sequence_parallel
        region = None if split is None else RegionRule(graph, sequence_parallel=split)
        rule = self.rules.rule(graph, "tp") if self.rules is not None else None
        custom = All.of(rule, region)  # pins hold; the region yields to them
        prices = ClusterPrices(pricer, "tp", frozenset(graph.parameter_tensors))
        problem = AxisProblem(graph, "tp", key.tp, prices, counts, custom)
        return BlockIlp(problem, self.effort)

    def _solution(self, key: ProgramKey) -> AxisSolution:
        if key.price_level == PINNED:
            split = key.sequence_parallel is True
            degrees = Degrees.of(key.microbatch_size, key.data_size, key.cp, key.tp, split)
            graph = self.replica(degrees.batch, key.data_size, key.cp).local.graph
            return self.pinned.solution(graph, degrees)
        ilp = self.ilp(key)
        return ilp.solve(key.num_microbatches, self._price(ilp.problem, key.price_level))

    def _price(self, problem: AxisProblem, level: int) -> MemoryPrice:
        """Memory's worth: at price 1, all of a device's costs as much as the microbatch's arithmetic."""
        fastest_s = sum(min(times_s) for times_s in problem.op_times_s.values())
        per_byte = MEMORY_PRICES[level] * fastest_s / self.cluster.device.memory_bytes
        return MemoryPrice(per_byte, STATE_BYTES_PER_PARAMETER_BYTE * per_byte)

    def pricer(self, data_size: int, cp: int, ep: int, tp: int) -> Pricer:
        """The data axis as wide as it can be: what crosses it in the forward (the count of a loss) is that
        dear."""
        widest = self.cluster.num_devices // (tp * cp) if data_size == 2 else data_size
        groups = {
            "tp": Group(tp, 1),
            "cp": Group(cp, tp),
            "ep": Group(ep, tp * cp),
            "dp": Group(max(1, widest), tp * cp),
        }
        blocks = tuple(block.path for block in self.capture.graph.blocks) if self.low_precision else ()
        return Pricer(self.cluster, groups, self.era, low_precision=self.low_precision, blocks=blocks)


@cache
def on_device(microbatch_size: int, ep: int) -> Parallelism:
    """One device that has memory enough, its experts shared with `ep` others."""
    return parallelism(microbatch_size=microbatch_size, ep=ep, dp_replicate=ep)
