"""What no program of a layout can beat, made like a program, and floors on its time alone.

Kept of each layout, as candidates ask for them again and again; what they rest on is said in
`autopar.search.relaxed`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from autopar.plan import Parallelism
from autopar.search.block_floor import BlockFloor, kept_relaxations
from autopar.search.block_ilp import MANY_MICROBATCHES
from autopar.search.context import exchange_floor_s
from autopar.search.local_programs import MOST_PROBLEMS, Program, ProgramKey
from autopar.search.relaxed import relaxed
from autopar.search.unit_floor import MIXED, UnitFloor
from autopar.search.units import in_turns, stretches
from costmodel.orders import OVERLAPPING_SCHEDULES

if TYPE_CHECKING:
    from autopar.search.programs import Programs

SMALLEST_SHARE = 0.01
"""Units that take less than this part of a microbatch are bounded without their collectives."""

SMALLEST_TRADE = 0.05
"""Units that take less than this part are thought to compute again without communicating more: a linear
program for every price of memory tells better, but a few kinds of units have most of the time."""


class LeastPrograms:
    """The floors under the programs of one model."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self._context_floors_s: dict[tuple[int, int, int], float] = {}
        self._relaxed: dict[tuple[ProgramKey, bool, float | None], Program] = {}
        self._divided: dict[tuple[ProgramKey, float | None], Program] = {}
        self._relaxation_of = kept_relaxations()
        self._floors_of = lru_cache(MOST_PROBLEMS)(self._found_floors)

    def divided(self, p: Parallelism, multiple: int) -> Program:
        """What one device does, divided over the ranks of a candidate's layout, with the least that these
        communicate in a microbatch of so many times its size: no program of it takes, or keeps, less. Quicker
        to make than any of those, as the problem of the axis, and what it trades, is that of all sizes."""
        if p.tp * p.cp == 1:
            return self.programs.program(p)
        key, arithmetic = self.programs.key(p, 0), _arithmetic(p, mixed=False)
        if (key, arithmetic) not in self._divided:
            device = self.programs.device(p.microbatch_size, p.ep).chain
            floors: list[UnitFloor | None] = [None] * len(device.units)
            if p.tp > 1 and p.ep == 1:
                floors = self._floors_of(_floor_key(multiple * p.microbatch_size, p.tp))
            chain = relaxed(device, p.tp, p.cp, floors, part=1 / (p.cp * multiple), arithmetic=arithmetic)
            self._divided[key, arithmetic] = Program(key, chain, None, {})
        return self._divided[key, arithmetic]

    def relaxed(self, p: Parallelism, *, trades: bool = True, mixed: bool = False) -> Program:
        """What no program of a candidate's layout can beat, whatever memory costs: a program but for its
        strategies. A quick one without `trades`, and where its schedule hides communication one that counts
        whole backwards too, `mixed` with arithmetic (`autopar.search.relaxed`)."""
        key, arithmetic = self.programs.key(p, 0), _arithmetic(p, mixed=mixed)
        if (key, trades, arithmetic) not in self._relaxed:
            device = self.programs.device(p.microbatch_size, p.ep).chain
            floors = self._floors_of(key._replace(num_microbatches=1))  # of which none depends on it
            chain = relaxed(device, p.tp, p.cp, floors, trades=trades, arithmetic=arithmetic)
            self._relaxed[key, trades, arithmetic] = Program(key, chain, None, {})
        return self._relaxed[key, trades, arithmetic]

    def _found_floors(self, key: ProgramKey) -> list[UnitFloor | None]:
        """The floors of units in the axis's problem, of which experts that are dealt out are no part."""
        units = self.programs.device(key.microbatch_size, key.ep).chain.units
        if key.ep > 1:
            return [None] * len(units)
        device = self.programs.replica(key.microbatch_size, 1).local.graph
        replica, ilp = self.programs.replica_of(key), self.programs.ilp(key)
        device_s = sum(unit.cost.total_s for unit in units)
        repeats = self.programs.shallow.repeats
        runs = [(run, repeats.get(run[2] or "", 1)) for run in stretches(replica.whole, replica.local.graph)]
        known: dict[tuple[int, int], UnitFloor] = {}
        found: list[UnitFloor | None] = []
        for unit, ((start, stop, block), _) in zip(units, in_turns(runs), strict=True):
            all_s = repeats.get(block or "", 1) * unit.cost.total_s
            if all_s <= SMALLEST_SHARE * device_s:
                found.append(None)
                continue
            if (start, stop) not in known:
                ops = BlockFloor(ilp, start, stop, self._relaxation_of)
                trades = all_s > SMALLEST_TRADE * device_s
                its = device.ops[unit.start : unit.start + len(unit.kernels)]
                names = tuple([op.name for op in its])
                known[start, stop] = UnitFloor(ops, unit, names, key.tp * key.cp, trades)
            found.append(known[start, stop])
        return found

    def floor_s(self, microbatch_size: int, tp: int) -> float:
        """No program of a tensor axis of `tp` ranks takes less for a microbatch, whatever memory costs.

        Also per sample for every smaller microbatch: each price is the larger of constants and terms linear
        in the batch, so half the batch costs at least half as much.
        """
        return self.programs.ilp(_floor_key(microbatch_size, tp)).solve(MANY_MICROBATCHES).bound_s

    def computed_floor_s(self, microbatch_size: int, tp: int) -> float:
        """What any of them computes at least, whatever it communicates."""
        return sum(self.programs.ilp(_floor_key(microbatch_size, tp)).problem.computed_s.values())

    def context_floor_s(self, microbatch_size: int, tp: int, cp: int) -> float:
        """No context axis of `cp` ranks adds less to a microbatch, beside a tensor axis of `tp`."""
        key = (microbatch_size, tp, cp)
        if key not in self._context_floors_s:
            graph = self.programs.graph(microbatch_size)
            pricer = self.programs.pricer(1, cp, 1, tp)
            counts = self.programs.shallow.counts
            found_s = (counts[op.name] * exchange_floor_s(op, graph, pricer, tp) for op in graph.ops)
            exposed = pricer.era.tensor_parallel_exposed
            self._context_floors_s[key] = exposed * sum(found_s)
        return self._context_floors_s[key]


def _arithmetic(p: Parallelism, *, mixed: bool) -> float | None:
    """How much of the mixture is arithmetic that a way's floors count; None where nothing is hidden."""
    if p.schedule not in OVERLAPPING_SCHEDULES:
        return None
    return MIXED if mixed else 1.0


def _floor_key(microbatch_size: int, tp: int) -> ProgramKey:
    """A tensor axis alone, whatever else there is."""
    return ProgramKey(microbatch_size, 1, 1, 1, tp, None, 1, 0)
