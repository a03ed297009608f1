"""What the blocks of one pipeline rank compute again: whole numbers for the stage layer's fractions.

A rank that at moment t keeps k_tc microbatches of each of its N_c units of class c, and then D_t bytes too
many, takes n_cv of them in variant v:

    minimise  Σ e_cv n_cv      Σ_v n_cv = N_c,     Σ k_tc (a_c0 - a_cv) n_cv ≥ D_t for all t,     n_cv whole

a multiple-choice knapsack over kinds of unit, of which there are few, so OR-Tools is close in milliseconds.
Within a class, and between like ones, the units that come first keep least: when the last of a stage runs,
and most is held, what they would keep is already counted, and in the backward their memory is the last to be
needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from math import ceil
from typing import NamedTuple

from autopar.search.effort import Effort, clocked
from autopar.search.linear_model import LinearModel
from autopar.search.solver import solve
from autopar.search.stage_table import StageTable

MOST_NODES = 32
"""How many branches are looked at for the best numbers; mostly a few will do."""

ENOUGH = 1e-3
"""By which part of its time a choice may be above the best one."""

_ROUNDING_BYTES = 1024.0
"""Bytes are counted in these, so that the solver sees sizes it can tell apart."""

_LATER = 1e-3
"""By which part the last unit is counted slower than the first, where nothing else tells them apart."""

Flights = tuple[int, ...]
"""How many microbatches of a unit are in flight at each moment when its rank may keep most."""

Kind = tuple[int, Flights]
"""The first unit that some are like, and how many microbatches of them are in flight."""

Numbers = Mapping[Kind, tuple[int, ...]]
"""How many units of each kind use each of their variants."""


class RankUnits(NamedTuple):
    """The units of a rank, and what it keeps at each moment with the fastest variants."""

    flights: Mapping[int, Flights]
    kept_bytes: tuple[float, ...]


class Variants:
    """Chooses variants for the units of one chain."""

    def __init__(self, table: StageTable, effort: Effort) -> None:
        self.table = table
        self.effort = effort
        self._known: dict[tuple[object, ...], Numbers | None] = {}

    def choose(self, rank: RankUnits, allowed_bytes: float) -> dict[int, str] | None:
        """The variant of each unit with which a rank keeps so much at most, in the least time; None where
        none keep so little."""
        members: dict[Kind, list[int]] = {}
        for index, flights in rank.flights.items():
            members.setdefault((self.kinds[index], flights), []).append(index)
        counts = {kind: len(each) for kind, each in members.items()}
        numbers = self._numbers(counts, [kept_bytes - allowed_bytes for kept_bytes in rank.kept_bytes])
        if numbers is None:
            return None
        found: dict[int, str] = {}
        for kind, each in members.items():
            names = self.table.options[each[0]]
            ordered = [name for name, number in zip(names, numbers[kind], strict=True) for _ in range(number)]
            found.update(zip(each, reversed(ordered), strict=True))
        return found

    def relieved(
        self, choices: Sequence[str], ranks: Sequence[RankUnits], excess_bytes: Iterable[float]
    ) -> tuple[str, ...]:
        """What units keep so that each of the ranks holds so much less than with these choices; the least
        that they can where that does not suffice."""
        found = list(choices)
        for rank, excess in zip(ranks, excess_bytes, strict=True):
            if excess > 0:
                chosen = self.choose(rank, self.kept_bytes(rank, choices) - excess)
                for unit in rank.flights:
                    found[unit] = chosen[unit] if chosen else self.table.options[unit][-1]
        return tuple(found)

    def kept_bytes(self, rank: RankUnits, choices: Sequence[str]) -> float:
        """What a rank keeps at most with these variants."""
        kept = list(rank.kept_bytes)
        for unit, flights in rank.flights.items():
            freed_bytes = self._freed_bytes(unit, choices[unit])
            kept = [before - flight * freed_bytes for before, flight in zip(kept, flights, strict=True)]
        return max(kept)

    def _freed_bytes(self, unit: int, name: str) -> float:
        """What a unit keeps less of a microbatch with this variant than with the fastest."""
        saved = self.table.chain.units[unit].saved
        return float(saved[self.table.options[unit][0]].num_bytes - saved[name].num_bytes)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each unit the first one that is like it."""
        first: dict[object, int] = {}
        pairs = zip(self.table.chain.units, self.table.options, strict=True)
        return tuple(first.setdefault((id(u.recompute_s), names), n) for n, (u, names) in enumerate(pairs))

    def _numbers(self, counts: Mapping[Kind, int], excess_bytes: Sequence[float]) -> Numbers | None:
        """How many units of each kind use each of their variants, if so much must be freed at each moment."""
        excess = tuple(max(0, int(-(-each // _ROUNDING_BYTES))) for each in excess_bytes)
        key = (tuple(sorted(counts.items())), excess)
        if key not in self._known:
            self._known[key] = self._solved(counts, excess)
        return self._known[key]

    @clocked("recomputation")
    def _solved(self, counts: Mapping[Kind, int], excess: Sequence[int]) -> Numbers | None:
        units, options = self.table.chain.units, self.table.options
        if not any(excess):
            return {kind: (number, *[0] * (len(options[kind[0]]) - 1)) for kind, number in counts.items()}
        model = LinearModel()
        freed: list[list[tuple[int, float]]] = [[] for _ in excess]
        variables: dict[Kind, list[int]] = {}
        for (like, flights), number in counts.items():
            unit, first = units[like], options[like][0]
            mine = variables[like, flights] = []
            for name in options[like]:
                seconds = unit.recompute_s[name] - unit.recompute_s[first]
                seconds *= 1 + _LATER * like / len(units)
                mine.append(model.variable(seconds, upper=float(number), integer=True))
                num_bytes = self._freed_bytes(like, name) / _ROUNDING_BYTES
                for terms, flight in zip(freed, flights, strict=True):
                    terms.append((mine[-1], flight * num_bytes))
            model.row(number, number, [(variable, 1.0) for variable in mine])
        for terms, most in zip(freed, excess, strict=True):
            if most:
                model.row(1.0, float("inf"), [(variable, size / most) for variable, size in terms if size])
        rounding = partial(_deeper, runs=list(variables.values()))
        solution = solve(model, node_limit=MOST_NODES, relative_gap=ENOUGH, rounding=rounding)
        if solution.status == "unknown":
            solution = solve(model)
        self.effort.solved("recomputation", solution.size)
        if not solution.values:
            return None
        return {
            kind: tuple(round(solution.values[variable]) for variable in each)
            for kind, each in variables.items()
        }


def _deeper(values: Sequence[float], runs: Sequence[Sequence[int]]) -> list[float]:
    """Whole numbers that free no less than these: of each kind's variants, whose variables are a run, at
    least as many keep as little as each, or less."""
    found = list(values)
    for run in runs:
        fraction, whole = 0.0, 0
        for variable in reversed(run):
            fraction += values[variable]
            number = ceil(fraction - 1e-6) - whole
            whole += number
            found[variable] = float(number)
    return found
