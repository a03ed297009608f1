"""The event simulation under `schedule` and `steady`: when each piece of work of a pipeline ends.

A schedule is a partial order of pieces of work that does not depend on how long they take. `ordered_steps`
sorts it once; running it is then one pass of

    start = max(end of the rank's previous work, end of the work waited for + message)

Work is numbered `phase * num_virtual_stages + stage`, with the phases in the order of `PHASES`. A forward and
the backward O that runs together with it start when both can, and what they make leaves when both end; the
forward, then of the phase `_PAIRED`, only waits for its input.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import add, sub
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import CostModelError
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, numbered_orders, stage_ranks
from costmodel.phases import FORWARD, OVERLAPPING, PHASES, WEIGHT, Orders

_PAIRED = len(PHASES)


class WorkTimes(NamedTuple):
    """Seconds by work: of its compute, of the message it waits for, and of the message it sends."""

    compute_s: list[float]
    receive_s: list[float]
    send_s: list[float]


def work_times(
    schedule_name: str,
    num_stages: int,
    num_virtual: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    weight_s: Sequence[float] | None = None,
    overlap_saving_s: float | Sequence[float] = 0.0,
) -> WorkTimes:
    """The arguments of `simulate`, checked, by work. Raises CostModelError for times that make no sense."""
    num_total = num_stages * num_virtual
    sends_s, inputs_s, weights_s = checked_times(
        schedule_name, num_stages, num_virtual, forward_s, backward_s, send_s, weight_s
    )
    savings_s = _overlap_saving_s(forward_s, backward_s, overlap_saving_s)
    pairs_s = map(add, backward_s, reversed(forward_s))  # in a V, the forward is of the mirrored stage
    overlapped_s = list(map(sub, pairs_s, savings_s))
    before, after, none = [0.0, *sends_s], [*sends_s, 0.0], [0.0] * num_total
    return WorkTimes(
        compute_s=[*forward_s, *backward_s, *inputs_s, *weights_s, *overlapped_s, *none],
        receive_s=[*before, *after, *after, *none, *after, *before],
        send_s=[*after, *before, *before, *none, *before, *none],
    )


def checked_times(
    schedule_name: str,
    num_stages: int,
    num_virtual: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float],
    weight_s: Sequence[float] | None,
) -> tuple[list[float], list[float], Sequence[float]]:
    """The times of messages by boundary, and those of the input and the weight part of each stage's backward.

    Arguments and errors as `simulate`.
    """
    num_total = num_stages * num_virtual
    if len(forward_s) != num_total or len(backward_s) != num_total:
        raise CostModelError(
            f"{num_stages} ranks with {num_virtual} virtual stages need {num_total} forward and "
            f"backward times, got {len(forward_s)} and {len(backward_s)}"
        )
    sends_s = [send_s] * (num_total - 1) if isinstance(send_s, float | int) else list(send_s)
    if len(sends_s) != num_total - 1:
        raise CostModelError(
            f"{num_total} stages have {num_total - 1} boundaries, got {len(sends_s)} message times"
        )
    if min(min(forward_s), min(backward_s), min(sends_s, default=0.0)) < 0:
        raise CostModelError("a stage or message cannot take negative time")
    ranks = stage_ranks(schedule_name, num_stages, num_virtual)
    # Neighbours on one rank hand tensors over.
    passed_s = [0.0 if one == other else s for s, one, other in zip(sends_s, ranks, ranks[1:], strict=False)]
    weights_s = _weight_s(schedule_name, backward_s, weight_s)
    return passed_s, list(map(sub, backward_s, weights_s)), weights_s


def _weight_s(
    schedule_name: str, backward_s: Sequence[float], weight_s: Sequence[float] | None
) -> Sequence[float]:
    if weight_s is None:
        if schedule_name in SPLIT_BACKWARD_SCHEDULES:
            raise CostModelError(
                f"{schedule_name} splits backwards; pass weight_s, the part of each stage's backward that "
                "computes weight gradients"
            )
        return [0.0] * len(backward_s)
    if len(weight_s) != len(backward_s):
        raise CostModelError(
            f"{len(backward_s)} virtual stages need as many weight times, got {len(weight_s)}"
        )
    for stage, (weight, whole) in enumerate(zip(weight_s, backward_s, strict=True)):
        if not 0 <= weight <= whole:
            raise CostModelError(
                f"the weight part of stage {stage}'s backward takes {weight:g} s of its {whole:g} s; "
                "it is a part of the backward, not added to it"
            )
    return weight_s


def _overlap_saving_s(
    forward_s: Sequence[float], backward_s: Sequence[float], overlap_saving_s: float | Sequence[float]
) -> Sequence[float]:
    """Per stage, whose backward is overlapped with a forward of the other stage of its rank in a V."""
    num_total = len(backward_s)
    if isinstance(overlap_saving_s, float | int):
        overlap_saving_s = [overlap_saving_s] * num_total
    if len(overlap_saving_s) != num_total:
        raise CostModelError(
            f"{num_total} virtual stages need as many overlap savings, got {len(overlap_saving_s)}"
        )
    if not any(overlap_saving_s):
        return overlap_saving_s
    for stage, saving in enumerate(overlap_saving_s):
        shorter_s = min(forward_s[num_total - 1 - stage], backward_s[stage])
        if not 0 <= saving <= shorter_s * (1 + 1e-9):  # sums, each rounded in its own order
            raise CostModelError(
                f"overlapping a forward with stage {stage}'s backward saves at most the shorter one's "
                f"{shorter_s:g} s, got {saving:g}"
            )
    return overlap_saving_s


def overlap_saving_s(
    forward_compute_s: float,
    forward_communication_s: float,
    backward_compute_s: float,
    backward_communication_s: float,
) -> float:
    """How much shorter a forward and a backward of different microbatches are at once than in turn.

    A device computes one thing at a time and its links carry one thing at a time, so together they take as
    long as the longest of: all compute, all communication, the forward, the backward. Without communication
    that saves nothing.
    """
    forward_s = forward_compute_s + forward_communication_s
    backward_s = backward_compute_s + backward_communication_s
    at_once_s = max(
        forward_compute_s + backward_compute_s,
        forward_communication_s + backward_communication_s,
        forward_s,
        backward_s,
    )
    return forward_s + backward_s - at_once_s


@dataclass(frozen=True, slots=True)
class Steps:
    """All work of a step, each after what it waits for: by rank, work, and position of the step waited for or
    -1. Packed, as planners come back to a step for each of their programs."""

    ranks: array[int]
    works: array[int]
    waits: array[int]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.ranks, self.works, self.waits, strict=True)

    def in_order(self) -> NDArray[np.intp]:
        """Their positions in the order of `orders.numbered_orders`: rank after rank, as each runs them."""
        return np.asarray(self.ranks).argsort(kind="stable")


@lru_cache(maxsize=256)
def ordered_steps(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> Steps:
    """The steps of a schedule. Raises as `check_schedule`."""
    orders = numbered_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    num_total = num_stages * num_virtual
    is_paired = np.append(orders.phases[1:] == OVERLAPPING, False)
    works = np.where(is_paired, _PAIRED, orders.phases) * num_total + orders.stages
    waits = _waits(orders, is_paired, num_total)
    turn = np.array(_one_after_the_other(orders.ranks, waits))
    position = np.empty_like(turn)
    position[turn] = np.arange(len(turn))
    waits = np.where(waits < 0, -1, position[waits])[turn]
    return Steps(
        _packed(orders.ranks[turn]), _packed(works[turn]), array("i", waits.astype(np.intc).tobytes())
    )


def _waits(orders: Orders, is_paired: NDArray[np.bool_], num_total: int) -> NDArray[np.intp]:
    """Which piece of work each waits for, -1 for none: what passes a microbatch on to it. What comes before
    on its own rank need not be said."""
    _, phases, stages, microbatches = orders
    legs = np.where(phases == FORWARD, stages, 2 * num_total - 1 - stages)  # of the way there and back
    made_by = np.empty((2 * num_total, microbatches.max() + 1), dtype=np.intp)
    passes_on = phases != WEIGHT  # whose input part is behind it in the same rank's order
    by = np.arange(len(legs)) + is_paired  # what both make leaves when both end
    made_by[legs[passes_on], microbatches[passes_on]] = by[passes_on]
    return np.where(passes_on & (legs > 0), made_by[legs - 1, microbatches], -1)


def _one_after_the_other(ranks: NDArray[np.int32], waits: NDArray[np.intp]) -> list[int]:
    """All pieces of work, each after the one before it on its rank and the one that it waits for."""
    starts = np.diff(ranks, prepend=-1).nonzero()[0].tolist()
    ends: list[int] = np.bincount(ranks).cumsum()[ranks].tolist()
    waits_for: list[int] = waits.tolist()
    is_done = bytearray(len(ends) + 1)
    is_done[-1] = 1  # nothing need be waited for
    held_up: dict[int, list[int]] = {}  # by the work that they wait for
    turn: list[int] = []
    while starts:
        first = work = starts.pop()
        end = ends[first]
        while work < end and is_done[waits_for[work]]:
            is_done[work] = 1
            if work in held_up:
                starts += held_up.pop(work)
            work += 1
        turn += range(first, work)
        if work < end:
            held_up.setdefault(waits_for[work], []).append(work)
    assert len(turn) == len(ends), "the order deadlocks"
    return turn


def _packed(numbers: NDArray[np.integer]) -> array[int]:
    """Numbers from 0 on, in two bytes each unless thousands of stages make some of them larger."""
    is_short = numbers.max() < 1 << 16
    return array("H" if is_short else "i", numbers.astype(np.ushort if is_short else np.intc).tobytes())


def run_steps(
    steps: Steps, times: WorkTimes, num_stages: int, blocking_sends: bool = False
) -> tuple[list[float], tuple[float, ...]]:
    """When every step ends, and every rank, if all start as early as they can.

    Messages travel beside compute. With `blocking_sends` a rank waits between two pieces of work until it has
    sent what the first made and received what the second needs; it does both at once.
    """
    if blocking_sends:
        return _run_blocking(steps, times, num_stages)
    compute_s, receive_s, _ = times
    clock_s = [0.0] * num_stages
    end_s: list[float] = []
    running, now = 0, 0.0  # of most steps, the next is of the same rank
    for rank, work, wait in steps:
        if rank != running:
            clock_s[running] = now
            running, now = rank, clock_s[rank]
        if wait >= 0 and (ready := end_s[wait] + receive_s[work]) > now:
            now = ready
        now += compute_s[work]
        end_s.append(now)
    clock_s[running] = now
    return end_s, tuple(clock_s)


def _run_blocking(steps: Steps, times: WorkTimes, num_stages: int) -> tuple[list[float], tuple[float, ...]]:
    compute_s, receive_s, send_s = times
    clock_s = [0.0] * num_stages
    sending_s = [0.0] * num_stages
    end_s: list[float] = []
    for rank, work, wait in steps:
        now = clock_s[rank]
        start = now + sending_s[rank]
        if wait >= 0:
            start = max(start, max(now, end_s[wait]) + receive_s[work])
        clock_s[rank] = start + compute_s[work]
        sending_s[rank] = send_s[work]
        end_s.append(clock_s[rank])
    return end_s, tuple(clock_s)
