"""What runs of a chain's units take, hold and may compute again.

A run of units that has D bytes too much of each microbatch computes some again, for which it takes at least

    E(D) = min Σ e_uv x_uv    Σ (a_u0 - a_uv) x_uv ≥ D,   Σ_v x_uv = 1,   0 ≤ x_uv ≤ 1

seconds: unit u uses variant v, which keeps a_uv and repeats e_uv seconds. Variants lie on a convex frontier,
so the linear program is solved by taking the cheapest seconds a byte first, for all runs at once
(`RunSums.relief_s`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from autopar.search.runs import Array, Runs

if TYPE_CHECKING:
    from autopar.search.stage_table import Segment, StageTable


class RunSums:
    """The sums of a chain that no parallelism changes, over some runs of its units.

    Attributes:
        forward_s, backward_s: the passes of a run; communication_s: what of each is communication; weight_s:
            the gradients of weights among the backward.
        arrival_s, return_s: the forward and the backward of all that comes before it.
        num_sharding_units: units that are gathered and reduced by themselves, or one for all.
        elements: of dense parameters and of experts; elements_before: of both, before the run.
        block_elements: of the largest block; root_elements: outside of blocks; largest_weights: of the
            weights of the largest block, one matrix of every stack.
        saved_bytes: what a run keeps of a microbatch with the fastest variants; working_bytes: what its last
            unit holds beside what is kept.
    """

    def __init__(self, table: StageTable, runs: Runs) -> None:
        self.runs = runs
        self.forward_s = runs.sums(table.unit_forward_s)
        self.backward_s = runs.sums(table.unit_backward_s)
        self.communication_s = tuple(map(runs.sums, table.unit_communication_s))
        self.weight_s = runs.sums(table.unit_weight_s)
        self.arrival_s = runs.before(table.unit_forward_s)
        self.return_s = runs.before(table.unit_backward_s)
        self.num_sharding_units = np.maximum(1.0, runs.sums(table.unit_has_parameters))
        self.elements = tuple(map(runs.sums, table.unit_elements))
        self.elements_before = runs.before(np.sum(table.unit_elements, axis=0))
        self.block_elements = runs.largest(table.block_elements)
        self.root_elements = runs.sums(table.root_elements)
        self.largest_weights = runs.largest(table.unit_weights)
        self.saved_bytes = runs.sums(table.unit_saved_bytes)
        self.working_bytes = runs.last(table.unit_working_bytes)
        self._segments = cache(partial(_freed, table.segments, runs))  # one for all copies

    @property
    def segments(self) -> list[tuple[float, float, Array]]:
        """What its units can free, the cheapest first: seconds a byte, bytes each, and how many units."""
        return self._segments()

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


def _freed(segments: Sequence[Segment], runs: Runs) -> list[tuple[float, float, Array]]:
    return [(each.rate, each.freed_bytes, runs.sums(each.members)) for each in segments]
