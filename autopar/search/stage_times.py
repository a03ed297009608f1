"""What pipeline stages take, and the least that a stage's place in the order of 1F1B makes of it.

Take a stage, or a matrix of stages with units [i, j). Before it one microbatch takes A in the forward and R
in the backward, on it T with F of it forward, after it to the end of the pipeline and back U; so S = T + U is
a round trip, and A + S + R is all of a microbatch. With w of m microbatches in flight the stage's order is

    w forwards,  m - w times (backward, forward),  w backwards

and its first backward ends at A + S or later. What is left then are m - 1 backwards and m - w forwards; but a
forward can wait for the backward w microbatches before it, and the last forward is followed by its whole way
to the end and back. With k such round trips, no two of which share a microbatch, the last backward ends at

    A + max( m T,   S + (m - 1) T - (w - 1) F,   (k + 1) S + (m - 1 - k w) T   for 1 <= k <= (m - 1) / w )

or later; the last term is linear in k, so that its ends suffice. In GPipe all are in flight, and the same
holds for w = m. To that comes the larger of R and of what the stage has to do once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.search.runs import Array
from costmodel import Overlap


class StageTimes(NamedTuple):
    """Seconds of stages: with every microbatch, infinite where memory does not suffice; of that the forward;
    and once a step."""

    microbatch_s: Array
    forward_s: Array
    once_s: Array


def stage_times(
    forward_s: Array, backward_s: Array, moved_s: tuple[Array, ...], num_units: Array, overlap: Overlap
) -> StageTimes:
    """What stages take that compute so long for a microbatch, as `costmodel.step` counts it.

    `moved_s` are the gathers of each forward and of each backward, the synchronisation and the optimizer once
    a step, in `num_units` sharding units.
    """
    gather_s, back_s, sync_s, optimizer_s = moved_s
    possible = np.isfinite(backward_s)
    computed_s = np.where(possible, backward_s, 0.0)
    forward_gather_s = _exposed(gather_s, overlap.parameter_gather * forward_s, num_units)
    back_gather_s = _exposed(back_s, overlap.parameter_gather * computed_s, num_units)
    free_s = overlap.gradient_sync * computed_s - (back_s - back_gather_s)
    exposed_s = _exposed(sync_s, np.maximum(0.0, free_s), num_units)
    forward_s = forward_s + _costly(gather_s, forward_gather_s, overlap)
    microbatch_s = forward_s + computed_s + _costly(back_s, back_gather_s, overlap)
    return StageTimes(
        np.where(possible, microbatch_s, np.inf), forward_s, _costly(sync_s, exposed_s, overlap) + optimizer_s
    )


def busy_s(times: StageTimes, after_s: Array, num_microbatches: int, in_flight: int) -> Array:
    """From a stage's first forward to the end of its last backward, at least; `after_s` is U."""
    m, w = num_microbatches, in_flight
    possible = np.isfinite(times.microbatch_s)
    microbatch_s = np.where(possible, times.microbatch_s, 0.0)
    round_trip_s = microbatch_s + after_s
    least_s = round_trip_s + (m - 1) * microbatch_s - (w - 1) * times.forward_s
    least_s = np.maximum(least_s, m * microbatch_s)
    for k in {1, (m - 1) // w} if m > w else ():
        least_s = np.maximum(least_s, (k + 1) * round_trip_s + (m - 1 - k * w) * microbatch_s)
    found: Array = np.where(possible, least_s, np.inf)
    return found


def _exposed(communication_s: Array, hiding_s: Array, num_units: Array) -> Array:
    found: Array = np.maximum(communication_s - hiding_s, communication_s / num_units)
    return found


def _costly(communication_s: Array, exposed_s: Array, overlap: Overlap) -> Array:
    return exposed_s + overlap.contention * (communication_s - exposed_s)
