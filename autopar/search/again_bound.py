"""What a pipeline with several stages a rank takes at least once its ranks must compute something again.

A chain of work, each waiting for the one before, is as long as the step or shorter, whatever its ops take.
Let one pass backward through stage s g_s times; if the stage computes e_s seconds again, the step takes at
least

    L + Σ g_s e_s      where the e_s of a rank's stages together free what is too much

and L is the chain without that, with what its last rank does once a step. Where a stage's backward runs
beside a forward and both communicate, together they take at least what they compute, and each what it takes
alone: lines in e_s, of which the highest counts. The least of this is a fractional knapsack for each rank,
and the chain is the one that is longest when the ranks' stages share what must be computed again by what they
have to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.even_stages import EvenStages
from autopar.search.runs import Array
from costmodel import Overlap, StageWork, simulate
from costmodel.orders import OVERLAPPING_SCHEDULES, rank_stages
from costmodel.step import communication_cost


def chain_bound_s(
    even: EvenStages, evaluated: Evaluated, excess_bytes: Array, send_s: Sequence[float], overlap: Overlap
) -> float:
    """The bound; `send_s` are the messages with which stages begin, and `evaluated` has the fastest variants
    everywhere."""
    p, stages = evaluated.parallelism, evaluated.stages
    most_s = even.most_relief_s(evaluated.cuts)
    ways = [_Passes.of(stage, overlap, most) for stage, most in zip(stages, most_s, strict=True)]
    forward_s = [way.forward_s for way in ways]
    again_s = _shared(p, even.relief_s(p, evaluated.cuts, excess_bytes), forward_s)
    backward_s = [way.backward_s + again for way, again in zip(ways, again_s, strict=True)]
    savings_s = _savings_s(ways, backward_s) if p.schedule in OVERLAPPING_SCHEDULES else [0.0] * len(ways)
    timeline = simulate(
        p.schedule, p.pp, p.num_microbatches, forward_s, backward_s, send_s, p.num_virtual_stages,
        weight_s=[stage.weight_s for stage in stages],
        overlap_saving_s=savings_s,
    )  # fmt: skip
    ends_s = [
        finish_s
        + sum(ways[stage].once_s for stage in rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages))
        for rank, finish_s in enumerate(timeline.finish_s)
    ]
    last = ends_s.index(max(ends_s))
    passes = Counter((phase, stage) for phase, stage, _ in timeline.path_to_end(last))
    # A backward that is as long as the forward beside it hides what it computes again.
    weights = [
        float(passes["B", stage] + passes["I", stage] + (saved < backward_s[stage]) * passes["O", stage])
        for stage, saved in enumerate(savings_s)
    ]
    chain_s = ends_s[last] - sum(w * s for w, s in zip(weights, again_s, strict=True))
    return chain_s + float(even.relief_s(p, evaluated.cuts, excess_bytes, weights).sum())


class _Passes(NamedTuple):
    """The least that a stage's forward takes, its backward without what is computed again, and what it does
    once a step; and what of the passes is communication."""

    forward_s: float
    backward_s: float
    once_s: float
    communication_s: tuple[float, float]

    @staticmethod
    def of(stage: StageWork, overlap: Overlap, most_again_s: float) -> _Passes:
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


def _shared(p: Parallelism, ranks_s: Array, stages_s: Sequence[float]) -> list[float]:
    """What ranks take, by the stages on them."""
    found = [0.0] * len(stages_s)
    for rank, seconds in enumerate(ranks_s.tolist()):
        mine = rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages)
        whole_s = sum(stages_s[stage] for stage in mine)
        for stage in mine:
            found[stage] = seconds * stages_s[stage] / whole_s
    return found
