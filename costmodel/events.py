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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import add, sub
from typing import NamedTuple

from costmodel.errors import CostModelError
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, rank_orders, stage_ranks
from costmodel.phases import PHASES, Op

_PAIRED = len(PHASES)

Step = tuple[int, int, int]  # (rank, work, position of the step waited for or -1)


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
    if min(*forward_s, *backward_s, *sends_s) < 0:
        raise CostModelError("a stage or message cannot take negative time")
    weights_s = _weight_s(schedule_name, backward_s, weight_s)
    savings_s = _overlap_saving_s(forward_s, backward_s, overlap_saving_s)

    ranks = stage_ranks(schedule_name, num_stages, num_virtual)
    for boundary in range(num_total - 1):
        if ranks[boundary] == ranks[boundary + 1]:
            sends_s[boundary] = 0.0  # neighbours on one rank hand tensors over
    inputs_s = list(map(sub, backward_s, weights_s))
    pairs_s = map(add, backward_s, reversed(forward_s))  # in a V, the forward is of the mirrored stage
    overlapped_s = list(map(sub, pairs_s, savings_s))
    before, after, none = [0.0, *sends_s], [*sends_s, 0.0], [0.0] * num_total
    return WorkTimes(
        compute_s=[*forward_s, *backward_s, *inputs_s, *weights_s, *overlapped_s, *none],
        receive_s=[*before, *after, *after, *none, *after, *before],
        send_s=[*after, *before, *before, *none, *before, *none],
    )


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


@lru_cache(maxsize=16)
def ordered_steps(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int
) -> tuple[tuple[Step, ...], tuple[Op, ...]]:
    """All work of a step, each after what it waits for, as the simulation and as `orders` name it.

    Raises as `rank_orders`.
    """
    orders = rank_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    ranks = stage_ranks(schedule_name, num_stages, num_virtual)
    num_total = num_stages * num_virtual
    last_leg = 2 * num_total - 1  # of a microbatch's way there and back
    leg_ranks = [*ranks, *reversed(ranks)]
    made_by: dict[tuple[int, int], int] = {}  # by leg and microbatch
    steps: list[Step] = []
    ops: list[Op] = []
    num_done = [0] * num_stages
    runnable = {0}
    while runnable:
        rank = runnable.pop()
        order, done = orders[rank], num_done[rank]
        while done < len(order):
            phase, stage, microbatch = order[done]
            work, wait = PHASES.index(phase), -1
            if phase != "W":  # its input part is behind it in the same rank's order
                leg = stage if phase == "F" else last_leg - stage
                if leg and (wait := made_by.get((leg - 1, microbatch), -1)) < 0:
                    break
                outputs = [(leg, microbatch)]
                if phase == "F" and done + 1 < len(order) and order[done + 1][0] == "O":
                    work, outputs = _PAIRED, []
                elif phase == "O":
                    outputs.append(order[done - 1][1:])
                for output in outputs:
                    made_by[output] = len(steps)
                    runnable.update(leg_ranks[output[0] + 1 : output[0] + 2])
            steps.append((rank, work * num_total + stage, wait))
            ops.append(order[done])
            done += 1
        num_done[rank] = done
        runnable.discard(rank)
    stuck = [rank for rank, order in enumerate(orders) if num_done[rank] < len(order)]
    assert not stuck, f"the order deadlocks on ranks {stuck}"
    return tuple(steps), tuple(ops)


@dataclass(frozen=True, slots=True)
class PackedSteps:
    """All work of a step as `ordered_steps` has it, in less than a tenth of the memory: by rank, work, and
    position of the step waited for."""

    ranks: array[int]
    works: array[int]
    waits: array[int]

    def __iter__(self) -> Iterator[Step]:
        return zip(self.ranks, self.works, self.waits, strict=True)


@lru_cache(maxsize=256)
def packed_steps(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> PackedSteps:
    """The work of `ordered_steps`, to keep: planners come back to a step for each of their programs."""
    steps, _ = ordered_steps(schedule_name, num_stages, num_microbatches, num_virtual)
    ranks, works, waits = zip(*steps, strict=True)
    return PackedSteps(_packed(ranks), _packed(works), array("i", waits))


def _packed(numbers: Sequence[int]) -> array[int]:
    """Numbers from 0 on, in two bytes each unless thousands of stages make some of them larger."""
    return array("H" if max(numbers) < 1 << 16 else "i", numbers)


def run_steps(
    steps: Iterable[Step], times: WorkTimes, num_stages: int, blocking_sends: bool = False
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
    add = end_s.append
    for rank, work, wait in steps:
        now = clock_s[rank]
        if wait >= 0 and (ready := end_s[wait] + receive_s[work]) > now:
            now = ready
        now += compute_s[work]
        clock_s[rank] = now
        add(now)
    return end_s, tuple(clock_s)


def _run_blocking(
    steps: Iterable[Step], times: WorkTimes, num_stages: int
) -> tuple[list[float], tuple[float, ...]]:
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
