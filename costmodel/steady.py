"""When each rank of a pipeline ends a step, without simulating all of it: planners ask thousands of times."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.orders import Op, check_schedule, rank_orders
from costmodel.schedule import closed_form_step_s, microbatch_legs, run_orders


def rank_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    num_virtual: int = 1,
) -> tuple[float, ...]:
    """When each rank ends its last backward: `simulate(...).finish_s`.

    GPipe, and uniform stages without message time, have closed forms. Otherwise the simulation stops as soon
    as the step repeats itself, and multiplies; the result is the same up to rounding. Raises as `simulate`.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    leg_s, delay_s = microbatch_legs(num_stages, num_virtual, forward_s, backward_s, send_s)
    if schedule_name == "GPipe" or num_stages == 1:
        return _chain_finish_s(schedule_name, num_stages, num_microbatches, leg_s, delay_s)
    if num_virtual > 1 and num_microbatches % num_stages:
        orders = rank_orders(schedule_name, num_stages, num_microbatches, num_virtual)
        return run_orders(orders, leg_s, delay_s, num_microbatches)[1]
    uniform = _uniform(leg_s) if not any(delay_s) else None
    if uniform is None:
        return _periodic_finish_s(schedule_name, num_stages, num_microbatches, num_virtual, leg_s, delay_s)
    return _uniform_finish_s(schedule_name, num_stages, num_microbatches, num_virtual, *uniform)


def _periodic_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    num_virtual: int,
    leg_s: list[float],
    delay_s: list[float],
) -> tuple[float, ...]:
    """Finish times from a shorter step, once that is seen to repeat itself every `num_stages` microbatches.

    A schedule is a max-plus linear system: when every rank's latest round ends a constant later than the
    round before, all further rounds do (Baccelli et al., Synchronization and Linearity, 1992, chapter 3).
    """
    num_short = 4 * num_stages + num_microbatches % num_stages  # two rounds beyond the longest warm-up
    while 2 * num_short <= num_microbatches:
        orders = rank_orders(schedule_name, num_stages, num_short, num_virtual)
        end_s, finish_s = run_orders(orders, leg_s, delay_s, num_short)
        round_s = _round_s(orders, end_s, 2 * num_stages * num_virtual)
        if round_s is not None:
            num_more = (num_microbatches - num_short) // num_stages
            return tuple(finish + num_more * round_s for finish in finish_s)
        num_short += num_short // num_stages * num_stages
    orders = rank_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    return run_orders(orders, leg_s, delay_s, num_microbatches)[1]


def _round_s(orders: Sequence[Sequence[Op]], end_s: list[list[float]], num_ops: int) -> float | None:
    """How long a round of microbatches takes; None while rounds still differ.

    Compares the ends of each rank's last `num_ops` before its cooldown with those one round earlier.
    """
    num_stages = len(orders)
    longest, shortest = 0.0, float("inf")
    for order in orders:
        stop = len(order)
        while order[stop - 1][0] >= len(end_s) // 2:
            stop -= 1
        for leg, microbatch in order[stop - num_ops : stop]:
            if microbatch < num_stages:
                return None
            later_s = end_s[leg][microbatch] - end_s[leg][microbatch - num_stages]
            longest, shortest = max(longest, later_s), min(shortest, later_s)
    return longest if longest - shortest <= 1e-9 * longest else None


def _chain_finish_s(
    schedule_name: str, num_stages: int, num_microbatches: int, leg_s: list[float], delay_s: list[float]
) -> tuple[float, ...]:
    """GPipe is two flow shops of equal jobs, each taking Σ t + (m - 1) max t; one rank is always busy."""
    if num_stages == 1:
        return (num_microbatches * sum(leg_s),)
    repeats = num_microbatches - 1
    forward_s = sum(leg_s[:num_stages]) + sum(delay_s[:num_stages]) + repeats * max(leg_s[:num_stages])
    legs_back = range(num_stages, 2 * num_stages)
    finish_s = []
    for last in reversed(legs_back):
        passed = slice(num_stages, last + 1)
        finish_s.append(forward_s + sum(leg_s[passed]) + sum(delay_s[passed]) + repeats * max(leg_s[passed]))
    return tuple(finish_s)


def _uniform(leg_s: list[float]) -> tuple[float, float] | None:
    """Forward and backward seconds of every stage, if they are the same for all."""
    half = len(leg_s) // 2
    forward_s, backward_s = leg_s[0], leg_s[-1]
    same = leg_s[:half].count(forward_s) == half and leg_s[half:].count(backward_s) == half
    return (forward_s, backward_s) if same else None


def _uniform_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    num_virtual: int,
    forward_s: float,
    backward_s: float,
) -> tuple[float, ...]:
    per_rank = (num_virtual * forward_s, num_virtual * backward_s)
    step_s = closed_form_step_s(schedule_name, num_stages, num_microbatches, *per_rank, num_virtual)
    return tuple(step_s - rank * backward_s for rank in range(num_stages))
