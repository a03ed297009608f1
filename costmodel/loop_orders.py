"""Orders of the schedules whose stages go round the ranks in a loop: rank r holds stages r, r + p, ...

    GPipe                  all forwards, then all backwards (arXiv:1811.06965)
    LoopedBFS              the same stage by stage, backwards last microbatch first (arXiv:2211.05953)
    1F1B                   p - 1 - r forwards, then one forward, one backward (arXiv:2006.09503)
    Interleaved1F1B        the same over v stages, taken in rounds of about p microbatches, after
                           (v - 1) round + 2 (p - 1 - r) forwards (arXiv:2104.04473, section 2.2)
    InterleavedZeroBubble  the same after (v - 1) round + p - 1 - r forwards, with split backwards, whose
                           weight part runs r backwards later (ZB-H1 of arXiv:2401.10241)

of p ranks with v stages each. All ranks take each phase of their stages in the same turn, round by round and
in a round stage by stage; they differ in which phase comes when.
"""

from __future__ import annotations

import numpy as np

from costmodel.phases import BACKWARD, FORWARD, INPUT, WEIGHT, Orders, phase_numbers

IN_ROUNDS = frozenset({"Interleaved1F1B", "InterleavedZeroBubble"})
"""Schedules that take their microbatches in rounds."""


def rounds(num_stages: int, num_microbatches: int) -> tuple[int, int]:
    """In how many rounds an interleaved schedule takes its microbatches, and how many in each."""
    num_rounds = max(1, num_microbatches // num_stages)
    return num_rounds, num_microbatches // num_rounds


def num_warmup(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> list[int]:
    """How many forwards each rank runs before it turns to one forward, one backward."""
    num_ops = num_microbatches * num_virtual
    if schedule_name in ("GPipe", "LoopedBFS"):
        return [num_ops] * num_stages
    _, per_round = rounds(num_stages, num_microbatches)
    whole_rounds = (num_virtual - 1) * per_round
    step = 2 if schedule_name == "Interleaved1F1B" else 1
    return [min(num_ops, whole_rounds + step * ahead) for ahead in reversed(range(num_stages))]


def loop_orders(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> Orders:
    """What all ranks run; the sizes are checked by the caller."""
    num_ops = num_microbatches * num_virtual
    warmups = num_warmup(schedule_name, num_stages, num_microbatches, num_virtual)
    if schedule_name == "InterleavedZeroBubble":
        kinds: tuple[int, ...] = FORWARD, INPUT, WEIGHT
        texts = [_split(num_ops, ahead, rank) for rank, ahead in enumerate(warmups)]
    else:
        kinds = FORWARD, BACKWARD
        texts = ["F" * ahead + "FB" * (num_ops - ahead) + "B" * ahead for ahead in warmups]
    phases = phase_numbers(np.frombuffer("".join(texts).encode(), dtype=np.uint8))
    ranks = np.repeat(np.arange(num_stages, dtype=np.int32), [len(text) for text in texts])

    per_round = num_microbatches
    if schedule_name in IN_ROUNDS:
        _, per_round = rounds(num_stages, num_microbatches)
    visit = np.arange(num_ops)
    there = visit // per_round % num_virtual  # backwards go the other way
    microbatch = visit // (num_virtual * per_round) * per_round + visit % per_round
    later = microbatch[::-1] if schedule_name == "LoopedBFS" else microbatch
    stages, microbatches = np.empty_like(ranks), np.empty_like(ranks)
    for phase in kinds:
        mine, is_forward = phases == phase, phase == FORWARD
        places = there if is_forward else num_virtual - 1 - there
        stages[mine] = ranks[mine] + np.tile(num_stages * places, num_stages)
        microbatches[mine] = np.tile(microbatch if is_forward else later, num_stages)
    return Orders(ranks, phases, stages, microbatches)


def _split(num_ops: int, warmup: int, num_behind: int) -> str:
    """One forward, one input gradient and, `num_behind` of those later, its weight gradient."""
    num_pairs, num_behind = num_ops - warmup, min(num_behind, num_ops)
    return (
        "F" * warmup
        + "FI" * min(num_pairs, num_behind)
        + "FIW" * (num_pairs - num_behind)
        + "I" * (num_behind - num_pairs)
        + "IW" * (num_ops - max(num_pairs, num_behind))
        + "W" * num_behind
    )
