"""One way to run a program, solved: its stages, what their blocks compute again, its price and a bound on it.

With one stage a rank the cuts are those of `StageTable.cut`, and its value is the bound. Schedules with
several stages on a rank, whose bubble shrinks only if those are alike, are cut as evenly as the units allow;
then only what is computed again is left to decide, and the bound is the step with fractions of variants.
Memory is judged by the exact ledger: what a rank exceeds it by is taken off its units until it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

from autopar.plan import Parallelism
from autopar.search.effort import clocked, cut_size
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.outcome import Solved, better
from autopar.search.programs import Program, Programs
from autopar.search.stages import Cut, Machine, Options, StageTable, Where
from autopar.search.units import Unit
from autopar.search.variants import Variants
from costmodel import Ledger, peak_in_flight
from costmodel.orders import rank_stages

NUM_REPAIRS = 16
"""How often what does not fit yet is taken off again; the second time it mostly fits."""

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
        self._tables: dict[int, tuple[Program, StageTable, Variants]] = {}

    def table(self, program: Program) -> StageTable:
        """The sums of a program's chain."""
        return self._of(program)[0]

    def _of(self, program: Program) -> tuple[StageTable, Variants]:
        key = id(program)
        if key not in self._tables:
            table = StageTable(program.chain, self.options(program.chain.units))
            self._tables[key] = program, table, Variants(table, self.effort)
        return self._tables[key][1:]

    def schedule_floor_s(self, p: Parallelism, program: Program | None = None) -> float:
        """No step takes less, whatever the data axes do; 0 where cuts are still open. Without a program, that
        of one device is divided over the ranks of all stages."""
        if p.num_virtual_stages == 1:
            return 0.0
        cuts = self._even(p)
        if cuts is None:
            return float("inf")
        table, degree = (self._device(p), p.tp * p.cp) if program is None else (self.table(program), 1)
        return table.schedule_floor_s(p, cuts) / degree + self.evaluator.era.step_overhead_s

    @clocked("stages")
    def floor_s(self, program: Program, p: Parallelism) -> float:
        """No step takes less; infinite where memory, or the number of units, allows no stages at all. Quick
        where `draft` is exact."""
        if p.pp > 1 and p.num_virtual_stages == 1:
            return 0.0
        cuts = self._even(p)
        if cuts is None:
            return float("inf")
        bound_s = self.table(program).even_bound_s(p, self._machine(p), cuts)
        return bound_s + self.evaluator.era.step_overhead_s

    @clocked("stages")
    def draft(self, program: Program, p: Parallelism) -> Draft | None:
        """The cuts of a way and its bound; None where memory, or the number of units, allows none."""
        table, variants = self._of(program)
        if p.pp > 1 and p.num_virtual_stages == 1:
            cut = self._cut(table, p, fitting=True)
            return None if cut is None else Draft(cut.cuts, cut.bound_s + self.evaluator.era.step_overhead_s)
        cuts = self._even(p)
        if cuts is None:
            return None
        self.effort.solved("stages")
        evaluated = self.evaluator.evaluate(table.chain, p, cuts, table.base)
        bound_s = self._relaxed_s(variants, evaluated)
        return None if bound_s == float("inf") else Draft(cuts, bound_s)

    def _cut(self, table: StageTable, p: Parallelism, *, fitting: bool) -> Cut | None:
        self.effort.solved("stages", cut_size(table.num_units, p.pp))
        where, send_s = self.where(table.chain.units), self.evaluator.messages_s(table.chain, p)
        return table.cut(p, self._machine(p), send_s, where, fitting=fitting)

    def _device(self, p: Parallelism) -> StageTable:
        return self.table(self.programs.device(p.microbatch_size, p.ep))

    def _even(self, p: Parallelism) -> tuple[int, ...] | None:
        """Even for one device; the programs of all ranks are cut alike."""
        if p.pp == 1:
            return (0,)
        table = self._device(p)
        return table.even(p.pp * p.num_virtual_stages, self.where(table.chain.units))

    def _machine(self, p: Parallelism) -> Machine:
        device = self.evaluator.cluster.device
        return Machine(
            self.evaluator.placed(p),
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
        return reduce(better, (self._solved(program, p, each, draft.bound_s) for each in dict.fromkeys(cuts)))

    def _solved(self, program: Program, p: Parallelism, cuts: tuple[int, ...], bound_s: float) -> Solved:
        """The variants that fit into given cuts."""
        table, _ = self._of(program)
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
        table, variants = self._of(program)
        ranks = _rank_units(first)
        freed = [0.0] * len(ranks)
        evaluated = first
        choices = list(table.base)
        for _ in range(NUM_REPAIRS):
            excess = self._excess_bytes(evaluated)
            if not any(excess):
                break
            for rank, units in enumerate(ranks):
                if not excess[rank]:
                    continue
                chosen = variants.choose(units, freed[rank] + excess[rank])
                chosen = chosen or {n: table.options[n][-1] for n in units}
                freed[rank] = variants.freed_bytes(chosen)
                for index, name in chosen.items():
                    choices[index] = name
            again = self.evaluator.evaluate(table.chain, first.parallelism, first.cuts, choices)
            if again.choices == evaluated.choices:
                break  # nothing is left to free
            evaluated = again
        return evaluated

    def _relaxed_s(self, variants: Variants, evaluated: Evaluated) -> float:
        """The step if units could use fractions of variants; infinite where nothing frees enough."""
        if evaluated.fits:
            return evaluated.step_s
        stages = list(evaluated.stages)
        p = evaluated.parallelism
        excess = self._excess_bytes(evaluated)
        for rank, units in enumerate(_rank_units(evaluated)):
            if not excess[rank]:
                continue
            again_s = variants.relaxed_s(units, excess[rank])
            if again_s == float("inf"):
                return again_s
            mine = rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages)
            whole_s = sum(stages[stage].forward_s + stages[stage].backward_s for stage in mine)
            for stage in mine:
                work = stages[stage]
                share = (work.forward_s + work.backward_s) / whole_s
                stages[stage] = replace(work, recompute_s=work.recompute_s + share * again_s)
        return self.evaluator.step(stages, evaluated.chain, p, evaluated.cuts).total_s

    def _excess_bytes(self, evaluated: Evaluated) -> list[float]:
        """What each microbatch in flight would have to keep less on each rank."""
        p = evaluated.parallelism
        flights = peak_in_flight(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages)
        wasted = 1 + evaluated.chain.era.fragmentation

        def excess(ledger: Ledger, flight: int) -> float:
            too_many = max(0.0, ledger.total_bytes - evaluated.memory_bytes)
            return too_many * p.num_virtual_stages / (wasted * flight)

        return [excess(*pair) for pair in zip(evaluated.ledgers, flights, strict=True)]


def _rank_units(evaluated: Evaluated) -> list[list[int]]:
    """The units of each rank."""
    p = evaluated.parallelism
    ends = (*evaluated.cuts, len(evaluated.chain.units))
    return [
        [
            unit
            for stage in rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages)
            for unit in range(ends[stage], ends[stage + 1])
        ]
        for rank in range(p.pp)
    ]
