"""The event simulation under `schedule` and `steady`: when each piece of work of a pipeline ends.

A schedule is a partial order of pieces of work that does not depend on how long they take. `ordered_steps`
sorts it once, into waves: in each, a rank runs one piece of work at most, which waits for none of its own
wave or later ones. Running it is then, wave after wave,

    end = max(end of the rank's previous work, end of the work waited for + message) + compute

Work is numbered `phase * num_virtual_stages + stage`, with the phases in the order of `PHASES`; a rank that
does nothing in a wave does the last work of all, which takes no time. A forward and the backward O that runs
together with it start when both can, and what they make leaves when both end; the forward, then of the phase
`_PAIRED`, only waits for its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import add, sub
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import CostModelError
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, numbered_orders, stage_ranks
from costmodel.phases import FORWARD, OVERLAPPING, PHASES, WEIGHT, Orders

MANY_RANKS = 16
"""From how many ranks on it pays to go through all of a wave at once."""

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
        compute_s=[*forward_s, *backward_s, *inputs_s, *weights_s, *overlapped_s, *none, 0.0],
        receive_s=[*before, *after, *after, *none, *after, *before, 0.0],
        send_s=[*after, *before, *before, *none, *before, *none, 0.0],
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


class Steps(NamedTuple):
    """All work of a step in waves: what each rank runs, and which step that waits for, [wave, rank]. Nothing
    runs in the first. Steps are counted through all waves; what waits for nothing waits for the first.

    Packed, as planners come back to a step for each of their programs; where microbatches are far fewer than
    ranks, most of it is idle.
    """

    works: NDArray[np.integer]
    waits: NDArray[np.int32]

    @property
    def idle(self) -> int:
        """The work of doing nothing."""
        return int(self.works[0, 0])

    def in_order(self) -> NDArray[np.intp]:
        """The steps in the order of `orders.numbered_orders`: rank after rank, as each runs them."""
        num_waves, num_ranks = self.works.shape
        steps = np.arange(num_waves * num_ranks).reshape(num_waves, num_ranks)
        found: NDArray[np.intp] = steps.T[self.idle != self.works.T]
        return found


@lru_cache(maxsize=256)
def ordered_steps(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> Steps:
    """The steps of a schedule. Raises as `check_schedule`."""
    orders = numbered_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    num_total = num_stages * num_virtual
    is_paired = np.append(orders.phases[1:] == OVERLAPPING, False)
    idle = (_PAIRED + 1) * num_total
    works = np.where(is_paired, _PAIRED, orders.phases) * num_total + orders.stages
    waits = _waits(orders, is_paired, num_total)
    waves = _waves(orders.ranks, waits)
    is_idle = waves < 0
    step = np.zeros_like(waits)
    step[waves[~is_idle]] = np.flatnonzero(~is_idle)
    waits = np.where(waits < 0, 0, step[waits])
    steps = Steps(
        np.where(is_idle, idle, works[waves]).astype(np.min_scalar_type(idle)),
        np.where(is_idle, 0, waits[waves]).astype(np.int32),
    )
    for numbers in steps:
        numbers.setflags(write=False)
    return steps


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


def _waves(ranks: NDArray[np.int32], waits: NDArray[np.intp]) -> NDArray[np.intp]:
    """The pieces of work that run in each wave, [wave, rank], -1 for none: each as soon as the one before it
    on its rank and the one that it waits for have run."""
    number = np.arange(len(ranks)) + ranks  # behind each rank's work stands one that never starts
    never = number[-1] + 2
    waits_for = np.full(never, never)
    waits_for[number] = np.where(waits < 0, never + 1, number[waits])
    has_run = np.zeros(never + 2, dtype=np.bool_)
    has_run[-1] = True
    heads = number[np.diff(ranks, prepend=-1).nonzero()]
    starts = np.zeros(len(heads), dtype=np.bool_)
    waves, started, num_left = [heads], [starts], len(ranks)
    while num_left:
        starts = has_run[waits_for[heads]]
        assert starts.any(), "the order deadlocks"
        has_run[heads] = starts
        waves.append(heads)
        started.append(starts)
        heads = heads + starts
        num_left -= int(np.count_nonzero(starts))
    return np.where(started, np.array(waves) - np.arange(len(heads)), -1)


def run_steps(steps: Steps, times: WorkTimes, blocking_sends: bool = False) -> NDArray[np.float64]:
    """When every step ends if all start as early as they can, [wave, rank]; in the last, when ranks end.

    Messages travel beside compute. With `blocking_sends` a rank waits between two pieces of work until it has
    sent what the first made and received what the second needs; it does both at once.
    """
    if blocking_sends:
        return _run_blocking(steps, times)
    num_ranks = steps.works.shape[1]
    if num_ranks >= MANY_RANKS:
        return _run_waves(steps, times)
    compute_s, receive_s, _ = times
    end_s = [0.0] * num_ranks
    works, waits = (numbers[1:].ravel().tolist() for numbers in steps)
    # What ends in a wave is where the ranks are in the next.
    for now, work, wait in zip(end_s, works, waits, strict=False):
        if wait and (ready := end_s[wait] + receive_s[work]) > now:
            now = ready
        end_s.append(now + compute_s[work])
    return np.array(end_s).reshape(steps.works.shape)


def _run_waves(steps: Steps, times: WorkTimes) -> NDArray[np.float64]:
    """The same, all of a wave at once."""
    end_s: NDArray[np.float64] = np.array(times.compute_s)[steps.works]  # until then, what each takes
    ready_s = np.array(times.receive_s)[steps.works]
    all_end_s, waits = end_s.reshape(-1), steps.waits.astype(np.intp)
    for now, wait, ready, end in zip(end_s, waits[1:], ready_s[1:], end_s[1:], strict=False):
        ready += all_end_s[wait]
        end += np.maximum(now, ready)
    return end_s


def _run_blocking(steps: Steps, times: WorkTimes) -> NDArray[np.float64]:
    compute_s, receive_s, send_s = times
    num_ranks, idle = steps.works.shape[1], steps.idle
    sending_s = [0.0] * num_ranks
    end_s = [0.0] * num_ranks
    works, waits = (numbers[1:].ravel().tolist() for numbers in steps)
    for step, (now, work, wait) in enumerate(zip(end_s, works, waits, strict=False)):
        if work == idle:
            end_s.append(now)
            continue
        rank = step % num_ranks
        start = now + sending_s[rank]
        if wait:
            start = max(start, max(now, end_s[wait]) + receive_s[work])
        sending_s[rank] = send_s[work]
        end_s.append(start + compute_s[work])
    return np.array(end_s).reshape(steps.works.shape)
