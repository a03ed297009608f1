"""What a pipeline with several stages a rank takes at least once its ranks must compute something again.

A chain of work, each waiting for the one before, is as long as the step or shorter, whatever its ops take.
Let chain c pass backward through stage s g_cs times; if the stage computes e_s seconds again, the step takes
at least

    max over c of  L_c + Σ g_cs e_s      where the e_s of a rank's stages together free what is too much

and L_c is the chain without that, with what its last rank does once a step. Where a stage's backward runs
beside a forward and both communicate, together they take at least what they compute, and each what it takes
alone: lines in e_s, of which the highest counts.

The least over all e is a linear program with a row for every chain. For one chain it is a fractional
knapsack for each rank: `bound_s`, of the chain that is longest when the ranks' stages share what must be
computed again by what they have to do. `tightened` adds the longest chains of one e after the other (Kelley's
cutting planes, J. SIAM 8, 1960), each a little way from the best e so far towards the least of the program,
where chains are longest that still count. Which chains there are does not depend on how long work takes, so
those that counted for one way are where another with its schedule, stages and microbatches begins, unless
work runs side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.search.evaluate import Evaluated
from autopar.search.even_stages import EvenStages, moments, own_stages
from autopar.search.linear_model import LinearModel, Row, Term
from autopar.search.runs import Array
from autopar.search.solver import solve
from costmodel import Overlap, StageWork, simulate
from costmodel.orders import OVERLAPPING_SCHEDULES, rank_stages, stage_ranks
from costmodel.phases import BACKWARD, FORWARD, INPUT, OVERLAPPING, PHASES, WEIGHT
from costmodel.step import communication_cost

MOST_ROUNDS = 16
"""How often the linear program is solved: later chains add little."""

CHAINS_EACH = 8
"""How many chains are added each time, those of the ranks that end last."""

APART = (FORWARD, BACKWARD, INPUT, WEIGHT)
"""The phases of work that has its rank to itself."""

NEGLIGIBLE = 1e-5
"""By how much shorter a chain may be than the longest to count as well."""

SHORTER = 0.01
"""By how much shorter it may be to be kept for the next time."""

_STEP_VARIABLE = 0
"""The step as a variable of the linear program; after it come the parts of what is computed again."""

STEP = 0.1
"""How far chains are looked for from the best place towards the program's answer, as a part of the way."""


class Path(NamedTuple):
    """A chain of work: how often it passes each stage forward, back, back without gradients of weights, and
    for these alone, how often each boundary, and the rank on which it ends."""

    passes: tuple[tuple[int, ...], ...]
    sends: tuple[int, ...]
    last: int

    @staticmethod
    def of(works: NDArray[np.intp], ranks: NDArray[np.intp]) -> Path:
        """The chain of this work, the last of all first; `ranks` hold the stages."""
        num_stages = len(ranks)
        passed = _passed(works, num_stages)[list(APART)].tolist()
        stages = works % num_stages
        one, other = stages[:-1], stages[1:]
        sent = np.minimum(one, other)[ranks[one] != ranks[other]]
        sends = np.bincount(sent, minlength=num_stages - 1).tolist()
        return Path(tuple(map(tuple, passed)), tuple(sends), int(ranks[stages[0]]))


class Again(NamedTuple):
    """A chain with the times of a way: what it takes at least without anything computed again, and how often
    that of each stage counts; and its path, unless work of it runs side by side."""

    seconds: float
    weights: Array
    path: Path | None = None


class AgainBound:
    """The bound of one way; `send_s` are the messages with which stages begin, `excess_bytes` what each rank
    keeps too much, and `evaluated` has the fastest variants everywhere. `paths` are those that counted for
    ways with the same schedule, stages and microbatches; what counts here takes their place."""

    def __init__(
        self,
        even: EvenStages,
        evaluated: Evaluated,
        excess_bytes: Array,
        send_s: Sequence[float],
        overlap: Overlap,
        paths: list[Path],
    ) -> None:
        self.even = even
        self.paths = paths
        self.p = evaluated.parallelism
        self.cuts = evaluated.cuts
        self.stages = evaluated.stages
        self.excess_bytes = excess_bytes
        self.send_s = send_s
        self.mine = [
            rank_stages(self.p.schedule, rank, self.p.pp, self.p.num_virtual_stages)
            for rank in range(self.p.pp)
        ]
        most_s = even.most_relief_s(self.cuts)
        passes = cache(partial(_Passes.of, overlap))  # many stages are alike
        self.passes = list(map(passes, self.stages, most_s))
        self.once_s = [sum(self.passes[stage].once_s for stage in own) for own in self.mine]
        self.ranks = np.array(stage_ranks(self.p.schedule, self.p.pp, self.p.num_virtual_stages))
        self.shared_s = self._shared(even.relief_s(self.p, self.cuts, excess_bytes))

    def bound_s(self) -> float:
        """The bound of one chain."""
        chain = self._chains(self.shared_s, 1)[1][0]
        return self._relieved_s(chain)

    def tightened(self, bound_s: float, enough_s: float, num_rounds: int = MOST_ROUNDS) -> float:
        """The bound of many chains, from `bound_s` on; no more are looked for once that is `enough_s`, or
        after so many rounds, at least one. The place that it begins at is a guess: it may free too little."""
        chains = [self._timed(path) for path in self.paths]
        best_s, best = float("inf"), self.shared_s
        again_s = self.shared_s
        for _ in range(num_rounds):
            step_s, longest = self._chains(again_s, CHAINS_EACH)
            known = {chain.path for chain in chains if chain.path is not None}
            chains += [chain for chain in longest if chain.path not in known]
            if step_s < best_s:
                best_s, best = step_s, again_s
            least_s, answer = self._least(chains)
            bound_s = max(bound_s, least_s)
            if bound_s >= min(enough_s, best_s):
                break
            again_s = best + STEP * (answer - best)
            chains = [chain for chain in chains if _counts(chain, answer, least_s, SHORTER)]
        least = (chain for chain in chains if _counts(chain, answer, least_s))
        self.paths[:] = dict.fromkeys(chain.path for chain in least if chain.path is not None)
        return bound_s

    def _least(self, chains: Sequence[Again]) -> tuple[float, Array]:
        """The least of the longest of these chains, and what stages then compute again.

        Rows are in units of the longest chain: the tolerances of solvers are absolute.
        """
        parts, unit_s = self._parts, max(chain.seconds for chain in chains)
        rows: list[Row] = []
        for chain in chains:
            passed = _terms(-chain.weights[parts.stages] * parts.seconds / unit_s)
            rows.append((chain.seconds / unit_s, float("inf"), ((_STEP_VARIABLE, 1.0), *passed)))
        found = solve(self._model.with_rows(rows))
        again_s = parts.seconds * found.values[_STEP_VARIABLE + 1 :]
        return unit_s * found.bound, np.bincount(parts.stages, again_s, len(self.passes)).astype(np.float64)

    @cached_property
    def _model(self) -> LinearModel:
        """What ranks must free, without chains: the step, and how much of each part is computed again."""
        model = LinearModel()
        model.variable(1.0, upper=float("inf"))
        for _ in self._parts.stages:
            model.variable()
        for rank, moment in zip(*self._needed_bytes.nonzero(), strict=True):
            flights = np.zeros(len(self.passes))
            flights[own_stages(self.p)[rank]] = moments(self.p)[rank, moment]
            freed = flights[self._parts.stages] * self._parts.freed_bytes / self._needed_bytes[rank, moment]
            # What all that can be computed again just frees, rounding may put out of reach.
            model.row(min(1.0, sum(freed.tolist())), float("inf"), _terms(freed))
        return model

    @cached_property
    def _needed_bytes(self) -> Array:
        """How much too much each rank keeps at a moment: [rank, moment]."""
        kept_bytes = self.even.kept_bytes(self.p, self.cuts)
        allowed_bytes = kept_bytes.max(axis=1) - self.excess_bytes
        needed_bytes = kept_bytes - allowed_bytes[:, None]
        found: Array = np.where(needed_bytes > 1.0, needed_bytes, 0.0)
        return found

    @cached_property
    def _parts(self) -> _Parts:
        """What stages may compute again, but for what none needs that computes all that is quicker again:
        that frees enough for its rank, whatever other stages do."""
        flights = moments(self.p)
        alone_bytes = np.where(flights, self._needed_bytes[:, :, None] / np.maximum(flights, 1), 0.0)
        most_bytes = np.empty(len(self.passes))
        most_bytes[own_stages(self.p)] = alone_bytes.max(axis=1)
        rates, freed_bytes = self.even.freed(self.cuts)
        quicker_bytes = freed_bytes.cumsum(axis=0) - freed_bytes
        parts, stages = ((freed_bytes > 0) & (quicker_bytes < most_bytes)).nonzero()
        freed_bytes = freed_bytes[parts, stages]
        return _Parts(stages, rates[parts] * freed_bytes, freed_bytes)

    def _chains(self, again_s: Array, number: int) -> tuple[float, list[Again]]:
        """What a step takes with so much computed again in each stage, and the chains to the ranks that end
        last."""
        p, ways = self.p, self.passes
        backward_s = [way.backward_s + again for way, again in zip(ways, again_s.tolist(), strict=True)]
        hides = p.schedule in OVERLAPPING_SCHEDULES
        savings_s = _savings_s(ways, backward_s) if hides else [0.0] * len(ways)
        timeline = simulate(
            p.schedule, p.pp, p.num_microbatches, [way.forward_s for way in ways], backward_s, self.send_s,
            p.num_virtual_stages, weight_s=[stage.weight_s for stage in self.stages],
            overlap_saving_s=savings_s,
        )  # fmt: skip
        ends_s = [finish_s + more_s for finish_s, more_s in zip(timeline.finish_s, self.once_s, strict=True)]
        # A backward that is as long as the forward beside it hides what it computes again.
        counts = [saved < whole_s for saved, whole_s in zip(savings_s, backward_s, strict=True)]
        found = []
        for last in sorted(range(p.pp), key=lambda rank: -ends_s[rank])[:number]:
            works = timeline.works_to_end(last)
            passed = _passed(works, len(ways))
            weights = passed[BACKWARD] + passed[INPUT] + np.where(counts, passed[OVERLAPPING], 0.0)
            path = None if hides else Path.of(works, self.ranks)
            found.append(Again(ends_s[last] - float(weights @ again_s), weights, path))
        return max(ends_s), found

    def _timed(self, path: Path) -> Again:
        """A path with this way's times."""
        passes = np.array(path.passes, dtype=np.float64)
        seconds = float((passes * self._apart_s).sum()) + self.once_s[path.last]
        seconds += sum(number * send_s for number, send_s in zip(path.sends, self.send_s, strict=True))
        return Again(seconds, passes[1] + passes[2], path)

    @cached_property
    def _apart_s(self) -> Array:
        """What each stage takes in each of the phases `APART`."""
        weight_s = np.array([stage.weight_s for stage in self.stages])
        backward_s = np.array([way.backward_s for way in self.passes])
        forward_s = np.array([way.forward_s for way in self.passes])
        return np.array([forward_s, backward_s, backward_s - weight_s, weight_s])

    def _relieved_s(self, chain: Again) -> float:
        weights = chain.weights.tolist()
        relief_s = self.even.relief_s(self.p, self.cuts, self.excess_bytes, weights)
        return chain.seconds + float(relief_s.sum())

    def _shared(self, ranks_s: Array) -> Array:
        """What ranks take, by the stages on them."""
        found = np.zeros(len(self.passes))
        for seconds, mine in zip(ranks_s.tolist(), self.mine, strict=True):
            whole_s = sum(self.passes[stage].forward_s for stage in mine)
            for stage in mine:
                found[stage] = seconds * self.passes[stage].forward_s / whole_s
        return found


def _passed(works: NDArray[np.intp], num_stages: int) -> NDArray[np.intp]:
    """How often each stage, the second index, is passed in each phase."""
    size = (len(PHASES) + 1) * num_stages  # forwards that run beside a backward are numbered apart
    return np.bincount(works, minlength=size).reshape(-1, num_stages)


class _Parts(NamedTuple):
    """What may be computed again, each a part of a stage: its stage, seconds and bytes of a microbatch."""

    stages: NDArray[np.intp]
    seconds: Array
    freed_bytes: Array


def _terms(coefficients: Array) -> list[Term]:
    """Those of all parts in a row of the linear program."""
    (parts,) = coefficients.nonzero()
    return [*zip((_STEP_VARIABLE + 1 + parts).tolist(), coefficients[parts].tolist(), strict=True)]


def _counts(chain: Again, again_s: Array, step_s: float, shorter: float = NEGLIGIBLE) -> bool:
    """Whether a chain is as long as the step, or but so much shorter."""
    return chain.seconds + float(chain.weights @ again_s) >= step_s * (1 - shorter)


class _Passes(NamedTuple):
    """The least that a stage's forward takes, its backward without what is computed again, and what it does
    once a step; and what of the passes is communication."""

    forward_s: float
    backward_s: float
    once_s: float
    communication_s: tuple[float, float]

    @staticmethod
    def of(overlap: Overlap, stage: StageWork, most_again_s: float) -> _Passes:
        """Computing more again hides more of a microbatch's gathers, which may leave less to hide the
        synchronisation behind: that is hidden most where nothing more is computed, or where all is."""
        computed_s = stage.recompute_s + stage.backward_s
        first = communication_cost(stage, overlap)
        last = communication_cost(replace(stage, recompute_s=stage.recompute_s + most_again_s), overlap)
        moved_s = stage.forward_communication_s, stage.backward_communication_s
        return _Passes(
            stage.forward_s + moved_s[0] + last.forward_gather_s,
            computed_s + moved_s[1] + last.backward_gather_s,
            min(first.gradient_sync_s, last.gradient_sync_s) + stage.partial_sum_s + stage.optimizer_s,
            moved_s,
        )


def _savings_s(ways: Sequence[_Passes], backward_s: Sequence[float]) -> list[float]:
    """What a backward of each stage saves beside a forward of the other stage of its rank: as they take at
    least what both compute, and each by itself."""
    return [
        min(other.communication_s[0] + one.communication_s[1], other.forward_s, whole_s)
        for one, other, whole_s in zip(ways, reversed(ways), backward_s, strict=True)
    ]
