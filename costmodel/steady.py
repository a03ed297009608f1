"""When each rank of a pipeline ends a step, without simulating all of it: planners ask thousands of times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import add

import numpy as np
from numpy.typing import NDArray

from costmodel.closed_forms import uniform_finish_s
from costmodel.events import WorkTimes, checked_times, ordered_steps, run_steps, work_times
from costmodel.one_f_one_b import one_f_one_b_finish_s
from costmodel.orders import OVERLAPPING_SCHEDULES, check_schedule, numbered_orders
from costmodel.phases import FORWARD, PHASES

_Positions = NDArray[np.intp]


def rank_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    num_virtual: int = 1,
    *,
    weight_s: Sequence[float] | None = None,
    blocking_sends: bool = False,
    overlap_saving_s: float | Sequence[float] = 0.0,
) -> tuple[float, ...]:
    """When each rank ends its last backward: `simulate(...).finish_s`, with the same arguments and errors.

    GPipe, and uniform stages without message time, have closed forms; 1F1B goes row by row. Otherwise the
    simulation stops as soon as the step repeats itself, and multiplies. The result is the same up to
    rounding.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    times = work_times(
        schedule_name, num_stages, num_virtual, forward_s, backward_s, send_s, weight_s, overlap_saving_s
    )
    sends_s = times.send_s[: num_stages * num_virtual]
    overlaps = schedule_name in OVERLAPPING_SCHEDULES and overlap_saving_s != 0.0
    if not any(sends_s) and not overlaps:
        uniform = _uniform(forward_s, backward_s, weight_s)
        if uniform is not None:
            finish_s = uniform_finish_s(schedule_name, num_stages, num_microbatches, num_virtual, *uniform)
            if finish_s is not None:
                return finish_s
    if schedule_name == "GPipe" and not blocking_sends:
        return _chain_finish_s(num_microbatches, forward_s, backward_s, sends_s)
    if schedule_name == "1F1B" and num_microbatches >= num_stages:
        return one_f_one_b_finish_s(num_microbatches, forward_s, backward_s, sends_s[:-1], blocking_sends)
    return _periodic_finish_s(schedule_name, num_stages, num_microbatches, num_virtual, times, blocking_sends)


def latest_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    num_virtual: int = 1,
    *,
    weight_s: Sequence[float] | None = None,
) -> float:
    """No rank ends its last backward later, from the closed form of a pipeline whose stages are all like the
    slowest, which computes nothing while it waits for a message; infinite where there is none.

    Arguments and errors as `simulate`, whose blocking sends are not considered. Up to rounding.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    sends_s, inputs_s, weights_s = checked_times(
        schedule_name, num_stages, num_virtual, forward_s, backward_s, send_s, weight_s
    )
    slowest_s = max(map(add, forward_s, [0.0, *sends_s]))
    input_s, slowest_weight_s = max(map(add, inputs_s, [*sends_s, 0.0])), max(weights_s)
    finish_s = uniform_finish_s(
        schedule_name, num_stages, num_microbatches, num_virtual,
        slowest_s, input_s + slowest_weight_s, slowest_weight_s,
    )  # fmt: skip
    return float("inf") if finish_s is None else max(finish_s)


def _uniform(
    forward_s: Sequence[float], backward_s: Sequence[float], weight_s: Sequence[float] | None
) -> tuple[float, float, float] | None:
    """Forward, backward and weight seconds of every stage, if they are the same for all."""
    weights_s = weight_s or (0.0,) * len(backward_s)
    same = all(times.count(times[0]) == len(times) for times in (forward_s, backward_s, weights_s))
    return (forward_s[0], backward_s[0], weights_s[0]) if same else None


def _chain_finish_s(
    num_microbatches: int, forward_s: Sequence[float], backward_s: Sequence[float], sends_s: Sequence[float]
) -> tuple[float, ...]:
    """GPipe is two flow shops of equal jobs, each taking Σ t + (m - 1) max t; the last rank has no gap."""
    repeats = num_microbatches - 1
    passed_s = sum(forward_s) + repeats * max(forward_s) + sum(sends_s)
    slowest_s = 0.0
    finish_s = []
    for backward, send in zip(reversed(backward_s), reversed(sends_s), strict=True):
        slowest_s = max(slowest_s, backward)
        passed_s += send + backward
        finish_s.append(passed_s + repeats * slowest_s)
    return tuple(reversed(finish_s))


def _periodic_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    num_virtual: int,
    times: WorkTimes,
    blocking_sends: bool,
) -> tuple[float, ...]:
    """Finish times from a shorter step, once that is seen to repeat itself every `num_stages` microbatches.

    A schedule is a max-plus linear system: when every rank's latest round ends a constant later than the
    round before, all further rounds do (Baccelli et al., Synchronization and Linearity, 1992, chapter 3).
    """
    shape = (schedule_name, num_stages)
    whole_rounds = num_virtual == 1 or num_microbatches % num_stages == 0
    repeats = whole_rounds and schedule_name not in ("GPipe", "LoopedBFS")
    num_short = 4 * num_stages + num_microbatches % num_stages  # two rounds beyond the longest warm-up
    while repeats and num_short < num_microbatches:
        steps = ordered_steps(*shape, num_short, num_virtual)
        end_s = run_steps(steps, times, blocking_sends)
        round_s = _round_s(end_s.ravel(), *_rounds_apart(*shape, num_short, num_virtual))
        if round_s is not None:
            num_more = (num_microbatches - num_short) // num_stages
            return tuple((end_s[-1] + num_more * round_s).tolist())
        num_short += num_short // num_stages * num_stages
    steps = ordered_steps(*shape, num_microbatches, num_virtual)
    return tuple(run_steps(steps, times, blocking_sends)[-1].tolist())


def _round_s(end_s: NDArray[np.float64], earlier: _Positions, later: _Positions) -> float | None:
    """How long a round of microbatches takes; None while rounds still differ."""
    rounds_s = end_s[later] - end_s[earlier]
    if not rounds_s.size:
        return None
    longest_s = float(rounds_s.max())
    return longest_s if longest_s - rounds_s.min() <= 1e-9 * longest_s else None


@lru_cache(maxsize=64)
def _rounds_apart(
    schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int
) -> tuple[_Positions, _Positions]:
    """Steps a round apart, the earlier and the later ones: each rank's last round of work before its
    cool-down, and the one before.

    Empty when the order of the one is not that of the other.
    """
    shape = (schedule_name, num_stages, num_microbatches, num_virtual)
    ranks, phases, stages, microbatches = numbered_orders(*shape)
    position = ordered_steps(*shape).in_order()
    numbers = np.bincount(ranks)
    firsts = numbers.cumsum() - numbers
    place = np.arange(len(ranks)) - firsts[ranks]  # in the order of its rank
    stops = np.maximum.reduceat(np.where(phases == FORWARD, place + 1, 0), firsts)
    starts = stops - numbers * num_stages // num_microbatches
    last = (place >= starts[ranks]) & (place < stops[ranks])

    step_of = np.full((len(PHASES), num_stages * num_virtual, num_microbatches), -1)
    step_of[phases, stages, microbatches] = position
    before = microbatches[last] - num_stages
    earlier = step_of[phases[last], stages[last], before]
    if (starts < 0).any() or (before < 0).any() or (earlier < 0).any():
        return earlier[:0], earlier[:0]
    return earlier, position[last]
