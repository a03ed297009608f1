"""Plans in which blocks run different programs: those short of memory one that keeps less, the others the
fastest.

Programs at several prices of memory offer a block further ways to keep less, beside computing again. With
one program for what is outside of blocks, a `Blend` is a chain in which all of them are choices of a block:
in program v it takes T_v seconds and keeps b_v bytes, which for a block that would run program u is a variant
that repeats T_v - T_u seconds more. Cut and chosen from like any chain (`autopar.search.staging`), it says
which program suits which block, by the memory that is left on its stage.

A blend leaves out what depends on the neighbours, conversions where programs change, and how parameters are
stored. So what it says is made and priced for itself: no price of a blend is ever a plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import NamedTuple

from autopar.plan import Parallelism
from autopar.search.keep_sets import Choice, frontier
from autopar.search.local_programs import Program
from autopar.search.outcome import Solved, better
from autopar.search.programs import MEMORY_PRICES, Programs
from autopar.search.staging import Draft, StageLayer
from autopar.search.units import Unit

MOST_TRIES = 4
"""How many forms of what a blend says are priced."""

Origins = Mapping[str, int]
"""For each variant of a block, the program it is of: the level of its price of memory."""


class Blend(NamedTuple):
    """The choice between programs for every block; what is outside of them runs the one of level `outside`.

    `program` is the same program with the chain of all these choices, `origins` are those of its units.
    """

    outside: int
    program: Program
    origins: tuple[Origins, ...]

    def levels(self, choices: Sequence[str]) -> tuple[int, ...]:
        """The level of every block's program under the choices of all units."""
        units = zip(self.program.chain.units, self.origins, choices, strict=True)
        return tuple(origins[name] for unit, origins, name in units if unit.is_block)

    @property
    def is_mixed(self) -> bool:
        """Whether some block may run another program than what is outside."""
        pairs = zip(self.program.chain.units, self.origins, strict=True)
        return any(
            origins[name] != self.outside
            for unit, origins in pairs
            if unit.is_block
            for name in unit.frontier
        )


class Mixer:
    """Makes plans of several programs for one model on one cluster."""

    def __init__(self, programs: Programs, layer: StageLayer) -> None:
        self.programs = programs
        self.layer = layer
        self._blends: dict[tuple[object, ...], tuple[Blend, ...]] = {}

    def blends(self, p: Parallelism) -> tuple[Blend, ...]:
        """The blends of a candidate's programs: for each form of what is outside of blocks, those in which
        all blocks run one other program, and the one in which each may choose. None where these programs are
        one."""
        if p.tp == 1:
            return ()
        made = [self.programs.program(p, level) for level in range(len(MEMORY_PRICES))]
        key = tuple(program.key for program in made)
        if key not in self._blends:
            self._blends[key] = tuple(self._made(made))
        return self._blends[key]

    def _made(self, programs: Sequence[Program]) -> Iterator[Blend]:
        graph = self.programs.shallow.capture.graph
        inside = {op.name for block in graph.blocks for op in graph.ops[block.start : block.stop]}
        within = _distinct(programs, lambda name: name in inside)
        for outside in _distinct(programs, lambda name: name not in inside):
            for levels in (*([level] for level in within if level != outside), within):
                found = blend(programs, outside, levels)
                if found.is_mixed:
                    yield found

    def solve(self, p: Parallelism, blend: Blend, draft: Draft, below_s: float) -> Solved | None:
        """What a blend comes to, made and priced; None where it promises no step `below_s`, or comes to one
        program for all, or to programs that do not go together."""
        chosen = self.layer.solve(blend.program, p, draft)
        if chosen is None or not chosen.evaluated.fits or chosen.evaluated.step_s >= below_s:
            return None
        best = None
        for levels in islice(simpler(blend.levels(chosen.evaluated.choices)), MOST_TRIES):
            if {*levels} != {blend.outside}:
                program = self.programs.depths.mixed(p, blend.outside, levels)
                solved = None if program is None else self.layer.solve(program, p)
                best = best if solved is None else better(best, solved)
        return best


def simpler(levels: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The levels of blocks, and then again and again with the shortest run of equal ones made like the longer
    of its neighbours, until all are equal: where programs change, something is converted."""
    yield levels
    runs = [(level, len([*run])) for level, run in groupby(levels)]
    if len(runs) > 1:
        place = min(range(len(runs)), key=lambda at: runs[at][1])
        near = max((at for at in (place - 1, place + 1) if 0 <= at < len(runs)), key=lambda at: runs[at][1])
        runs[place] = runs[near][0], runs[place][1]
        yield from simpler(tuple(level for level, number in runs for _ in range(number)))


def _distinct(programs: Sequence[Program], concerns: Callable[[str], bool]) -> list[int]:
    """The levels of programs that differ in the strategies of the ops that this concerns."""
    found: dict[int, Mapping[str, str]] = {}
    for level, program in enumerate(programs):
        keys = {name: key for name, key in program.strategies["tp"].items() if concerns(name)}
        if keys not in found.values():
            found[level] = keys
    return [*found]


def blend(programs: Sequence[Program], outside: int, levels: Sequence[int]) -> Blend:
    """The blend of programs, of all levels: blocks choose between some, and what is outside of them runs
    one."""
    exposed = programs[0].chain.era.tensor_parallel_exposed
    parameters = dict(programs[outside].chain.parameters)
    known: dict[tuple[int, ...], tuple[Unit, Origins]] = {}
    units: list[Unit] = []
    all_origins: list[Origins] = []
    for alike in zip(*(program.chain.units for program in programs), strict=True):
        if not alike[0].is_block:
            units.append(alike[outside])
            all_origins.append(dict.fromkeys(alike[outside].frontier, outside))
            continue
        offered = {level: alike[level] for level in levels}
        kind = tuple(id(unit.recompute_s) for unit in offered.values())
        if kind not in known:
            known[kind] = _choices(offered, exposed)
        like, origins = known[kind]
        fastest = origins["none"]
        saved = {name: offered[level].saved[_plain(name)] for name, level in origins.items()}
        units.append(
            offered[fastest]._replace(recompute_s=like.recompute_s, frontier=like.frontier, saved=saved)
        )
        all_origins.append(origins)
        shards = programs[fastest].chain.parameters
        parameters |= {name: shards[name] for name in units[-1].parameters}
    chain = replace(programs[outside].chain, units=tuple(units), parameters=parameters)
    return Blend(outside, replace(programs[outside], chain=chain), tuple(all_origins))


def _choices(offered: Mapping[int, Unit], exposed: float) -> tuple[Unit, Origins]:
    """A block with the choices of its programs, as the fastest of these: the variants of that go by their
    names, those of others have the level before them."""
    times_s = {level: unit.cost.exposing(exposed).total_s for level, unit in offered.items()}
    fastest = min(times_s, key=times_s.__getitem__)
    origins, again_s, choices = {}, {}, []
    for level, unit in offered.items():
        for variant, seconds in unit.recompute_s.items():
            name = variant if level == fastest else f"{level}:{variant}"
            origins[name], again_s[name] = level, seconds + times_s[level] - times_s[fastest]
            if variant in unit.frontier:
                choices.append(Choice(name, (), again_s[name], unit.saved[variant].num_bytes))
    names = tuple(str(choice.kept) for choice in frontier(choices))
    return offered[fastest]._replace(recompute_s=again_s, frontier=names), origins


def _plain(name: str) -> str:
    """A variant's name in its own program."""
    return name.rpartition(":")[2]
