"""How long a pipeline schedule takes: an exact event simulation, its closed forms, a lower bound.

A stage's forward needs the previous stage's forward of the same microbatch, its backward the next stage's
backward (in a split backward, its input part), both plus the time of the message between them; a rank runs
one thing at a time in its schedule's order (`orders.rank_orders`). Nothing else is assumed: times may differ
by stage and by boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodel.closed_forms import uniform_finish_s
from costmodel.errors import CostModelError
from costmodel.events import Steps, ordered_steps, run_steps, work_times
from costmodel.orders import check_schedule, numbered_orders, peak_in_flight
from costmodel.phases import OVERLAPPING, PHASES, Orders, Phase

EventPhase = Literal["forward", "backward", "backward_input", "backward_weight"]
_EVENT_PHASES: dict[Phase, EventPhase] = {
    "F": "forward",
    "B": "backward",
    "I": "backward_input",
    "W": "backward_weight",
    "O": "backward",
}


class Event(NamedTuple):
    """One forward, or (part of a) backward, of one microbatch through one (virtual) stage."""

    rank: int
    stage: int
    microbatch: int
    phase: EventPhase
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
    _orders: Orders = field(repr=False, compare=False)
    _steps: Steps = field(repr=False, compare=False)
    _compute_s: tuple[float, ...] = field(repr=False)  # by work
    _end_s: NDArray[np.float64] = field(repr=False, compare=False)  # by step

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """All that runs, rank by rank in the order it runs."""
        events: list[Event] = []
        orders = zip(*(numbers.tolist() for numbers in self._orders), strict=True)
        in_order = self._steps.in_order()
        works, ends_s = self._steps.works.ravel()[in_order].tolist(), self._end_s.ravel()[in_order].tolist()
        for (rank, phase, stage, microbatch), work, end_s in zip(orders, works, ends_s, strict=True):
            start_s = end_s - self._compute_s[work]
            if phase == OVERLAPPING:  # with the forward before it, as one
                events[-1] = events[-1]._replace(start_s=start_s, end_s=end_s)
            events.append(Event(rank, stage, microbatch, _EVENT_PHASES[PHASES[phase]], start_s, end_s))
        return tuple(events)

    def works_to_end(self, rank: int) -> NDArray[np.intp]:
        """A chain of work, as `costmodel.events` numbers it, each of which waits for the one before, that
        ends with the rank's last: if messages travel beside compute, the longest. First of all stands what
        ends last."""
        num_ranks = len(self.finish_s)
        steps = [self._end_s.size - num_ranks + rank]
        while steps[-1] >= num_ranks:  # nothing runs in the first wave
            steps.append(self._held_up_by[steps[-1]])
        works = self._steps.works.ravel()[steps].astype(np.intp)
        found: NDArray[np.intp] = works[works != self._steps.idle]
        return found

    @cached_property
    def _held_up_by(self) -> list[int]:
        """By step, the one that it waits for longest."""
        works, waits = self._steps
        start_s = self._end_s - np.array(self._compute_s)[works]
        before = np.arange(works.size).reshape(works.shape) - works.shape[1]
        before_s = np.roll(self._end_s, 1, axis=0)  # of the first wave no one asks
        is_busy = before_s >= start_s * (1 - 1e-12)
        held_up_by: list[int] = np.where(is_busy | (waits == 0), before, waits).ravel().tolist()
        return held_up_by


def simulate(
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
) -> Timeline:
    """Runs one training step of a pipeline of `num_stages` ranks with `num_virtual` stages on each.

    `forward_s`, `backward_s` (the whole backward) and `weight_s` (the part of it that computes weight
    gradients; schedules that split backwards need it) have one entry per virtual stage, in the order of the
    model; `orders.rank_stages` says which rank holds which. `send_s` is the time of a message between
    neighbouring stages, one number or one per boundary: it passes beside compute, or with `blocking_sends`
    occupies both ranks, where what a rank sends and what it receives next pass at once (Megatron-LM's
    send_forward_recv_backward). `overlap_saving_s`, one number or one per virtual stage, is how much less a
    stage's backward takes where DualPipeV overlaps it with a forward (`events.overlap_saving_s`).

    Raises CostModelError for an unknown schedule, sizes it does not run, or times that make no sense.
    """
    shape = schedule_name, num_stages, num_microbatches, num_virtual
    steps = ordered_steps(*shape)
    times = work_times(
        schedule_name, num_stages, num_virtual, forward_s, backward_s, send_s, weight_s, overlap_saving_s
    )
    end_s = run_steps(steps, times, blocking_sends)
    finish_s = tuple(end_s[-1].tolist())
    return Timeline(
        step_s=max(finish_s),
        busy_s=tuple(np.array(times.compute_s)[steps.works].sum(axis=0).tolist()),
        finish_s=finish_s,
        peak_in_flight=peak_in_flight(*shape),
        _orders=numbered_orders(*shape),
        _steps=steps,
        _compute_s=tuple(times.compute_s),
        _end_s=end_s,
    )


def closed_form_step_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    forward_s: float,
    backward_s: float,
    num_virtual: int = 1,
    weight_s: float = 0.0,
) -> float:
    """The step of p uniform ranks whose messages take no time, f and b seconds per microbatch and *rank*.

    (m + p - 1)(f + b) for GPipe and 1F1B (arXiv:2104.04473, section 2.2.1); (m + (p - 1) / v)(f + b) for
    Interleaved1F1B, its section 2.2.2, and LoopedBFS; for split backwards, of whose b `weight_s` is the
    weight part, see `closed_forms`. Raises CostModelError for numbers of microbatches without a closed form,
    and as `simulate`.
    """
    check_schedule(schedule_name, num_stages, num_microbatches, num_virtual)
    per_stage = (forward_s / num_virtual, backward_s / num_virtual, weight_s / num_virtual)
    finish_s = uniform_finish_s(schedule_name, num_stages, num_microbatches, num_virtual, *per_stage)
    if finish_s is None:
        needed = {
            "ZBVZeroBubble": f"{2 * num_stages} or more microbatches",
            "LoopedBFS": f"{num_stages} or more microbatches",
        }.get(schedule_name, f"whole rounds of {num_stages} microbatches")
        raise CostModelError(f"the closed form of {schedule_name} needs {needed}, got {num_microbatches}")
    return max(finish_s)
