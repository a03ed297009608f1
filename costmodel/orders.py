"""The order in which each rank of a pipeline runs its work, and what it then holds for backward.

Names and orders are torch.distributed.pipelining's (2.13). p ranks hold v virtual stages each; m microbatches
pass forward through all p v stages and backward through them. In a loop, rank r holds the stages r, r + p,
and so on (`loop_orders`); in a V, the stages r and 2 p - 1 - r, so that the first and the last stage are on
the same rank (`v_orders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import CostModelError
from costmodel.loop_orders import IN_ROUNDS, loop_orders, num_warmup, rounds
from costmodel.phases import FORWARD, INPUT, OVERLAPPING, PHASES, Op, Orders, Phase
from costmodel.v_orders import dual_pipe_v_orders, zero_bubble_v_orders

_AnyArray = TypeVar("_AnyArray", bound=NDArray[Any])

ScheduleName = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
V_SCHEDULES = frozenset({"ZBVZeroBubble", "DualPipeV"})
SPLIT_BACKWARD_SCHEDULES = frozenset({"InterleavedZeroBubble", *V_SCHEDULES})
OVERLAPPING_SCHEDULES = frozenset({"DualPipeV"})
"""Schedules that run a forward and a backward at once, so that one communicates while the other computes."""
_SINGLE_STAGE = frozenset({"GPipe", "1F1B"})


def check_schedule(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> None:
    """Raises CostModelError for a schedule, or sizes of it, that torch would not run."""
    if schedule_name not in SCHEDULES:
        raise CostModelError(f"unknown schedule {schedule_name!r}; known are {', '.join(SCHEDULES)}")
    if min(num_stages, num_microbatches, num_virtual) < 1:
        raise CostModelError(
            f"a pipeline needs at least one stage, microbatch and virtual stage: "
            f"got {num_stages}, {num_microbatches}, {num_virtual}"
        )
    if num_virtual > 1 and schedule_name in _SINGLE_STAGE:
        raise CostModelError(
            f"{schedule_name} has one stage per rank, got {num_virtual}; use Interleaved1F1B"
        )
    if num_virtual != 2 and schedule_name in V_SCHEDULES:
        raise CostModelError(f"{schedule_name} has two stages per rank, got {num_virtual}")
    if schedule_name == "DualPipeV" and num_microbatches < 2 * num_stages:
        raise CostModelError(
            f"DualPipeV on {num_stages} ranks needs a microbatch for each of its {2 * num_stages} stages, "
            f"got {num_microbatches}; use more microbatches or ZBVZeroBubble"
        )
    if schedule_name in IN_ROUNDS:
        num_rounds, per_round = rounds(num_stages, num_microbatches)
        if num_rounds * per_round != num_microbatches:
            raise CostModelError(
                f"{schedule_name} runs {num_microbatches} microbatches on {num_stages} ranks in {num_rounds} "
                f"rounds, which do not divide them; use a multiple of {num_stages} microbatches"
            )


def rank_stages(schedule_name: str, rank: int, num_stages: int, num_virtual: int = 1) -> tuple[int, ...]:
    """The virtual stages that a rank holds, in the order of the model."""
    if schedule_name in V_SCHEDULES:
        return rank, 2 * num_stages - 1 - rank
    return tuple(range(rank, num_stages * num_virtual, num_stages))


def stage_ranks(schedule_name: str, num_stages: int, num_virtual: int = 1) -> tuple[int, ...]:
    """The rank that holds each of the `num_stages * num_virtual` virtual stages."""
    if schedule_name in V_SCHEDULES:
        return (*range(num_stages), *reversed(range(num_stages)))
    return tuple(range(num_stages)) * num_virtual


def rank_orders(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> tuple[tuple[Op, ...], ...]:
    """What each of `num_stages` ranks runs, in order, as (phase, stage, microbatch).

    Raises as `check_schedule`.
    """
    ranks, phases, stages, microbatches = numbered_orders(
        schedule_name, num_stages, num_microbatches, num_virtual
    )
    names = map(PHASES.__getitem__, phases.tolist())
    ops = list(zip(names, stages.tolist(), microbatches.tolist(), strict=True))
    ends = np.bincount(ranks).cumsum().tolist()
    return tuple(tuple(ops[start:stop]) for start, stop in pairwise([0, *ends]))


@lru_cache(maxsize=16)
def numbered_orders(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> Orders:
    """`rank_orders` to calculate with; all callers share it. Raises as `check_schedule`."""
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    if schedule_name == "ZBVZeroBubble":
        orders = zero_bubble_v_orders(num_stages, num_microbatches)
    elif schedule_name == "DualPipeV":
        orders = dual_pipe_v_orders(num_stages, num_microbatches)
    else:
        orders = loop_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    for numbers in orders:
        _shared(numbers)
    return orders


@cache
def peak_in_flight(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> tuple[int, ...]:
    """How many (virtual stage, microbatch) activations each rank holds at its peak.

    GPipe m, LoopedBFS m v, 1F1B min(m, p - r), Interleaved1F1B min(m v, (v - 1) round + 2 (p - 1 - r) + 1),
    InterleavedZeroBubble min(m v, (v - 1) round + p), DualPipeV 2 p + 1, and, with two rounds of microbatches
    or more, ZBVZeroBubble 2 p. Raises as `check_schedule`.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    if schedule_name == "DualPipeV" and num_stages > 1:
        return (2 * num_stages + 1,) * num_stages
    if schedule_name not in V_SCHEDULES:
        # After its warm-up a rank runs one forward more, and weight gradients come r backwards late.
        ahead = num_warmup(schedule_name, num_stages, num_microbatches, num_virtual)
        late = range(num_stages) if schedule_name in SPLIT_BACKWARD_SCHEDULES else [0] * num_stages
        most = num_microbatches * num_virtual
        return tuple(min(most, first + more + 1) for first, more in zip(ahead, late, strict=True))
    if num_stages > 1 and num_microbatches >= 2 * num_stages:
        return (2 * num_stages,) * num_stages
    ones = [1] * (num_stages * num_virtual)
    peaks = peak_activation_bytes(schedule_name, num_stages, num_microbatches, ones, num_virtual)
    return tuple(int(peak) for peak in peaks)


def peak_activation_bytes(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    saved_bytes: Sequence[float],
    num_virtual: int = 1,
    weight_saved_bytes: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The most bytes each rank keeps for backward; virtual stage s saves `saved_bytes[s]` per microbatch.

    Of them `weight_saved_bytes[s]`, all by default, stay from the input to the weight part of a split
    backward. The order alone decides the peak: a rank runs one thing at a time. Raises as `check_schedule`,
    or when there is not one size per virtual stage.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    change = held_changes(num_stages * num_virtual, saved_bytes, weight_saved_bytes)
    if schedule_name in ("GPipe", "LoopedBFS"):
        return tuple(num_microbatches * sum(saved_bytes[rank::num_stages]) for rank in range(num_stages))
    if num_virtual == 1 and schedule_name != "InterleavedZeroBubble":
        step = 1 if schedule_name == "1F1B" else 2
        return tuple(
            min(num_microbatches, step * (num_stages - 1 - rank) + 1) * num_bytes
            for rank, num_bytes in enumerate(saved_bytes)
        )
    # Beyond four rounds of p microbatches a rank repeats itself; broken rounds are longer ones.
    if schedule_name in V_SCHEDULES or num_microbatches % num_stages == 0:
        num_microbatches = min(num_microbatches, 5 * num_stages)
    whole, later = change["F"], [-num_bytes for num_bytes in change["W"]]
    ranks = range(num_stages)
    mine = [rank_stages(schedule_name, rank, num_stages, num_virtual) for rank in ranks]
    sizes = np.array([[whole[stage] for stage in own] + [later[stage] for stage in own] for own in mine])
    held_by, counts = _fullest(schedule_name, num_stages, num_microbatches, num_virtual)
    kept = (counts * sizes[held_by]).sum(axis=1)
    return tuple(np.maximum.reduceat(kept, np.searchsorted(held_by, ranks)).tolist())


@cache
def moments_in_flight(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> NDArray[np.int64]:
    """The moments at which a rank may keep most, whatever its stages save: [rank, moment, stage of the rank].

    Each counts the microbatches that a rank keeps of each of its virtual stages, in the order of
    `rank_stages`. Ranks with fewer moments repeat their last. Raises as `check_schedule`.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    if schedule_name in ("GPipe", "LoopedBFS"):
        return _shared(np.full((num_stages, 1, num_virtual), num_microbatches))
    if num_virtual == 1:
        peaks = peak_in_flight(schedule_name, num_stages, num_microbatches)
        return _shared(np.array(peaks)[:, None, None])
    whole_rounds = schedule_name in V_SCHEDULES or num_microbatches % num_stages == 0
    made_for = min(num_microbatches, 5 * num_stages) if whole_rounds else num_microbatches  # as for the peak
    held_by, flights = _fullest(schedule_name, num_stages, made_for, num_virtual)
    counts = flights[:, :num_virtual] + flights[:, num_virtual:]
    rows = _different(np.column_stack([held_by, counts]))
    starts = np.searchsorted(rows[:, 0], range(1, num_stages))
    found = [_undominated(own) for own in np.split(rows[:, 1:], starts)]
    moment = np.arange(max(map(len, found)))
    return _shared(np.array([own[np.minimum(moment, len(own) - 1)] for own in found]))


def _shared(numbers: _AnyArray) -> _AnyArray:
    """The same, which nobody may change, as it is kept for all who ask for it."""
    numbers.setflags(write=False)
    return numbers


def _different(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows in order, each once."""
    # `np.unique` compares rows as bytes, which takes far longer.
    rows = rows[np.lexsort(rows.T[::-1])]
    found: NDArray[np.int64] = rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))]
    return found


def _undominated(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of different rows than which no other is at least as large everywhere."""
    covers = (rows[:, None, :] >= rows[None, :, :]).all(axis=2)
    found: NDArray[np.int64] = rows[covers.sum(axis=0) == 1]
    return found


@lru_cache(maxsize=4096)
def _fullest(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The moments at which a rank may hold most, for any sizes: the ranks in order, and [moment, what].

    Each counts the microbatches that every stage of the rank keeps whole and then, for every stage, those of
    which it keeps what weight gradients need. On the way between two neighbouring moments the counts change
    by the same step again and again, so nothing between them is ever the most.
    """
    orders = numbered_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    is_forward = orders.phases == FORWARD
    is_last = is_forward & ~np.append(is_forward[1:], False)
    corners = [_corners(orders, seen, num_virtual) for seen in (is_last, orders.phases == INPUT)]
    ranks, counts = (np.concatenate(each) for each in zip(*corners, strict=True))
    by_rank = ranks.argsort(kind="stable")
    return _shared(ranks[by_rank]), _shared(counts[by_rank])


def _corners(
    orders: Orders, seen: NDArray[np.bool_], num_virtual: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The counts after each piece of work that is seen, less those on the way between two others, and the
    ranks that they are of."""
    ranks, places = orders.ranks[seen], orders.stages // (orders.ranks[-1] + 1)
    # All that a rank still holds after what is seen last it frees, so counting goes on with the next rank.
    cells = (seen.cumsum() - seen) * num_virtual + places
    size = (len(ranks) + 1) * num_virtual
    added = [np.bincount(cells, change[orders.phases], size).reshape(-1, num_virtual) for change in _CHANGES]
    steps = np.concatenate(added, axis=1)[:-1]
    turns = (np.diff(ranks, prepend=-1) != 0) | (np.diff(ranks, append=-1) != 0)
    turns[:-1] |= (steps[1:] != steps[:-1]).any(axis=1)
    return ranks[turns], steps.cumsum(axis=0)[turns].astype(np.int64)


_CHANGES = np.array([[1, -1, -1, 0, -1], [0, 0, 1, -1, 0]])
"""By how much each phase changes the microbatches kept whole, and kept for weight gradients."""


@cache
def alone_parts(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int = 1
) -> NDArray[np.float64]:
    """The parts of the microbatches whose forward, and whose backward, has its rank to itself: [2, stage].

    Raises as `check_schedule`.
    """
    if schedule_name not in OVERLAPPING_SCHEDULES:
        check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
        return _shared(np.ones((2, num_stages * num_virtual)))
    # A microbatch more is one more pair of each stage.
    made_for = min(num_microbatches, 3 * num_stages)
    orders = numbered_orders(schedule_name, num_stages, made_for, num_virtual)
    pairs = np.bincount(orders.stages[orders.phases == OVERLAPPING], minlength=num_stages * num_virtual)
    alone = (made_for - pairs) / num_microbatches
    return _shared(np.stack([alone[::-1], alone]))  # a backward overlaps a forward of the mirrored stage


def least_alone(num_stages: int, num_microbatches: int) -> float:
    """The least of `alone_parts` in schedules that overlap: that of forwards on the second leg of the V and
    of backwards on the first."""
    return min(1.0, num_stages / num_microbatches)


def held_changes(
    num_total: int, saved_bytes: Sequence[float], weight_saved_bytes: Sequence[float] | None = None
) -> dict[Phase, list[float]]:
    """By how many bytes each phase of each virtual stage changes what its rank keeps for backward.

    Arguments and errors as `peak_activation_bytes`.
    """
    kept = saved_bytes if weight_saved_bytes is None else weight_saved_bytes
    for sizes in (saved_bytes, kept):
        if len(sizes) != num_total:
            raise CostModelError(f"{num_total} virtual stages need as many sizes, got {len(sizes)}")
    freed = [-num_bytes for num_bytes in saved_bytes]
    return {
        "F": list(saved_bytes),
        "B": freed,
        "O": freed,
        "I": [later - num_bytes for later, num_bytes in zip(kept, saved_bytes, strict=True)],
        "W": [-later for later in kept],
    }
