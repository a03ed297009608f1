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
from itertools import accumulate
from typing import Literal, NamedTuple

from costmodel.closed_forms import uniform_finish_s
from costmodel.errors import CostModelError
from costmodel.events import Step, ordered_steps, run_steps, work_times
from costmodel.orders import check_schedule, peak_in_flight, rank_stages
from costmodel.phases import Op, Phase

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
    _steps: tuple[Step, ...] = field(repr=False)
    _ops: tuple[Op, ...] = field(repr=False)
    _end_s: tuple[float, ...] = field(repr=False)
    _compute_s: tuple[float, ...] = field(repr=False)  # by work

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """All that runs, rank by rank in the order it runs."""
        by_rank: list[list[Event]] = [[] for _ in self.finish_s]
        for (rank, work, _), (phase, stage, microbatch), end_s in zip(
            self._steps, self._ops, self._end_s, strict=True
        ):
            events = by_rank[rank]
            start_s = end_s - self._compute_s[work]
            if phase == "O":  # with the forward before it, as one
                events[-1] = events[-1]._replace(start_s=start_s, end_s=end_s)
            events.append(Event(rank, stage, microbatch, _EVENT_PHASES[phase], start_s, end_s))
        return tuple(event for events in by_rank for event in events)

    def path_to_end(self, rank: int) -> tuple[Op, ...]:
        """A chain of work, each of which waits for the one before, that ends with the rank's last: if
        messages travel beside compute, the longest. First of all stands what ends last."""
        previous, last = self._order
        path = []
        index = last[rank]
        while index >= 0:
            path.append(self._ops[index])
            _, work, wait = self._steps[index]
            start_s, before = self._end_s[index] - self._compute_s[work], previous[index]
            is_busy = before >= 0 and self._end_s[before] >= start_s * (1 - 1e-12)
            index = before if is_busy or wait < 0 else wait
        return tuple(path)

    @cached_property
    def _order(self) -> tuple[list[int], list[int]]:
        """The step before each on its rank, -1 for the first, and the last of every rank."""
        previous, last = [], [-1] * len(self.finish_s)
        for index, (rank, _, _) in enumerate(self._steps):
            previous.append(last[rank])
            last[rank] = index
        return previous, last


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
    steps, ops = ordered_steps(schedule_name, num_stages, num_microbatches, num_virtual)
    times = work_times(
        schedule_name, num_stages, num_virtual, forward_s, backward_s, send_s, weight_s, overlap_saving_s
    )
    end_s, finish_s = run_steps(steps, times, num_stages, blocking_sends)
    busy_s = [0.0] * num_stages
    for rank, work, _ in steps:
        busy_s[rank] += times.compute_s[work]
    return Timeline(
        step_s=max(finish_s),
        busy_s=tuple(busy_s),
        finish_s=finish_s,
        peak_in_flight=peak_in_flight(schedule_name, num_stages, num_microbatches, num_virtual),
        _steps=steps,
        _ops=ops,
        _end_s=tuple(end_s),
        _compute_s=tuple(times.compute_s),
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


def pipeline_lower_bound_s(
    num_stages: int,
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float | Sequence[float] = 0.0,
    num_virtual: int = 1,
    *,
    schedule_name: str = "Interleaved1F1B",
    weight_s: Sequence[float] | None = None,
) -> float:
    """No schedule is faster that places stages as `schedule_name` does, whatever its order and memory.

    A microbatch takes its whole way; and rank r can start no earlier than a forward reaches it, is then busy
    with every microbatch, and its last backward must still travel back to the first stage. Where weight
    gradients are apart (`weight_s`), nothing need travel after a rank's last work. Arguments as `simulate`,
    whose overlap savings are not considered.
    """
    times = work_times(schedule_name, num_stages, num_virtual, forward_s, backward_s, send_s, weight_s)
    num_total = num_stages * num_virtual
    sends_s = times.send_s[:num_total]
    inputs_s = times.compute_s[2 * num_total : 3 * num_total]
    one_microbatch_s = sum(forward_s) + sum(inputs_s) + 2 * sum(sends_s)
    arrival_s = [0.0, *accumulate(map(sum, zip(forward_s, sends_s, strict=True)))]
    return_s = [0.0] * num_stages
    if weight_s is None:
        return_s = [0.0, *accumulate(map(sum, zip(backward_s, sends_s, strict=True)))]
    bounds_s = [one_microbatch_s]
    for rank in range(num_stages):
        stages = rank_stages(schedule_name, rank, num_stages, num_virtual)
        busy_s = sum(forward_s[stage] + backward_s[stage] for stage in stages)
        bounds_s.append(arrival_s[rank] + num_microbatches * busy_s + return_s[rank])
    return max(bounds_s)
