"""The order in which each rank of a pipeline runs forwards and backwards, and what it then holds.

Names and orders are torch.distributed.pipelining's. With p ranks, v virtual stages on each and m
microbatches, rank r holds the virtual stages r, r + p, ...; a microbatch passes a chain of 2 p v *legs*,
forward through the stages (legs 0 .. pv-1) and backward through them (pv .. 2pv-1), so the stage of a leg is
`leg` or `2 p v - 1 - leg`.

    GPipe            all forwards, then all backwards (arXiv:1811.06965)
    1F1B             p - 1 - r forwards, then one forward, one backward (PipeDream-Flush, arXiv:2006.09503)
    Interleaved1F1B  the same over v chunks, taken in rounds of about p microbatches, after (v - 1) · round +
                     2 (p - 1 - r) forwards (arXiv:2104.04473, section 2.2)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Literal, get_args

from costmodel.errors import CostModelError

ScheduleName = Literal["GPipe", "1F1B", "Interleaved1F1B"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

Op = tuple[int, int]  # (leg, microbatch)


def check_schedule(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> None:
    """Raises CostModelError for a schedule, or sizes of it, that torch would not run."""
    if schedule_name not in SCHEDULES:
        raise CostModelError(f"unknown schedule {schedule_name!r}; known are {', '.join(SCHEDULES)}")
    if min(num_stages, num_microbatches, num_virtual) < 1:
        raise CostModelError(
            f"a pipeline needs at least one stage, microbatch and virtual stage: "
            f"got {num_stages}, {num_microbatches}, {num_virtual}"
        )
    if num_virtual > 1 and schedule_name != "Interleaved1F1B":
        raise CostModelError(
            f"{schedule_name} has one stage per rank, got {num_virtual}; use Interleaved1F1B"
        )
    num_rounds = max(1, num_microbatches // num_stages)
    if schedule_name == "Interleaved1F1B" and num_microbatches % num_rounds:
        raise CostModelError(
            f"Interleaved1F1B runs {num_microbatches} microbatches on {num_stages} ranks in {num_rounds} "
            f"rounds, which do not divide them; use a multiple of {num_stages} microbatches"
        )


@lru_cache(maxsize=64)
def rank_orders(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> tuple[tuple[Op, ...], ...]:
    """What each of `num_stages` ranks runs, in order, as (leg, microbatch). Raises as `check_schedule`."""
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    return tuple(
        _rank_order(schedule_name, rank, num_stages, num_microbatches, num_virtual)
        for rank in range(num_stages)
    )


def _rank_order(
    name: str, rank: int, num_stages: int, num_microbatches: int, num_virtual: int
) -> tuple[Op, ...]:
    num_ops = num_microbatches * num_virtual
    # A rank's k-th forward and k-th backward: chunk by chunk within a round of microbatches.
    num_rounds = max(1, num_microbatches // num_stages)
    per_round = num_microbatches // num_rounds if num_virtual > 1 else num_microbatches
    last_leg = 2 * num_stages * num_virtual - 1
    forwards: list[Op] = []
    backwards: list[Op] = []
    for first in range(0, num_microbatches, per_round):
        for chunk in range(num_virtual):
            leg = chunk * num_stages + rank
            mirrored = last_leg - ((num_virtual - 1 - chunk) * num_stages + rank)
            forwards.extend((leg, first + i) for i in range(per_round))
            backwards.extend((mirrored, first + i) for i in range(per_round))

    if name == "GPipe":
        num_warmup = num_ops
    elif name == "1F1B":
        num_warmup = min(num_stages - 1 - rank, num_ops)
    else:
        num_warmup = min((num_virtual - 1) * per_round + 2 * (num_stages - 1 - rank), num_ops)
    steady = chain.from_iterable(zip(forwards[num_warmup:], backwards, strict=False))
    return (*forwards[:num_warmup], *steady, *backwards[num_ops - num_warmup :])


def peak_in_flight(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> tuple[int, ...]:
    """How many (virtual stage, microbatch) activations each rank holds at its peak.

    GPipe m, 1F1B min(m, p - r), Interleaved1F1B min(m v, (v - 1) · round + 2 (p - 1 - r) + 1).
    Raises as `check_schedule`.
    """
    peaks = peak_activation_bytes(
        schedule_name, num_stages, num_microbatches, [1] * (num_stages * num_virtual), num_virtual
    )
    return tuple(int(peak) for peak in peaks)


def peak_activation_bytes(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    saved_bytes: Sequence[float],
    num_virtual: int = 1,
) -> tuple[float, ...]:
    """The most bytes each rank keeps for backward; virtual stage s saves `saved_bytes[s]` per microbatch.

    The order alone decides it: a rank runs one thing at a time. Raises as `check_schedule`, or when
    `saved_bytes` has not one entry per virtual stage.
    """
    num_legs = 2 * num_stages * num_virtual
    if len(saved_bytes) != num_legs // 2:
        raise CostModelError(f"{num_legs // 2} virtual stages need as many sizes, got {len(saved_bytes)}")
    if num_virtual == 1:
        check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
        return tuple(
            _single_stage_peak(schedule_name, rank, num_stages, num_microbatches) * num_bytes
            for rank, num_bytes in enumerate(saved_bytes)
        )
    change = [*saved_bytes, *(-num_bytes for num_bytes in reversed(saved_bytes))]
    peaks = []
    for order in rank_orders(schedule_name, num_stages, num_microbatches, num_virtual):
        held = peak = 0.0
        for leg, _ in order:
            held += change[leg]
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def _single_stage_peak(schedule_name: str, rank: int, num_stages: int, num_microbatches: int) -> int:
    num_ahead = num_stages - 1 - rank
    peak = {"GPipe": num_microbatches, "1F1B": num_ahead + 1, "Interleaved1F1B": 2 * num_ahead + 1}[
        schedule_name
    ]
    return min(num_microbatches, peak)
