"""What runs of a chain's units take, hold and may compute again.

A run of units that has D bytes too much of each microbatch computes some again, for which it takes at least

    E(D) = min Σ e_uv x_uv    Σ (a_u0 - a_uv) x_uv ≥ D,   Σ_v x_uv = 1,   0 ≤ x_uv ≤ 1

seconds: unit u uses variant v, which keeps a_uv and repeats e_uv seconds. Variants lie on a convex frontier,
so the linear program is solved by taking the cheapest seconds a byte first, for all runs at once
(`RunSums.relief_s`).
"""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from autopar.search.runs import Array, Runs

if TYPE_CHECKING:
    from autopar.search.stage_table import StageTable


class RunSums:
    """The sums of a chain that no parallelism changes, over some runs of its units; each once it is asked
    for."""

    def __init__(self, table: StageTable, runs: Runs) -> None:
        self.runs = runs
        self._table = table

    @cached_property
    def forward_s(self) -> Array:
        """The forward of a run."""
        return self.runs.sums(self._table.unit_forward_s)

    @cached_property
    def backward_s(self) -> Array:
        """Its backward."""
        return self.runs.sums(self._table.unit_backward_s)

    @cached_property
    def communication_s(self) -> tuple[Array, Array]:
        """What of both is communication."""
        forward_s, backward_s = self._table.unit_communication_s
        return self.runs.sums(forward_s), self.runs.sums(backward_s)

    @cached_property
    def arrival_s(self) -> Array:
        """The forward of all that comes before a run."""
        return self.runs.before(self._table.unit_forward_s)

    @cached_property
    def return_s(self) -> Array:
        """The backward of all that comes before a run."""
        return self.runs.before(self._table.unit_backward_s)

    @cached_property
    def num_sharding_units(self) -> Array:
        """Units that are gathered and reduced by themselves, or one for all."""
        return np.maximum(1.0, self.runs.sums(self._table.unit_has_parameters))

    @cached_property
    def elements(self) -> tuple[Array, Array]:
        """Elements of dense parameters and of experts."""
        dense, experts = self._table.unit_elements
        return self.runs.sums(dense), self.runs.sums(experts)

    @cached_property
    def elements_before(self) -> Array:
        """Elements of all parameters before a run."""
        dense, experts = self._table.unit_elements
        return self.runs.before(dense + experts)

    @cached_property
    def block_elements(self) -> Array:
        """Elements of the largest block."""
        return self.runs.largest(self._table.block_elements)

    @cached_property
    def root_elements(self) -> Array:
        """Elements outside of blocks."""
        return self.runs.sums(self._table.root_elements)

    @cached_property
    def largest_weights(self) -> Array:
        """Elements of the weights of the largest block, one matrix of every stack."""
        return self.runs.largest(self._table.unit_weights)

    @cached_property
    def saved_bytes(self) -> Array:
        """What a run keeps of a microbatch with the fastest variants."""
        return self.runs.sums(self._table.unit_saved_bytes)

    @cached_property
    def working_bytes(self) -> Array:
        """What its last unit holds beside what is kept."""
        return self.runs.last(self._table.unit_working_bytes)

    @cached_property
    def segments(self) -> list[tuple[float, float, Array]]:
        """What its units can free, the cheapest first: seconds a byte, bytes each, and how many units."""
        return [(s.rate, s.freed_bytes, self.runs.sums(s.members)) for s in self._table.segments]

    def accumulating(self, seconds: float) -> RunSums:
        """The same where each parameter's gradient takes so long to be added to those of other
        microbatches."""
        if not seconds:
            return self
        found = copy(self)
        found.backward_s = self.backward_s + seconds * sum(self.elements)
        found.return_s = self.return_s + seconds * self.elements_before
        return found

    def computing(self) -> RunSums:
        """The same with all communication in the runs hidden; not in what comes before them."""
        found = copy(self)
        found.forward_s = self.forward_s - self.communication_s[0]
        found.backward_s = self.backward_s - self.communication_s[1]
        return found

    def relief_s(self, excess_bytes: Array) -> Array:
        """E: the least time in which units free so many bytes of a microbatch; infinite where they cannot."""
        left = np.maximum(0.0, excess_bytes)
        seconds = np.zeros_like(left)
        if not left.any():
            return seconds
        for rate, freed, number in self.segments:
            taken = np.minimum(left, freed * number)
            seconds += rate * taken
            left -= taken
        seconds[left > 1e-6 * np.maximum(1.0, excess_bytes)] = np.inf
        return seconds
