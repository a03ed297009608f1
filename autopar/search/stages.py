"""Stages: where to cut a chain of units so that the slowest stage is as fast as memory allows.

With T_ij the time that units [i, j) take for one microbatch, and M_sij what they hold as stage s, which has
as many microbatches in flight as the schedule gives it,

    best_1(j) = T_0j                                     where M_10j ≤ memory
    best_s(j) = min over i < j of max(best_{s-1}(i), T_ij)   where M_sij ≤ memory

and best_p(n) is the answer: exact, since the units are a chain, and quick, since there are few of them. The
slowest stage decides because a step takes (m - 1) max T + Σ T and the sum does not depend on the cuts (Mist,
arXiv:2503.19050). With several virtual stages on a rank each gets an equal share of the memory, which is
sufficient, not necessary.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.plan import Parallelism, Recompute
from autopar.search.data_axes import data_groups
from autopar.search.pieces import num_weights
from autopar.search.units import Chain
from costmodel import (
    OptimizerPolicy,
    model_state_ledger,
    peak_activation_bytes,
    peak_in_flight,
    pipeline_lower_bound_s,
)
from costmodel.orders import rank_stages, stage_ranks

Matrix = NDArray[np.float64]


class Shares(NamedTuple):
    """To what share parameters and saved activations are thought to shrink; 1 leaves them as they are."""

    parameters: float
    saved: float


WHOLE = Shares(1.0, 1.0)


class StageTable:
    """T and the parts of M for all pairs (i, j) of one chain under one recompute mode."""

    def __init__(self, chain: Chain, recompute: Recompute) -> None:
        self.chain = chain
        self.recompute = recompute
        self.num_units = len(chain.units)

    @cached_property
    def times_s(self) -> Matrix:
        return _sums([unit.cost.total_s + unit.recompute_s[self.recompute] for unit in self.chain.units])

    @cached_property
    def forward_s(self) -> Matrix:
        """The forward's part of T."""
        return _sums([unit.cost.forward_total_s for unit in self.chain.units])

    @cached_property
    def parameters(self) -> Matrix:
        """Elements of parameters; one that several units share counts for each of them."""
        return _sums(self._unit_elements())

    @cached_property
    def parameters_once(self) -> Matrix:
        """Elements of parameters, each for the first unit that has it: right on a single rank."""
        seen: set[str] = set()
        sizes = []
        for unit in self.chain.units:
            fresh = [name for name in unit.parameters if name not in seen]
            seen.update(fresh)
            sizes.append(float(sum(self.chain.parameters[name].num_elements for name in fresh)))
        return _sums(sizes)

    @cached_property
    def root_parameters(self) -> Matrix:
        """Elements of the parameters outside of blocks."""
        pairs = zip(self.chain.units, self._unit_elements(), strict=True)
        return _sums([0.0 if unit.is_block else size for unit, size in pairs])

    @cached_property
    def largest_unit(self) -> Matrix:
        return _running_max(self._unit_elements())

    @cached_property
    def saved_bytes(self) -> Matrix:
        return _sums(self._fresh_bytes())

    def _fresh_bytes(self) -> list[float]:
        """What each unit keeps that none before it does."""
        seen: set[str] = set()
        sizes = []
        for unit in self.chain.units:
            saved = unit.saved[self.recompute]
            fresh = sum(size for storage, size in saved.storages.items() if storage not in seen)
            seen.update(saved.storages)
            sizes.append(float(fresh + saved.internal_bytes))
        return sizes

    @cached_property
    def working_bytes(self) -> Matrix:
        """What is held at most beside all that is saved: while a unit works, later ones save nothing yet."""
        before = np.concatenate([[0.0], np.cumsum(self._fresh_bytes())])
        peaks = [unit.saved[self.recompute].peak_bytes for unit in self.chain.units]
        fullest = _running_max([before[index] + peak for index, peak in enumerate(peaks)])
        working: Matrix = np.maximum(0.0, fullest - before[None, :])
        return working

    @cached_property
    def largest_weights(self) -> Matrix:
        return _running_max([num_weights(unit, self.chain.parameters) for unit in self.chain.units])

    def _unit_elements(self) -> list[float]:
        shards = self.chain.parameters
        return [
            float(sum(shards[name].num_elements for name in unit.parameters)) for unit in self.chain.units
        ]

    def _fixed_bytes(self, p: Parallelism, policy: OptimizerPolicy, shares: Shares) -> Matrix:
        """The part of M that does not depend on what is in flight."""
        degree = data_groups(p)[0].size
        per_element = shares.parameters * model_state_ledger(1.0, policy, p.zero_stage, degree).total_bytes
        parameters = self.parameters_once if p.pp == 1 else self.parameters
        moving = self.working_bytes
        if self.chain.era.cached_weight_gradients:
            moving = moving + shares.parameters * policy.gathered_bytes * self.largest_weights
        if degree > 1 and p.zero_stage >= 2:
            gathered = (policy.gathered_bytes + policy.gradient_bytes) * self.largest_unit
            if p.zero_stage == 3:
                gathered = gathered + policy.gathered_bytes * (2 * self.largest_unit + self.root_parameters)
            moving = moving + shares.parameters * gathered
        return per_element * parameters + self._wasteful * moving

    @property
    def _wasteful(self) -> float:
        """What the allocator holds for a byte that comes and goes."""
        return 1 + self.chain.era.fragmentation

    def peak_bytes(
        self, p: Parallelism, policy: OptimizerPolicy, cuts: tuple[int, ...], shares: Shares = WHOLE
    ) -> float:
        """What the fullest rank holds with these cuts; what several stages' units share counts for each of
        them."""
        at = list(cuts), [*cuts[1:], self.num_units]
        fixed = self._fixed_bytes(p, policy, shares)[at]
        saved = self._wasteful * shares.saved * self.saved_bytes[at]
        peaks = peak_activation_bytes(
            p.schedule, p.pp, p.num_microbatches, saved.tolist(), p.num_virtual_stages
        )
        mine = [[*rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages)] for rank in range(p.pp)]
        return max(float(fixed[own].sum()) + peak for own, peak in zip(mine, peaks, strict=True))

    def floor_s(self, p: Parallelism) -> float:
        """What the pipeline takes at least with the cuts that are best when memory is no matter."""
        cuts = self._cheapest([np.ones_like(self.times_s, dtype=bool)] * (p.pp * p.num_virtual_stages))
        assert cuts is not None
        at = list(cuts), [*cuts[1:], self.num_units]
        forward_s, both_s = self.forward_s[at], self.times_s[at]
        return pipeline_lower_bound_s(
            p.pp,
            p.num_microbatches,
            forward_s.tolist(),
            (both_s - forward_s).tolist(),
            num_virtual=p.num_virtual_stages,
        )

    def partition(
        self, p: Parallelism, policy: OptimizerPolicy, memory_bytes: float, shares: Shares = WHOLE
    ) -> tuple[int, ...] | None:
        """The first units of the best stages, 0 first. Where memory fits no cuts at all, the best that ignore
        it; None when there are fewer units than stages."""
        num_stages = p.pp * p.num_virtual_stages
        if num_stages > self.num_units:
            return None
        if num_stages == 1:
            return (0,)
        flights = peak_in_flight(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages)
        budget = memory_bytes / p.num_virtual_stages
        fixed = self._fixed_bytes(p, policy, shares)
        saved = self._wasteful * shares.saved / p.num_virtual_stages * self.saved_bytes
        held = [fixed + flights[rank] * saved <= budget for rank in range(p.pp)]
        ranks = stage_ranks(p.schedule, p.pp, p.num_virtual_stages)
        return self._cheapest([held[rank] for rank in ranks]) or self._cheapest(
            [np.ones_like(self.times_s, dtype=bool)] * num_stages
        )

    def _cheapest(self, allowed: list[NDArray[np.bool_]]) -> tuple[int, ...] | None:
        best = np.where(allowed[0][0], self.times_s[0], np.inf)
        best[0] = np.inf
        came_from = []
        for fits in allowed[1:]:
            through = np.where(fits, np.maximum(best[:, None], self.times_s), np.inf)
            came_from.append(through.argmin(axis=0))
            best = through.min(axis=0)
        if not np.isfinite(best[-1]):
            return None
        cuts = [self.num_units]
        for previous in reversed(came_from):
            cuts.append(int(previous[cuts[-1]]))
        return (0, *reversed(cuts[1:]))


def _sums(values: list[float]) -> Matrix:
    """Entry (i, j) is the sum of values [i, j), infinite where j ≤ i."""
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    return _upper(prefix[None, :] - prefix[:, None])


def _running_max(values: list[float] | list[int]) -> Matrix:
    """Entry (i, j) is the largest of values [i, j), infinite where j ≤ i."""
    size = len(values) + 1
    table = np.full((size, size), np.inf)
    for i in range(len(values)):
        table[i, i + 1 :] = np.maximum.accumulate(np.asarray(values[i:], dtype=np.float64))
    return table


def _upper(table: Matrix) -> Matrix:
    return np.where(np.triu(np.ones_like(table, dtype=bool), 1), table, np.inf)
