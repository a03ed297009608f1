"""What the blocks of one pipeline rank compute again: whole numbers for the stage layer's fractions.

A rank that holds D bytes too many, and keeps k_c microbatches of each of its N_c units of class c then, takes
n_cv of them in variant v:

    minimise  Σ e_cv n_cv      Σ_v n_cv = N_c,     Σ k_c (a_c0 - a_cv) n_cv ≥ D,     n_cv whole

a multiple-choice knapsack over kinds of unit, of which there are few, so OR-Tools proves it in milliseconds.
Within a class, and between like ones, the units that come first keep least: when the last of a stage runs,
and most is held, what they would keep is already counted, and in the backward their memory is the last to be
needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from autopar.search.effort import Effort, clocked
from autopar.search.solver import LinearModel, solve
from autopar.search.stage_table import StageTable

_ROUNDING_BYTES = 1024.0
"""Bytes are counted in these, so that the solver sees sizes it can tell apart."""

_LATER = 1e-3
"""By which part the last unit is counted slower than the first, where nothing else tells them apart."""

InFlight = Mapping[int, int]
"""Units of a rank, and how many microbatches of each are in flight when the rank holds most."""

Kind = tuple[int, int]
"""The first unit that some are like, and how many microbatches of them are in flight."""

Numbers = Mapping[Kind, tuple[int, ...]]
"""How many units of each kind use each of their variants."""


class Variants:
    """Chooses variants for the units of one chain."""

    def __init__(self, table: StageTable, effort: Effort) -> None:
        self.table = table
        self.effort = effort
        self._known: dict[tuple[object, ...], Numbers | None] = {}

    def choose(self, in_flight: InFlight, excess_bytes: float) -> dict[int, str] | None:
        """The variant of each of these units that makes a rank keep `excess_bytes` less, in the least time;
        None where nothing frees so much."""
        members: dict[Kind, list[int]] = {}
        for index, flight in in_flight.items():
            members.setdefault((self.kinds[index], flight), []).append(index)
        counts = {kind: len(each) for kind, each in members.items()}
        numbers = self._numbers(counts, excess_bytes)
        if numbers is None:
            return None
        found: dict[int, str] = {}
        for kind, each in members.items():
            names = self.table.options[each[0]]
            ordered = [name for name, number in zip(names, numbers[kind], strict=True) for _ in range(number)]
            found.update(zip(each, reversed(ordered), strict=True))
        return found

    def relieved(
        self, choices: Sequence[str], ranks: Sequence[InFlight], excess_bytes: Iterable[float]
    ) -> tuple[str, ...]:
        """What units keep so that each of the ranks holds so much less than with these choices; the least
        that they can where that does not suffice."""
        found = list(choices)
        for units, excess in zip(ranks, excess_bytes, strict=True):
            if excess > 0:
                freed = self.freed_bytes(units, {unit: choices[unit] for unit in units})
                chosen = self.choose(units, freed + excess)
                for unit in units:
                    found[unit] = chosen[unit] if chosen else self.table.options[unit][-1]
        return tuple(found)

    def freed_bytes(self, in_flight: InFlight, chosen: Mapping[int, str]) -> float:
        """What a rank keeps less with these variants than with the fastest."""
        units, options = self.table.chain.units, self.table.options
        return sum(
            in_flight[index]
            * float(units[index].saved[options[index][0]].num_bytes - units[index].saved[name].num_bytes)
            for index, name in chosen.items()
        )

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each unit the first one that is like it."""
        first: dict[object, int] = {}
        pairs = zip(self.table.chain.units, self.table.options, strict=True)
        return tuple(first.setdefault((id(u.recompute_s), names), n) for n, (u, names) in enumerate(pairs))

    def _numbers(self, counts: Mapping[Kind, int], excess_bytes: float) -> Numbers | None:
        """How many units of each kind use each of their variants."""
        excess = max(0, int(-(-excess_bytes // _ROUNDING_BYTES)))
        key = (tuple(sorted(counts.items())), excess)
        if key not in self._known:
            self._known[key] = self._solved(counts, excess)
        return self._known[key]

    @clocked("recomputation")
    def _solved(self, counts: Mapping[Kind, int], excess: int) -> Numbers | None:
        units, options = self.table.chain.units, self.table.options
        if not excess:
            return {kind: (number, *[0] * (len(options[kind[0]]) - 1)) for kind, number in counts.items()}
        model = LinearModel()
        freed = []
        variables: dict[Kind, list[int]] = {}
        for (like, flight), number in counts.items():
            unit, first = units[like], options[like][0]
            mine = variables[like, flight] = []
            for name in options[like]:
                seconds = unit.recompute_s[name] - unit.recompute_s[first]
                seconds *= 1 + _LATER * like / len(units)
                num_bytes = flight * (unit.saved[first].num_bytes - unit.saved[name].num_bytes)
                mine.append(model.variable(seconds, upper=float(number), integer=True))
                freed.append((mine[-1], num_bytes / _ROUNDING_BYTES / excess))
            model.row(number, number, [(variable, 1.0) for variable in mine])
        model.row(1.0, float("inf"), freed)
        solution = solve(model)
        self.effort.solved("recomputation", solution.size)
        if not solution.values:
            return None
        return {
            kind: tuple(round(solution.values[variable]) for variable in each)
            for kind, each in variables.items()
        }
