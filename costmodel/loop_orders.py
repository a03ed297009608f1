"""Orders of the schedules whose stages go round the ranks in a loop: rank r holds stages r, r + p, ...

    GPipe                  all forwards, then all backwards (arXiv:1811.06965)
    LoopedBFS              the same stage by stage, backwards last microbatch first (arXiv:2211.05953)
    1F1B                   p - 1 - r forwards, then one forward, one backward (arXiv:2006.09503)
    Interleaved1F1B        the same over v stages, taken in rounds of about p microbatches, after
                           (v - 1) round + 2 (p - 1 - r) forwards (arXiv:2104.04473, section 2.2)
    InterleavedZeroBubble  the same after (v - 1) round + p - 1 - r forwards, with split backwards, whose
                           weight part runs r backwards later (ZB-H1 of arXiv:2401.10241)

of p ranks with v stages each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from costmodel.phases import Op, Phase


def rounds(num_stages: int, num_microbatches: int) -> tuple[int, int]:
    """In how many rounds an interleaved schedule takes its microbatches, and how many in each."""
    num_rounds = max(1, num_microbatches // num_stages)
    return num_rounds, num_microbatches // num_rounds


def loop_order(
    schedule_name: str, rank: int, num_stages: int, num_microbatches: int, num_virtual: int
) -> tuple[Op, ...]:
    """What one rank runs; the sizes are checked by the caller."""
    stages = range(rank, num_stages * num_virtual, num_stages)
    if schedule_name == "LoopedBFS":
        visits = [(stage, microbatch) for stage in stages for microbatch in range(num_microbatches)]
        return (*(("F", *visit) for visit in visits), *(("B", *visit) for visit in reversed(visits)))

    num_rounds, per_round = rounds(num_stages, num_microbatches)
    if schedule_name in ("GPipe", "1F1B"):
        num_rounds, per_round = 1, num_microbatches
    num_ops = num_microbatches * num_virtual
    num_ahead = num_stages - 1 - rank
    num_warmup = {
        "GPipe": num_ops,
        "1F1B": num_ahead,
        "Interleaved1F1B": (num_virtual - 1) * per_round + 2 * num_ahead,
        "InterleavedZeroBubble": (num_virtual - 1) * per_round + num_ahead,
    }[schedule_name]
    num_warmup = min(num_warmup, num_ops)
    forwards = list(_in_rounds("F", stages, num_rounds, per_round))
    if schedule_name == "InterleavedZeroBubble":
        inputs = list(_in_rounds("I", stages[::-1], num_rounds, per_round))
        weights = list(_in_rounds("W", stages[::-1], num_rounds, per_round))
        return tuple(_with_weights(forwards, inputs, weights, num_warmup, num_behind=rank))
    backwards = list(_in_rounds("B", stages[::-1], num_rounds, per_round))
    steady = chain.from_iterable(zip(forwards[num_warmup:], backwards, strict=False))
    return (*forwards[:num_warmup], *steady, *backwards[num_ops - num_warmup :])


def _in_rounds(phase: Phase, stages: range, num_rounds: int, per_round: int) -> Iterator[Op]:
    """Stage by stage within a round of microbatches."""
    for first in range(0, num_rounds * per_round, per_round):
        for stage in stages:
            for microbatch in range(first, first + per_round):
                yield phase, stage, microbatch


def _with_weights(
    forwards: list[Op], inputs: list[Op], weights: list[Op], num_warmup: int, num_behind: int
) -> Iterator[Op]:
    """One forward, one input gradient and, `num_behind` of those later, its weight gradient."""
    yield from forwards[:num_warmup]
    num_weights = 0
    for step, input_gradient in enumerate(inputs):
        yield from forwards[num_warmup + step : num_warmup + step + 1]
        yield input_gradient
        if step >= num_behind:
            yield weights[num_weights]
            num_weights += 1
    yield from weights[num_weights:]
