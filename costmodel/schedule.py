"""How long a pipeline schedule takes: an exact event simulation, its closed forms, a lower bound.

A stage's forward needs the previous stage's forward of the same microbatch, its backward the next stage's
backward, both plus the time of the message between them; messages overlap with compute, and a rank runs one
thing at a time in its schedule's order (`orders.rank_orders`). Nothing else is assumed: times may differ by
stage and by boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

from costmodel.errors import CostModelError
from costmodel.orders import Op, check_schedule, peak_in_flight, rank_orders


class Event(NamedTuple):
    """One forward or backward of one microbatch through one (virtual) stage."""

    rank: int
    stage: int
    microbatch: int
    phase: Literal["forward", "backward"]
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step that takes `step_s`.

    Per rank: `busy_s` computing, `finish_s` the end of its last backward, and `peak_in_flight` the most
    (virtual stage, microbatch) activations it holds.
    """

    step_s: float
    busy_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    _orders: tuple[tuple[Op, ...], ...] = field(repr=False)
    _end_s: tuple[tuple[float, ...], ...] = field(repr=False)  # per leg and microbatch
    _leg_s: tuple[float, ...] = field(repr=False)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Every forward and backward, rank by rank in the order they run."""
        return tuple(
            self._event(rank, leg, microbatch)
            for rank, order in enumerate(self._orders)
            for leg, microbatch in order
        )

    def _event(self, rank: int, leg: int, microbatch: int) -> Event:
        end_s = self._end_s[leg][microbatch]
        start_s = end_s - self._leg_s[leg]
        mirrored = len(self._leg_s) - 1 - leg
        if leg < mirrored:
            return Event(rank, leg, microbatch, "forward", start_s, end_s)
        return Event(rank, mirrored, microbatch, "backward", start_s, end_s)


def simulate(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    num_virtual: int = 1,
) -> Timeline:
    """Runs one training step of a pipeline of `num_stages` ranks with `num_virtual` stages on each.

    `forward_s` and `backward_s` have one entry per virtual stage, in the order of the model: stage s is on
    rank s % num_stages. `send_s` is the time of a message between neighbouring stages, one number or one per
    boundary. Raises CostModelError for an unknown schedule, sizes it does not run, or a wrong number of
    times.
    """
    orders = rank_orders(schedule_name, num_stages, num_microbatches, num_virtual)
    leg_s, delay_s = microbatch_legs(num_stages, num_virtual, forward_s, backward_s, send_s)
    end_s, finish_s = run_orders(orders, leg_s, delay_s, num_microbatches)
    return Timeline(
        step_s=max(finish_s),
        busy_s=tuple(num_microbatches * busy for busy in _rank_sums(leg_s, num_stages)),
        finish_s=finish_s,
        peak_in_flight=peak_in_flight(schedule_name, num_stages, num_microbatches, num_virtual),
        _orders=orders,
        _end_s=tuple(map(tuple, end_s)),
        _leg_s=tuple(leg_s),
    )


def closed_form_step_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    forward_s: float,
    backward_s: float,
    num_virtual: int = 1,
) -> float:
    """The step of p uniform ranks whose messages take no time, f and b seconds per microbatch and *rank*.

    (m + p - 1)(f + b) for GPipe and 1F1B (arXiv:2104.04473, section 2.2.1); (m + (p - 1) / v)(f + b) for
    Interleaved1F1B, its section 2.2.2, when m is a multiple of p. Raises CostModelError for other m, and as
    `simulate`.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    if num_virtual > 1 and num_microbatches % num_stages:
        raise CostModelError(
            f"the interleaved closed form needs whole rounds of {num_stages} microbatches, "
            f"got {num_microbatches}"
        )
    return (num_microbatches + (num_stages - 1) / num_virtual) * (forward_s + backward_s)


def pipeline_lower_bound_s(
    num_stages: int,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    num_virtual: int = 1,
) -> float:
    """No schedule with undivided backwards is faster, whatever its order and memory.

    A microbatch takes its whole chain; and rank r can start no earlier than a forward reaches it, is then
    busy with every microbatch, and its last backward must still travel back to the first stage. Arguments as
    `simulate`.
    """
    leg_s, delay_s = microbatch_legs(num_stages, num_virtual, forward_s, backward_s, send_s)
    one_microbatch_s = sum(leg_s) + sum(delay_s)
    busy_s = _rank_sums(leg_s, num_stages)
    arrival_s = [0.0, *accumulate(leg_s[leg] + delay_s[leg + 1] for leg in range(num_stages - 1))]
    return_s = [0.0, *accumulate(leg_s[-1 - leg] + delay_s[-1 - leg] for leg in range(num_stages - 1))]
    ranks = zip(arrival_s, busy_s, return_s, strict=True)
    return max(one_microbatch_s, *(a + num_microbatches * b + r for a, b, r in ranks))


def microbatch_legs(
    num_stages: int,
    num_virtual: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float],
) -> tuple[list[float], list[float]]:
    """Seconds of each leg of a microbatch's way (`orders`), and of the message that each leg waits for."""
    num_total = num_stages * num_virtual
    if len(forward_s) != num_total or len(backward_s) != num_total:
        raise CostModelError(
            f"{num_stages} ranks with {num_virtual} virtual stages need {num_total} forward and "
            f"backward times, got {len(forward_s)} and {len(backward_s)}"
        )
    sends = [send_s] * (num_total - 1) if isinstance(send_s, float | int) else list(send_s)
    if len(sends) != num_total - 1:
        raise CostModelError(
            f"{num_total} stages have {num_total - 1} boundaries, got {len(sends)} message times"
        )
    if num_stages == 1:
        sends = [0.0] * len(sends)  # neighbours on one rank hand tensors over
    if min(*forward_s, *backward_s, *sends) < 0:
        raise CostModelError("a stage or message cannot take negative time")
    return [*forward_s, *reversed(backward_s)], [0.0, *sends, 0.0, *reversed(sends)]


def run_orders(
    orders: Sequence[Sequence[Op]], leg_s: Sequence[float], delay_s: Sequence[float], num_microbatches: int
) -> tuple[list[list[float]], tuple[float, ...]]:
    """When every leg of every microbatch ends, and every rank, if all start as early as they can."""
    not_yet = -1.0
    end_s = [[not_yet] * num_microbatches for _ in leg_s]
    num_ranks = len(orders)
    num_done = [0] * num_ranks
    clock_s = [0.0] * num_ranks
    runnable = [0]
    while runnable:
        rank = runnable.pop()
        order, done, now = orders[rank], num_done[rank], clock_s[rank]
        while done < len(order):
            leg, microbatch = order[done]
            if leg:
                ready = end_s[leg - 1][microbatch]
                if ready == not_yet:
                    break
                now = max(now, ready + delay_s[leg])
            now += leg_s[leg]
            end_s[leg][microbatch] = now
            done += 1
        if done > num_done[rank]:
            num_done[rank], clock_s[rank] = done, now
            runnable += ((rank - 1) % num_ranks, (rank + 1) % num_ranks)
    stuck = [rank for rank, order in enumerate(orders) if num_done[rank] < len(order)]
    assert not stuck, f"the order deadlocks on ranks {stuck}"
    return end_s, tuple(clock_s)


def _rank_sums(leg_s: Sequence[float], num_stages: int) -> list[float]:
    """What one microbatch costs each rank, over all of its virtual stages."""
    return [
        sum(leg_s[stage] + leg_s[-1 - stage] for stage in range(rank, len(leg_s) // 2, num_stages))
        for rank in range(num_stages)
    ]
