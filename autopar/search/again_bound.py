"""What a pipeline with several stages a rank takes at least once its ranks must compute something again.

A chain of work, each waiting for the one before, is as long as the step or shorter, whatever its ops take.
Let one pass backward through stage s g_s times; if the stage computes e_s seconds again, the step takes at
least

    L + Σ g_s e_s      where the e_s of a rank's stages together free what is too much

and L is the chain without that. The least of this is a fractional knapsack for each rank, and the chain is
the one that is longest when the ranks' stages share what must be computed again by what they have to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.runs import Array
from autopar.search.stages import StageTable
from costmodel import StageWork, simulate
from costmodel.events import overlap_saving_s
from costmodel.orders import rank_stages


def chain_bound_s(
    table: StageTable, evaluated: Evaluated, excess_bytes: Array, send_s: Sequence[float]
) -> float:
    """The bound, less what is done once a step; `send_s` are the messages with which stages begin, and
    `evaluated` has the fastest variants everywhere.

    0 where gathers, or passes in the other direction, hide behind all that is computed again: times do not
    just add up then.
    """
    p, stages = evaluated.parallelism, evaluated.stages
    if any(stage.backward_gather_s for stage in stages):
        return 0.0
    forward_s = [stage.forward_s + stage.forward_communication_s for stage in stages]
    backward_s = [stage.recompute_s + stage.backward_s + stage.backward_communication_s for stage in stages]
    savings_s = _savings_s(stages) if p.schedule == "DualPipeV" else [0.0] * len(stages)
    if any(
        saved > min(pair) for saved, *pair in zip(savings_s, reversed(forward_s), backward_s, strict=True)
    ):
        return 0.0
    again_s = _shared(p, table.ranks_relief_s(p, evaluated.cuts, excess_bytes), forward_s)
    timeline = simulate(
        p.schedule, p.pp, p.num_microbatches, forward_s,
        [sum(both) for both in zip(backward_s, again_s, strict=True)], send_s, p.num_virtual_stages,
        weight_s=[stage.weight_s for stage in stages],
        overlap_saving_s=savings_s,
    )  # fmt: skip
    last = max(range(p.pp), key=timeline.finish_s.__getitem__)
    passes = Counter(stage for phase, stage, _ in timeline.path_to_end(last) if phase in ("B", "I", "O"))
    weights = [float(passes[stage]) for stage in range(len(stages))]
    chain_s = timeline.finish_s[last] - sum(w * s for w, s in zip(weights, again_s, strict=True))
    return chain_s + float(table.ranks_relief_s(p, evaluated.cuts, excess_bytes, weights).sum())


def _savings_s(stages: Sequence[StageWork]) -> list[float]:
    """The most that a backward of each stage saves beside a forward of the other stage of its rank, however
    much it computes again."""
    return [
        overlap_saving_s(
            other.forward_s,
            other.forward_communication_s,
            one.backward_s + other.forward_s + other.forward_communication_s + one.backward_communication_s,
            one.backward_communication_s,
        )
        for one, other in zip(stages, reversed(stages), strict=True)
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
