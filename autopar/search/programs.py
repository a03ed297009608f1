"""The local programs that candidates run: one per microbatch size, tensor-parallel degree and price of
memory.

Candidates that differ in pipeline, ZeRO, recomputation or schedule run the same local program, so each is
made once: capture at the microbatch size, localize over the data axis, choose strategies on the tensor axis,
localize again, price.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

from autopar.data_parallel import data_parallel
from autopar.localize import Assignment, Localized, localize
from autopar.placements import Shard
from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.axis_problem import All, AxisProblem, ClusterPrices, Custom
from autopar.search.block_ilp import MANY_MICROBATCHES, AxisSolution, BlockIlp, MemoryPrice
from autopar.search.context import ContextProblem, exchange_floor_s
from autopar.search.effort import Effort, clocked
from autopar.search.experts import deal_out_experts, routes_unseen
from autopar.search.mixed_assignment import mixed_assignment, op_blocks
from autopar.search.pinned import Degrees, PinnedStrategies, RegionRule
from autopar.search.relaxed import Stretch, relaxed
from autopar.search.replicas import Replica, make_replica, strategy_keys
from autopar.search.shallow import Shallow, local_counts, shallow
from autopar.search.space import parallelism
from autopar.search.units import Chain, build_chain, stretches
from costmodel import Group, Software
from costmodel.orders import OVERLAPPING_SCHEDULES
from graphs import Capture
from graphs.ir import OpGraph
from hardware_db import Cluster

MEMORY_PRICES = (0.0, 1.0, 10.0)
"""What filling a device's memory costs, in times of the microbatch: the sweep from fastest to smallest
program."""

PINNED = -1
"""In place of one of the prices: the strategies that a person would have pinned (`autopar.search.pinned`)."""

SMALLEST_SHARE = 0.01
"""Units that take less than this part of a microbatch are bounded without their collectives."""

STATE_BYTES_PER_PARAMETER_BYTE = 8
"""Mixed-precision AdamW keeps 16 bytes for a parameter of 2, plain AdamW 16 for 4: what memory is priced by.
"""


class Rules(Protocol):
    """What pins say of the strategies on an axis."""

    def rule(self, graph: OpGraph, axis: str) -> Custom | None:
        """What narrows the choice there; None where nothing does."""
        ...


class ProgramKey(NamedTuple):
    """What distinguishes programs. `levels` are the prices of memory of their blocks, where these are not all
    that of the program."""

    microbatch_size: int
    data_size: int
    cp: int
    ep: int
    tp: int
    sequence_parallel: bool | None
    num_microbatches: int
    price_level: int
    levels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A local program with its price.

    `strategies` maps the axes to the strategy key of every representative op; `solution` is None without a
    tensor axis.
    """

    key: ProgramKey
    chain: Chain
    solution: AxisSolution | None
    strategies: Mapping[str, Mapping[str, str]]


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
        rules: Rules | None = None,
        shorten: bool = True,
        low_precision: str | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.capture = capture
        self.effort = effort or Effort()
        self.shallow = shallow(capture) if shorten else Shallow(capture, {})
        self.cluster = cluster
        self.era = era
        self.low_precision = low_precision
        self.pinned = PinnedStrategies(self.shallow.counts)
        self.rules = rules
        self.routes_itself = routes_unseen(capture.graph)
        self._replicas: dict[tuple[int, int, int, int | None], Replica] = {}
        self._ilps: dict[ProgramKey, BlockIlp] = {}
        self._programs: dict[ProgramKey, Program] = {}
        self._context_floors_s: dict[tuple[int, int, int], float] = {}
        self._relaxed: dict[tuple[ProgramKey, bool, bool], Program] = {}
        self._divided: dict[tuple[ProgramKey, bool], Program] = {}
        self._mixed: dict[ProgramKey, Program | None] = {}
        self._propagated: Assignment | None = None

    def under(self, rules: Rules) -> Programs:
        """The same model under other rules, of which replicas and whole parameters know nothing."""
        other = copy(self)
        other.rules, other._ilps, other._relaxed, other._mixed = rules, {}, {}, {}
        other._programs = {key: made for key, made in self._programs.items() if key.tp == 1}
        return other

    def given(self, p: Parallelism) -> Program:
        """The program of a parallelism that a person gave: its strategies depend on the model and the degree
        alone, not on the cluster. Sequence parallelism is on unless it is said to be off."""
        return self.program(p, PINNED)

    def program(self, p: Parallelism, price_level: int = 0) -> Program:
        """The program of a candidate at one of the `MEMORY_PRICES`, or as `PINNED`."""
        return self._program(self._key(p, price_level))

    def _program(self, key: ProgramKey) -> Program:
        if key not in self._programs:
            self._programs[key] = self._make(key)
        return self._programs[key]

    @clocked("local programs")
    def finished(self, program: Program) -> Program:
        """The same program at full depth."""
        if not self.shallow.repeats:
            return program
        found = self._carried(program.key, Shallow(self.capture, {}))
        assert found is not None, "it was made at another depth"
        return found

    @clocked("local programs")
    def mixed(self, p: Parallelism, price_level: int, levels: tuple[int, ...]) -> Program | None:
        """The program of a candidate in which every block has its own of the `MEMORY_PRICES`, and what is
        outside of blocks that of `price_level`; None where blocks would not understand each other."""
        key = self._key(p, price_level)._replace(levels=levels)
        if key not in self._mixed:
            self.effort.solved("local programs")
            blocks = self.capture.graph.blocks
            borders = frozenset(
                block.path
                for block, pair in zip(blocks[1:], pairwise(levels), strict=True)
                if len({*pair}) > 1
            )
            model = shallow(self.capture, borders) if self.shallow.repeats else self.shallow
            self._mixed[key] = self._carried(key, model)
        return self._mixed[key]

    def _carried(self, key: ProgramKey, model: Shallow) -> Program | None:
        """The strategies that the search has chosen, at another depth; None where those of different blocks
        do not go together."""
        whole = model.capture.at(key.microbatch_size * key.data_size)
        short = self._replica_of(key)
        dp = short.assignments.get("dp")

        def split(outer: OpGraph, size: int) -> Assignment:
            return deepened(short.assignments["cp"], short.outer, outer)

        replica = make_replica(whole, None if dp is None else deepened(dp, short.whole, whole), key.cp, split)
        local, keys, solution = replica.local, dict(replica.keys), None
        if key.tp > 1:
            assignment = self._carried_assignment(key, whole, short.local.graph, local.graph)
            if assignment is None:
                return None
            keys["tp"] = strategy_keys(local.graph, assignment)
            solution = self._program(key._replace(levels=())).solution
            assert solution is not None, "there is a tensor axis"
            solution = replace(solution, assignment=assignment)
            local = localize(local, assignment)
        return Program(key, self._chain(whole, local, key, model.repeats), solution, keys)

    def _carried_assignment(
        self, key: ProgramKey, whole: OpGraph, short: OpGraph, local: OpGraph
    ) -> Assignment | None:
        """What the programs of the search, local graphs of which are `short`, say of `local`, made of
        `whole`."""
        by_level = {}
        for level in {key.price_level, *key.levels}:
            solution = self._program(key._replace(price_level=level, levels=())).solution
            assert solution is not None, "there is a tensor axis"
            by_level[level] = deepened(solution.assignment, short, local)
        if not key.levels:
            return by_level[key.price_level]
        paths = (block.path for block in self.capture.graph.blocks)
        by_path = dict(zip(paths, key.levels, strict=True))
        return mixed_assignment(local, by_level, op_blocks(local, whole), by_path, key.price_level)

    def device(self, microbatch_size: int, ep: int = 1) -> Program:
        """The program of one device that has memory enough, its experts shared with `ep` others."""
        return self.program(on_device(microbatch_size, ep))

    def has(self, p: Parallelism) -> bool:
        """Whether the fastest program of a candidate was made."""
        return self._key(p, 0) in self._programs

    def divided(self, p: Parallelism, multiple: int) -> Program:
        """What one device does, divided over the ranks of a candidate's layout, with the least that these
        communicate in a microbatch of so many times its size: no program of it takes, or keeps, less. Quicker
        to make than any of those, as the problem of the axis is that of all sizes."""
        if p.tp * p.cp == 1:
            return self.program(p)
        key, hides = self._key(p, 0), p.schedule in OVERLAPPING_SCHEDULES
        if (key, hides) not in self._divided:
            device, pricer = self.device(p.microbatch_size, p.ep).chain, self._pricer(1, 1, p.ep, 1)
            where: list[Stretch | None] = [None] * len(device.units)
            if p.tp > 1 and p.ep == 1:
                of_all = _floor_key(multiple * p.microbatch_size, p.tp)
                where = self._stretches(of_all, device, p.cp * multiple)
            chain = relaxed(device, None, p.tp, p.cp, pricer, where, trades=False, hides=hides)
            self._divided[key, hides] = Program(key, chain, None, {})
        return self._divided[key, hides]

    def relaxed(self, p: Parallelism, *, trades: bool = True) -> Program:
        """What no program of a candidate's layout can beat, whatever memory costs: a program but for its
        strategies. A quick one without `trades`, or where communication hides (`autopar.search.relaxed`)."""
        key, hides = self._key(p, 0), p.schedule in OVERLAPPING_SCHEDULES
        trades &= not hides
        if (key, trades, hides) not in self._relaxed:
            device = self.device(p.microbatch_size, p.ep).chain
            where = self._stretches(key, device)
            fastest, pricer = self.program(p).chain, self._pricer(1, 1, p.ep, 1)
            chain = relaxed(device, fastest, p.tp, p.cp, pricer, where, trades=trades, hides=hides)
            self._relaxed[key, trades, hides] = Program(key, chain, None, {})
        return self._relaxed[key, trades, hides]

    def _stretches(self, key: ProgramKey, device: Chain, parts: int = 1) -> list[Stretch | None]:
        """Where units are in the axis's problem, of which experts that are dealt out are no part, and of
        which a candidate does one of so many parts."""
        if key.ep > 1:
            return [None] * len(device.units)
        replica, ilp = self._replica_of(key), self._ilp(key)
        worth_s = SMALLEST_SHARE * sum(unit.cost.total_s for unit in device.units)
        found: list[Stretch | None] = []
        for start, stop, block in stretches(replica.whole, replica.local.graph):
            number = self.shallow.repeats.get(block or "", 1)
            is_worth = number * device.units[len(found)].cost.total_s > worth_s
            found += [Stretch(ilp, start, stop, 1 / parts) if is_worth else None] * number
        return found

    def floor_s(self, microbatch_size: int, tp: int) -> float:
        """No program of a tensor axis of `tp` ranks takes less for a microbatch, whatever memory costs.

        Also per sample for every smaller microbatch: each price is the larger of constants and terms linear
        in the batch, so half the batch costs at least half as much.
        """
        return self._ilp(_floor_key(microbatch_size, tp)).solve(MANY_MICROBATCHES).bound_s

    def computed_floor_s(self, microbatch_size: int, tp: int) -> float:
        """What any of them computes at least, whatever it communicates."""
        return sum(self._ilp(_floor_key(microbatch_size, tp)).problem.computed_s.values())

    def context_floor_s(self, microbatch_size: int, tp: int, cp: int) -> float:
        """No context axis of `cp` ranks adds less to a microbatch, beside a tensor axis of `tp`."""
        key = (microbatch_size, tp, cp)
        if key not in self._context_floors_s:
            graph = self.shallow.capture.at(microbatch_size)
            pricer = self._pricer(1, cp, 1, tp)
            counts = self.shallow.counts
            found_s = (counts[op.name] * exchange_floor_s(op, graph, pricer, tp) for op in graph.ops)
            exposed = 1 - pricer.era.tensor_parallel_overlap
            self._context_floors_s[key] = exposed * sum(found_s)
        return self._context_floors_s[key]

    def replica(
        self, microbatch_size: int, data_size: int, cp: int = 1, beside_tp: int | None = None
    ) -> Replica:
        """The program of one data-parallel replica, or of one context-parallel rank of it: split in the
        customary way, or in the cheapest one beside a tensor axis of `beside_tp` ranks."""
        key = (microbatch_size, data_size, cp, beside_tp)
        if key not in self._replicas:
            whole = self.shallow.capture.at(microbatch_size * data_size)
            dp = self._propagate(whole, data_size) if data_size > 1 else None
            split = None if beside_tp is None else partial(self._split_context, data_size, beside_tp)
            self._replicas[key] = make_replica(whole, dp, cp, split)
        return self._replicas[key]

    def _replica_of(self, key: ProgramKey) -> Replica:
        beside_tp = key.tp if key.cp > 1 and key.price_level != PINNED else None
        return self.replica(key.microbatch_size, key.data_size, key.cp, beside_tp)

    @clocked("operators")
    def _split_context(self, data_size: int, tp: int, graph: OpGraph, cp: int) -> Assignment:
        prices = ClusterPrices(self._pricer(data_size, cp, 1, tp), "cp", frozenset(graph.parameter_tensors))
        counts = local_counts(graph.ops, self.shallow.counts)
        return ContextProblem(graph, cp, prices, counts, whole_heads=tp > 1).solution(self.effort)

    def _key(self, p: Parallelism, price_level: int) -> ProgramKey:
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
        replica = self._replica_of(key)
        keys = dict(replica.keys)
        local, solution = replica.local, None
        if key.tp > 1:
            solution = self._solution(key)
            keys["tp"] = strategy_keys(local.graph, solution.assignment)
            local = localize(local, solution.assignment)
        return Program(key, self._chain(replica.whole, local, key, self.shallow.repeats), solution, keys)

    def _chain(self, whole: OpGraph, local: Localized, key: ProgramKey, repeats: Mapping[str, int]) -> Chain:
        pricer = self._pricer(key.data_size, key.cp, key.ep, key.tp)
        chain = build_chain(whole, local, pricer.kernels, repeats)
        if key.ep > 1:
            chain = deal_out_experts(chain, local.graph, key.ep)
        return chain.priced(pricer)

    @clocked("operators")
    def _ilp(self, key: ProgramKey) -> BlockIlp:
        """The problem at this cluster's prices, within the region that the sequence parallelism asked for
        leaves."""
        key = key._replace(ep=1, num_microbatches=1, price_level=0)
        if key not in self._ilps:
            graph = self._replica_of(key).local.graph
            counts = local_counts(graph.ops, self.shallow.counts)
            pricer = self._pricer(key.data_size, key.cp, 1, key.tp)
            split = key.sequence_parallel
            region = None if split is None else RegionRule(graph, sequence_parallel=split)
            rule = self.rules.rule(graph, "tp") if self.rules is not None else None
            custom = All.of(rule, region)  # pins hold; the region yields to them
            prices = ClusterPrices(pricer, "tp", frozenset(graph.parameter_tensors))
            problem = AxisProblem(graph, "tp", key.tp, prices, counts, custom)
            self._ilps[key] = BlockIlp(problem, self.effort)
        return self._ilps[key]

    def _solution(self, key: ProgramKey) -> AxisSolution:
        if key.price_level == PINNED:
            split = key.sequence_parallel is True
            degrees = Degrees.of(key.microbatch_size, key.data_size, key.cp, key.tp, split)
            graph = self.replica(degrees.batch, key.data_size, key.cp).local.graph
            return self.pinned.solution(graph, degrees)
        ilp = self._ilp(key)
        return ilp.solve(key.num_microbatches, self._price(ilp.problem, key.price_level))

    def _price(self, problem: AxisProblem, level: int) -> MemoryPrice:
        """Memory's worth: at price 1, all of a device's costs as much as the microbatch's arithmetic."""
        fastest_s = sum(min(times_s) for times_s in problem.op_times_s.values())
        per_byte = MEMORY_PRICES[level] * fastest_s / self.cluster.device.memory_bytes
        return MemoryPrice(per_byte, STATE_BYTES_PER_PARAMETER_BYTE * per_byte)

    def _pricer(self, data_size: int, cp: int, ep: int, tp: int) -> Pricer:
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


def on_device(microbatch_size: int, ep: int) -> Parallelism:
    """One device that has memory enough, its experts shared with `ep` others."""
    return parallelism(microbatch_size=microbatch_size, ep=ep, dp_replicate=ep)


def _floor_key(microbatch_size: int, tp: int) -> ProgramKey:
    """A tensor axis alone, whatever else there is."""
    return ProgramKey(microbatch_size, 1, 1, 1, tp, None, 1, 0)
