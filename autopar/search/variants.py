"""What the blocks of one pipeline rank compute again: whole numbers for the stage layer's fractions.

A rank whose units hold D bytes a microbatch too many takes n_cv of its N_c units of class c in variant v:

    minimise  Σ e_cv n_cv      Σ_v n_cv = N_c,     Σ (a_c0 - a_cv) n_cv ≥ D,     n_cv whole

a multiple-choice knapsack over kinds of unit, of which there are few, so OR-Tools proves it in milliseconds.
Within a class the units that come first keep least: when the last of a stage runs, and most is held, what
they would keep is already counted, and in the backward their memory is the last to be needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from autopar.search.effort import Effort, clocked
from autopar.search.solver import LinearModel, solve
from autopar.search.stages import StageTable

_ROUNDING_BYTES = 1024.0
"""Bytes are counted in these, so that the solver sees sizes it can tell apart."""


class Variants:
    """Chooses variants for the units of one chain."""

    def __init__(self, table: StageTable, effort: Effort) -> None:
        self.table = table
        self.effort = effort
        self._known: dict[tuple[object, ...], Mapping[int, tuple[int, ...]] | None] = {}

    def choose(self, units: Sequence[int], excess_bytes: float) -> dict[int, str] | None:
        """The variant of each of these units such that a microbatch keeps `excess_bytes` less, in the least
        time; None where nothing frees so much."""
        members: dict[int, list[int]] = {}
        for index in units:
            members.setdefault(self._kinds[index], []).append(index)
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

    def freed_bytes(self, chosen: Mapping[int, str]) -> float:
        """What a microbatch keeps less with these variants than with the fastest."""
        units, options = self.table.chain.units, self.table.options
        return sum(
            float(units[index].saved[options[index][0]].num_bytes - units[index].saved[name].num_bytes)
            for index, name in chosen.items()
        )

    def relaxed_s(self, units: Sequence[int], excess_bytes: float) -> float:
        """The least time if units could use fractions of variants, as `StageTable.relief_s`; infinite
        where nothing frees so much."""
        steps = []
        for index in units:
            unit, names = self.table.chain.units[index], self.table.options[index]
            for one, other in pairwise(names):
                freed = unit.saved[one].num_bytes - unit.saved[other].num_bytes
                if freed > 0:
                    steps.append(((unit.recompute_s[other] - unit.recompute_s[one]) / freed, freed))
        seconds, left = 0.0, excess_bytes
        for rate, freed in sorted(steps):
            taken = min(left, freed)
            seconds += rate * taken
            left -= taken
        return seconds if left <= _ROUNDING_BYTES else float("inf")

    @cached_property
    def _kinds(self) -> tuple[int, ...]:
        """For each unit the first one that is like it."""
        first: dict[object, int] = {}
        pairs = zip(self.table.chain.units, self.table.options, strict=True)
        return tuple(first.setdefault((id(u.recompute_s), names), n) for n, (u, names) in enumerate(pairs))

    def _numbers(
        self, counts: Mapping[int, int], excess_bytes: float
    ) -> Mapping[int, tuple[int, ...]] | None:
        """How many units of each kind use each of their variants."""
        excess = max(0, int(-(-excess_bytes // _ROUNDING_BYTES)))
        key = (tuple(sorted(counts.items())), excess)
        if key not in self._known:
            self._known[key] = self._solved(counts, excess)
        return self._known[key]

    @clocked("recomputation")
    def _solved(self, counts: Mapping[int, int], excess: int) -> Mapping[int, tuple[int, ...]] | None:
        if not excess:
            return {kind: (n, *[0] * (len(self.table.options[kind]) - 1)) for kind, n in counts.items()}
        model = LinearModel()
        freed = []
        variables: dict[int, list[int]] = {}
        for kind, number in counts.items():
            unit, names = self.table.chain.units[kind], self.table.options[kind]
            variables[kind] = []
            for name in names:
                seconds = unit.recompute_s[name] - unit.recompute_s[names[0]]
                size = (unit.saved[names[0]].num_bytes - unit.saved[name].num_bytes) / _ROUNDING_BYTES
                variable = model.variable(seconds, upper=float(number), integer=True)
                variables[kind].append(variable)
                freed.append((variable, size / excess))
            model.row(number, number, [(variable, 1.0) for variable in variables[kind]])
        model.row(1.0, float("inf"), freed)
        solution = solve(model)
        self.effort.solved("recomputation", solution.size)
        if not solution.values:
            return None
        return {
            kind: tuple(round(solution.values[variable]) for variable in each)
            for kind, each in variables.items()
        }
