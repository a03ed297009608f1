"""One way to run a program, solved: its stages, what their blocks compute again, its price and a bound on it.

With one stage a rank the cuts are those of `best_cut`, and its value is the bound. Schedules with
several stages on a rank, whose bubble shrinks only if those are alike, are cut as evenly as the units allow;
then only what is computed again is left to decide, and the bound is the larger of the step without that and
of the busiest rank with fractions of variants. Memory is judged by the exact ledger: what a rank exceeds it
by is taken off its units until it fits, and given back where that turned out to be too much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial, reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from autopar.plan import Parallelism
from autopar.search.again_bound import MOST_ROUNDS, AgainBound, Path
from autopar.search.data_axes import least_accumulation_s
from autopar.search.effort import Effort, clocked, cut_size
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.even_stages import EvenStages, Staged, moments, own_stages
from autopar.search.local_programs import Program
from autopar.search.outcome import Solved, better
from autopar.search.polish import handed_on, takers, with_faster_units
from autopar.search.programs import Programs
from autopar.search.recent import Recent
from autopar.search.runs import Array
from autopar.search.stage_costs import Machine
from autopar.search.stage_table import Options, StageTable
from autopar.search.stages import Cut, Where, best_cut
from autopar.search.units import Chain, Unit
from autopar.search.variants import RankUnits, Variants
from costmodel.orders import OVERLAPPING_SCHEDULES, alone_parts

MOST_TABLES = 300
"""The programs, and bounds over programs, whose stages are known at a time: of a large model hundreds are
asked for, and each takes a megabyte. What is forgotten and made again counts twice in what was solved."""

NUM_REPAIRS = 16
"""How often what does not fit yet is taken off again; the second time it mostly fits."""

MOST_MOVES = 8
"""How often a stage may hand on a unit."""

NEGLIGIBLE = 1e-3
"""What plans are above their bounds that is not worth another try."""

OptionsOf = Callable[[Sequence[Unit]], Options]
WhereOf = Callable[[Sequence[Unit]], Where]


class Draft(NamedTuple):
    """Where the stages of a way begin, and the least that its step takes."""

    cuts: tuple[int, ...]
    bound_s: float


class StageLayer:
    """Solves ways to run programs on one cluster; `options` and `where` tell what pins leave open: the
    variants of units, and the runs of units that may be a stage."""

    def __init__(self, programs: Programs, evaluator: Evaluator, options: OptionsOf, where: WhereOf) -> None:
        self.programs = programs
        self.effort = programs.effort
        self.evaluator = evaluator
        self.options = options
        self.where = where
        # Without a reference to the layer: with it the tables would outlive it.
        self._known = Recent(partial(_stages_of, options, self.effort), MOST_TABLES)
        self._devices: dict[tuple[int, int], EvenStages] = {}
        self._alone: dict[tuple[object, ...], float] = {}
        self._paths: dict[tuple[str, int, int, int], list[Path]] = {}

    def table(self, program: Program) -> StageTable:
        """The sums of a program's chain."""
        return self.even(program).table

    def even(self, program: Program) -> EvenStages:
        """The stages of a program where memory has no say in them."""
        return self._known.of(program)[0]

    def variants(self, program: Program) -> Variants:
        """What its units may compute again."""
        return self._known.of(program)[1]

    def schedule_floor_s(self, p: Parallelism, program: Program | None = None) -> float:
        """No step takes less, whatever the data axes do; 0 where cuts are still open.

        Without the fastest program, that of one device is divided over the ranks of all stages; also where
        the schedule hides communication, so that others may take less which compute less.
        """
        if p.num_virtual_stages == 1:
            return 0.0
        cuts = self._even(p)
        if cuts is None:
            return float("inf")
        accumulation_s = self._accumulation_s(p)
        overhead_s = self.evaluator.era.step_overhead_s
        if program is not None and (p.tp == 1 or p.schedule not in OVERLAPPING_SCHEDULES):
            return self.even(program).schedule_floor_s(p, cuts, accumulation_s) + overhead_s
        # All ranks of a context axis add up the gradients of the same parameters.
        whole_s = self._device(p).schedule_floor_s(p, cuts, p.cp * accumulation_s)
        return whole_s / (p.tp * p.cp) + overhead_s

    def alone(self, p: Parallelism) -> float:
        """The part of a microbatch that hides nothing of what it communicates, in schedules that do: of the
        kind of units that runs least alone, as units of a kind take equal times and only their mean counts.
        """
        cuts = self._even(p)
        if cuts is None:
            return 0.0
        key = (p.schedule, p.pp, p.num_microbatches, cuts)
        if key not in self._alone:
            units = self._device(p).table.chain.units
            sizes = [stop - start for start, stop in pairwise((*cuts, len(units)))]
            shape = p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages
            parts = np.repeat(alone_parts(*shape), sizes, axis=1)
            kinds: dict[int, list[int]] = {}
            for index, unit in enumerate(units):
                kinds.setdefault(id(unit.recompute_s) if unit.is_block else -1 - index, []).append(index)
            self._alone[key] = min(float(parts[:, mine].mean(axis=1).min()) for mine in kinds.values())
        return self._alone[key]

    @clocked("stages")
    def floor_s(self, program: Program, p: Parallelism, enough_s: float) -> float:
        """No step takes less, of which no more than `enough_s` is worth while; infinite where memory, or the
        number of units, allows no stages at all. Quick where `draft` is exact."""
        busiest_s = self.busiest_s(program, p)
        if not 0 < busiest_s < enough_s:
            return busiest_s
        cuts = self._even(p)
        assert cuts is not None, "the busiest rank has some"
        staged = Staged(cuts, self._accumulation_s(p), self._sends_s(program.chain, p, cuts))
        overhead_s = self.evaluator.era.step_overhead_s
        order_s = self.even(program).order_s(p, staged, busiest_s - overhead_s)
        return max(busiest_s, order_s + overhead_s)

    def busiest_s(self, program: Program, p: Parallelism, *, moves: bool = True) -> float:
        """The same of the rank that has most to do, which asks no more of a program's passes than that
        forward and input gradients take no less; unless it `moves`, nothing does so on the data axes."""
        if p.pp > 1 and p.num_virtual_stages == 1:
            return 0.0
        return self.evenly_s(program, p, moves=moves)

    def evenly_s(self, program: Program, p: Parallelism, *, moves: bool = True) -> float:
        """The same with even cuts, also where others are allowed."""
        cuts = self._even(p)
        if cuts is None:
            return float("inf")
        stages, machine = self.even(program), self.machine._replace(moves=moves)
        bound_s = stages.bound_s(p, machine, cuts, stages.excess_bytes(p, machine, cuts))
        return bound_s + self.evaluator.era.step_overhead_s

    @clocked("stages")
    def divided_order_s(self, p: Parallelism, known_s: float) -> float:
        """No step takes less: `known_s`, or if that is more, the schedule's own order, with one device's work
        divided over all ranks of the stages, unless cuts are still open."""
        cuts = self._even(p)
        if p.num_virtual_stages == 1 or cuts is None:
            return known_s
        overhead_s, num_shares = self.evaluator.era.step_overhead_s, p.tp * p.cp
        # All ranks of a context axis add up the gradients of the same parameters.
        staged = Staged(cuts, p.cp * self._accumulation_s(p), sends_s=(0.0,) * (len(cuts) - 1))
        whole_s = self._device(p).order_s(p, staged, (known_s - overhead_s) * num_shares)
        return max(known_s, whole_s / num_shares + overhead_s)

    def _accumulation_s(self, p: Parallelism) -> float:
        return least_accumulation_s(p, self.evaluator.policy, self.evaluator.pricer)

    @clocked("stages")
    def draft(self, program: Program, p: Parallelism) -> Draft | None:
        """The cuts of a way and its bound; None where memory, or the number of units, allows none."""
        table = self.table(program)
        if p.pp > 1 and p.num_virtual_stages == 1:
            cut = self._cut(table, p, fitting=True)
            return None if cut is None else Draft(cut.cuts, cut.bound_s + self.evaluator.era.step_overhead_s)
        cuts = self._even(p)
        if cuts is None:
            return None
        self.effort.solved("stages")
        evaluated = self.evaluator.evaluate(table.chain, p, cuts, table.base)
        bound_s = evaluated.step_s
        if not evaluated.fits:
            bound_s = max(bound_s, self._again_bound_s(self.even(program), evaluated))
        return None if bound_s == float("inf") else Draft(cuts, bound_s)

    def _again_bound_s(self, stages: EvenStages, evaluated: Evaluated) -> float:
        """The least for what must be computed again; infinite where that frees too little."""
        p, cuts = evaluated.parallelism, evaluated.cuts
        excess_bytes = self._least_excess_bytes(stages, evaluated)
        bound_s = stages.bound_s(p, self.machine, cuts, excess_bytes)
        if bound_s < float("inf") and p.num_virtual_stages > 1:
            bound_s = max(bound_s, self._again_bound(stages, evaluated, excess_bytes).bound_s())
        return bound_s + self.evaluator.era.step_overhead_s

    def _again_bound(self, stages: EvenStages, evaluated: Evaluated, excess_bytes: Array) -> AgainBound:
        p = evaluated.parallelism
        sends_s = self._sends_s(evaluated.chain, p, evaluated.cuts)
        shape = (p.schedule, p.pp, p.num_virtual_stages, p.num_microbatches)
        paths = self._paths.setdefault(shape, [])
        return AgainBound(stages, evaluated, excess_bytes, sends_s, self.evaluator.overlap, paths)

    def _sends_s(self, chain: Chain, p: Parallelism, cuts: tuple[int, ...]) -> tuple[float, ...]:
        """The messages with which stages but the first begin."""
        messages_s = self.evaluator.messages_s(chain, p)
        return tuple(messages_s[cut] for cut in cuts[1:])

    @clocked("stages")
    def tightened(
        self, program: Program, p: Parallelism, draft: Draft, enough_s: float, num_rounds: int = MOST_ROUNDS
    ) -> Draft:
        """The draft with a higher bound, where cuts are even and memory short: no higher than `enough_s` is
        worth while, nor more rounds than these."""
        if p.num_virtual_stages == 1 or draft.bound_s >= enough_s:
            return draft
        stages = self.even(program)
        evaluated = self.evaluator.evaluate(stages.table.chain, p, draft.cuts, stages.table.base)
        if evaluated.fits:
            return draft
        self.effort.solved("stages")
        overhead_s = self.evaluator.era.step_overhead_s
        excess_bytes = self._least_excess_bytes(stages, evaluated)
        bound = self._again_bound(stages, evaluated, excess_bytes)
        bound_s = bound.tightened(draft.bound_s - overhead_s, enough_s - overhead_s, num_rounds)
        return draft._replace(bound_s=bound_s + overhead_s)

    def _cut(self, table: StageTable, p: Parallelism, *, fitting: bool) -> Cut | None:
        self.effort.solved("stages", cut_size(table.num_units, p.pp))
        where, send_s = self.where(table.chain.units), self.evaluator.messages_s(table.chain, p)
        return best_cut(table, p, self.machine, send_s, where, fitting=fitting)

    def _device(self, p: Parallelism) -> EvenStages:
        key = p.microbatch_size, p.ep
        if key not in self._devices:
            self._devices[key] = self.even(self.programs.device(*key))
        return self._devices[key]

    def _even(self, p: Parallelism) -> tuple[int, ...] | None:
        """Even for one device; the programs of all ranks are cut alike."""
        if p.pp == 1:
            return (0,)
        stages = self._device(p)
        return stages.cuts(p.pp * p.num_virtual_stages, self.where(stages.table.chain.units))

    @cached_property
    def machine(self) -> Machine:
        """What stages run on."""
        device = self.evaluator.cluster.device
        return Machine(
            self.evaluator.pricer,
            self.evaluator.policy,
            self.evaluator.overlap,
            device.memory_bytes - device.efficiency.reserved_memory_bytes,
        )

    @clocked("stages")
    def solve(self, program: Program, p: Parallelism, draft: Draft | None = None) -> Solved | None:
        """The best cuts and variants, those of the `draft` among them; where nothing fits, those that come
        nearest. None for fewer units than stages.

        A draft counts the slowest stage alone, and frees fractions: cuts that memory had no say in, or that
        are even, may be better once the schedule and whole variants have theirs.
        """
        draft = draft or self.draft(program, p) or self._unfitting(program, p)
        if draft is None:
            return None
        cuts = [draft.cuts]
        if p.pp > 1 and p.num_virtual_stages == 1:
            free = self._unfitting(program, p)
            cuts += [each for each in (free and free.cuts, self._even(p)) if each is not None]
        best = reduce(better, (self._solved(program, p, each, draft.bound_s) for each in dict.fromkeys(cuts)))
        is_close = best.evaluated.fits and best.evaluated.step_s <= best.bound_s * (1 + NEGLIGIBLE)
        return best if is_close else self._polished(best)

    def _polished(self, solved: Solved) -> Solved:
        """With cuts moved by single units, and faster variants where memory is left for them."""
        p, program = solved.parallelism, solved.program
        for _ in range(MOST_MOVES if p.pp > 1 and p.num_virtual_stages == 1 else 0):
            near = self._near(solved.evaluated)
            found = reduce(better, (self._solved(program, p, each, solved.bound_s) for each in near), solved)
            if found is solved:
                break
            solved = found
        now = solved.evaluated
        if not now.fits:
            return solved
        fit, price = self.evaluator.fits_with, partial(self.evaluator.evaluate, program.chain, p, now.cuts)
        table, variants = self.table(program), self.variants(program)
        faster = with_faster_units(now, table, variants, self._ranks(program, now), partial(fit, now), price)
        return replace(solved, evaluated=faster, bound_s=min(solved.bound_s, faster.step_s))

    def _near(self, evaluated: Evaluated) -> Iterator[tuple[int, ...]]:
        """Cuts by which the slowest stage has less to do, or the fullest less to keep."""
        units = evaluated.chain.units
        loads = [stage.forward_s + stage.backward_s for stage in evaluated.stages]
        most = evaluated.step.bottleneck_rank
        if not evaluated.fits:
            loads = [ledger.total_bytes for ledger in evaluated.ledgers]
            most = loads.index(max(loads))
        return handed_on(evaluated.cuts, len(units), most, self.where(units), takers(most, loads))

    def _solved(self, program: Program, p: Parallelism, cuts: tuple[int, ...], bound_s: float) -> Solved:
        """The variants that fit into given cuts."""
        table = self.table(program)
        evaluated = self.evaluator.evaluate(table.chain, p, cuts, table.base)
        if not evaluated.fits:
            evaluated = self._fitting(program, evaluated)
        return Solved(evaluated, program, min(bound_s, evaluated.step_s))

    def _unfitting(self, program: Program, p: Parallelism) -> Draft | None:
        """Cuts for a way that does not fit."""
        table = self.table(program)
        if p.pp > 1 and p.num_virtual_stages == 1:
            cut = self._cut(table, p, fitting=False)
            return None if cut is None else Draft(cut.cuts, 0.0)
        cuts = self._even(p)
        return None if cuts is None else Draft(cuts, 0.0)

    def _fitting(self, program: Program, first: Evaluated) -> Evaluated:
        """The same cuts with variants that fit; the last tried where none do."""
        ranks, choices = self._ranks(program, first), self.table(program).base
        evaluated = first
        for _ in range(NUM_REPAIRS):
            choices = self.variants(program).relieved(choices, ranks, self._excess_bytes(evaluated))
            again = self.evaluator.evaluate(first.chain, first.parallelism, first.cuts, choices)
            if again.choices == evaluated.choices:
                break  # it fits, or nothing is left to free
            evaluated = again
        return evaluated

    def _excess_bytes(self, evaluated: Evaluated) -> Array:
        """What activations of each rank take too much, below zero where some is left."""
        totals = np.array([ledger.total_bytes for ledger in evaluated.ledgers])
        excess: Array = (totals - evaluated.memory_bytes) / (1 + evaluated.chain.era.fragmentation)
        return excess

    def _least_excess_bytes(self, stages: EvenStages, evaluated: Evaluated) -> Array:
        """What ranks have to keep less at least, with the fastest variants so far."""
        ledgers = evaluated.ledgers
        kept = np.array([ledger.activations_bytes for ledger in ledgers])
        buffers = np.array([ledger.logits_bytes + ledger.buffers_bytes for ledger in ledgers])
        p, cuts = evaluated.parallelism, evaluated.cuts
        working = buffers - stages.cached_bytes(p, self.machine, cuts)
        allowed = kept - self._excess_bytes(evaluated)
        return stages.least_excess_bytes(p, cuts, allowed, working)

    def _ranks(self, program: Program, evaluated: Evaluated) -> list[RankUnits]:
        """The units of each rank, and how many microbatches of each are in flight when it may hold most."""
        p, cuts = evaluated.parallelism, evaluated.cuts
        ends = (*cuts, len(program.chain.units))
        kept_bytes = self.even(program).kept_bytes(p, cuts).tolist()
        found = []
        for kept, flights, stages in zip(kept_bytes, moments(p), own_stages(p).tolist(), strict=True):
            units = {
                unit: tuple(flight)
                for stage, flight in zip(stages, flights.T.tolist(), strict=True)
                for unit in range(ends[stage], ends[stage + 1])
            }
            found.append(RankUnits(units, tuple(kept)))
        return found


def _stages_of(options: OptionsOf, effort: Effort, program: Program) -> tuple[EvenStages, Variants]:
    """The stages of a program, and what its units may compute again."""
    table = StageTable(program.chain, options(program.chain.units))
    return EvenStages(table), Variants(table, effort)
