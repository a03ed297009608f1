"""Where to cut a chain of units into the stages of a pipeline that goes through several pools.

A unit takes other times on every pool. Leg q of the pipeline, on one pool, takes units [k_q, k_{q+1}),
between two *seams*, and cuts them into its own number of stages. Stage s with units [i, j) cannot end a
step of m microbatches before

    V = A_i + m B_ij + max(R_i, L_ij)

where A and R are what forward and backward of one microbatch take on the way to the stage and back, messages
between pools included, B is a microbatch on the stage, with what memory makes it compute again, and L what it
does once a step (`autopar.search.stages` has the reasons). Within a leg

    best_1(j) = V_kj        best_s(j) = min over i < j of max(best_{s-1}(i), V_ij)

is exact, as for one pool; the offsets of A and R depend on where the seams are, so seams are gone through one
by one, those first that promise most: with W_q(i, j) the time of units [i, j) on pool q, p_q its stages and
κ_q = 1 - (1 - 1/m)^p_q, no cuts inside the legs do better than

    F_q(i) = min over j of max(W_q(i, j) / κ_q, W_q(i, j) + F_{q+1}(j)).

Schedules that split the backward owe nothing to the way back: there R is 0, and the second term falls away.

The first rank waits for the last gradient, whichever way, and then still has its once-a-step work c to do;
c = L_0j is added to R, at the least j that leaves the other stages no more than the cutoff allows. Under 1F1B
a stage with w microbatches in flight starts its first backward when one microbatch has been at the end, and
has m - w forwards to go: P + (m - 1) B - (w - 1) (forward) + c bounds the step as well, P being one
microbatch through all stages and back. Nor does a leg do better than the mean of m B + L of its stages, where
L counts what no microbatch can hide. A link between pools carries every microbatch, each direction for
itself: with d the seconds of a message a step takes P + (m - 1) d or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodel.orders import SPLIT_BACKWARD_SCHEDULES

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class StageTimes(NamedTuple):
    """Seconds of a stage with units [i, j): with every microbatch, infinite where memory does not suffice; of
    that the forward; and once a step. What lies on and below the diagonal means nothing. `in_flight` are the
    microbatches in flight."""

    microbatch_s: Matrix
    forward_s: Matrix
    once_s: Matrix
    in_flight: int


@dataclass(frozen=True)
class LegTimes:
    """What units take on one pool, and the stages of its leg in each of several ways to run it.

    `forward_s` and `backward_s` have one entry per unit, and for every way `steps_s` has rows of them: no
    stage takes less in a whole step than its units in any of the rows. `ways` has a list of stages for every
    way; `send_s` one entry per unit: what the message takes with which a leg begins there. At most
    `in_flight` microbatches are in flight on any of its stages.
    """

    forward_s: Vector
    backward_s: Vector
    num_stages: int
    steps_s: NDArray[np.float64]
    ways: Sequence[Sequence[StageTimes]]
    send_s: Vector
    in_flight: int

    @cached_property
    def before_s(self) -> tuple[Vector, Vector]:
        """Forward and backward of the units before each."""
        return _before(self.forward_s), _before(self.backward_s)

    @cached_property
    def steps_before_s(self) -> NDArray[np.float64]:
        """Whole steps of the units before each, by way and row."""
        return np.cumsum(np.pad(self.steps_s, ((0, 0), (0, 0), (1, 0))), axis=2)


class RouteCut(NamedTuple):
    """The units with which stages begin, 0 first; the way that each leg is run; and what no cuts undercut."""

    cuts: tuple[int, ...]
    ways: tuple[int, ...]
    bound_s: float


def best_cuts(
    legs: Sequence[LegTimes],
    num_microbatches: int,
    schedule: str = "1F1B",
    cutoff_s: float = np.inf,
) -> RouteCut | None:
    """The cuts and ways whose bound is least: no others are below both that and the cutoff.

    None where nothing fits, or nothing is below the cutoff.
    """
    best: RouteCut | None = None
    for floor_s, seams in seam_floors(legs, num_microbatches, schedule):
        limit_s = cutoff_s if best is None else best.bound_s
        if floor_s >= limit_s:
            break
        found = _between(legs, seams, num_microbatches, schedule, floor_s, limit_s)
        if found is not None:
            best = found
    return best


def seam_floors(
    legs: Sequence[LegTimes], num_microbatches: int, schedule: str = "1F1B"
) -> list[tuple[float, tuple[int, ...]]]:
    """All seams, 0 and the number of units included, with what no cuts between them undercut; least first."""
    num_units = len(legs[0].forward_s)
    if sum(leg.num_stages for leg in legs) > num_units:
        return []
    found = []
    for inner in combinations(range(1, num_units), len(legs) - 1):
        seams = (0, *inner, num_units)
        if all(b - a >= leg.num_stages for leg, (a, b) in zip(legs, pairwise(seams), strict=True)):
            found.append((_floor_s(legs, seams, num_microbatches, schedule), seams))
    return sorted(found)


def _floor_s(
    legs: Sequence[LegTimes], seams: Sequence[int], m: int, schedule: str, first_units: int = 0
) -> float:
    """What no cuts between these seams undercut; with `first_units`, if those are the first stage."""
    splits_backward = schedule in SPLIT_BACKWARD_SCHEDULES
    arrival_s = passed_s = floor_s = after_s = slowest_send_s = 0.0
    for leg, first, last in zip(legs, seams, seams[1:], strict=False):
        num_stages = leg.num_stages
        send_s = float(leg.send_s[first])
        slowest_send_s = max(slowest_send_s, send_s)
        arrival_s += send_s
        passed_s += 2 * send_s
        if first == 0 and first_units:
            arrival_s, back_s = (float(before[first_units]) for before in leg.before_s)
            passed_s = arrival_s + back_s
            first, num_stages = first_units, num_stages - 1
            if not num_stages:
                continue
        forward_s, backward_s = (float(before[last] - before[first]) for before in leg.before_s)
        leg_s = forward_s + backward_s
        steps_s = leg.steps_before_s[:, :, last] - leg.steps_before_s[:, :, first]
        floor_s = max(floor_s, arrival_s + float(steps_s.max(axis=1).min()) / num_stages)
        if not splits_backward:
            floor_s = max(floor_s, passed_s + leg_s / (1 - (1 - 1 / m) ** num_stages))
            after_s = max(after_s, ((m - 1) * leg_s - (leg.in_flight - 1) * forward_s) / num_stages)
        arrival_s += forward_s
        passed_s += leg_s
    path_s = arrival_s if splits_backward else passed_s
    return max(floor_s, path_s + (m - 1) * slowest_send_s, path_s + after_s if schedule == "1F1B" else 0.0)


def _between(
    legs: Sequence[LegTimes], seams: Sequence[int], m: int, schedule: str, floor_s: float, limit_s: float
) -> RouteCut | None:
    """The best between these seams, if it is below the limit."""
    offsets = Offsets()
    first_units = 1
    if schedule not in SPLIT_BACKWARD_SCHEDULES:
        first_units, first_once_s = _first_stage(legs, seams, m, schedule, limit_s)
        offsets = Offsets(
            0.0, first_once_s, first_once_s + _path_s(legs, seams) if schedule == "1F1B" else None
        )
    bound_s = floor_s
    cuts: list[int] = []
    ways = []
    for leg, (first, last) in zip(legs, pairwise(seams), strict=True):
        offsets = offsets.plus(float(leg.send_s[first]), float(leg.send_s[first]))
        least = 1 if first else first_units
        found = [_cut_leg(leg, stages, first, last, least, offsets, m) for stages in leg.ways]
        way = min(range(len(found)), key=lambda number: found[number][0])
        bound_s = max(bound_s, found[way][0])
        if bound_s >= limit_s:
            return None
        cuts += found[way][1]
        ways.append(way)
        offsets = offsets.plus(*(float(before[last] - before[first]) for before in leg.before_s))
    return RouteCut(tuple(cuts), tuple(ways), bound_s)


class Offsets(NamedTuple):
    """What a microbatch takes up to a leg, and back from there with what the first rank still does; None
    where nothing is owed to the way back. `path_s` is all of a microbatch, and that, under 1F1B."""

    arrival_s: float = 0.0
    return_s: float | None = None
    path_s: float | None = None

    def plus(self, forward_s: float, backward_s: float) -> Offsets:
        """After more of the way."""
        return_s = None if self.return_s is None else self.return_s + backward_s
        return Offsets(self.arrival_s + forward_s, return_s, self.path_s)


def _path_s(legs: Sequence[LegTimes], seams: Sequence[int]) -> float:
    """One microbatch through all stages and back."""
    pairs = list(zip(legs, pairwise(seams), strict=True))
    work_s = sum(
        float(before[last] - before[first]) for leg, (first, last) in pairs for before in leg.before_s
    )
    return work_s + 2 * sum(float(leg.send_s[first]) for leg, (first, _) in pairs)


def _first_stage(
    legs: Sequence[LegTimes], seams: Sequence[int], m: int, schedule: str, limit_s: float
) -> tuple[int, float]:
    """The fewest units of the first stage that leave the others below the limit, and the least that it does
    once a step."""
    leg = legs[0]
    most = seams[1] - leg.num_stages + 1
    units = next((n for n in range(1, most) if _floor_s(legs, seams, m, schedule, n) < limit_s), most)
    return units, min(float(stages[0].once_s[0, units]) for stages in leg.ways)


def _cut_leg(
    leg: LegTimes,
    stages: Sequence[StageTimes],
    first: int,
    last: int,
    least: int,
    offsets: Offsets,
    m: int,
) -> tuple[float, list[int]]:
    """The least that the slowest stage of units [first, last) takes, and where the stages then begin, the
    first having `least` units or more."""
    here = slice(first, last + 1)
    arrival_s, return_s = (before[here] - before[first] for before in leg.before_s)
    arrival_s = arrival_s + offsets.arrival_s
    return_s = np.zeros_like(return_s) if offsets.return_s is None else return_s + offsets.return_s
    known: dict[int, Matrix] = {}
    for times in stages:
        if id(times) not in known:
            microbatch_s = times.microbatch_s[here, here]
            latest_s = np.maximum(return_s[:, None], times.once_s[here, here])
            values = arrival_s[:, None] + m * microbatch_s + latest_s
            if offsets.path_s is not None:
                warm_up_s = (times.in_flight - 1) * times.forward_s[here, here]
                finite_s = np.where(np.isfinite(microbatch_s), microbatch_s, 0.0)
                values = np.maximum(values, offsets.path_s + (m - 1) * finite_s - warm_up_s)
            known[id(times)] = np.where(np.tri(len(values), dtype=bool), np.inf, values)
    best = known[id(stages[0])][0].copy()
    best[:least] = np.inf
    came_from = []
    for times in stages[1:]:
        through = np.maximum(best[:, None], known[id(times)])
        came_from.append(through.argmin(axis=0))
        best = through.min(axis=0)
    cuts = [last - first]
    for previous in reversed(came_from):
        cuts.append(int(previous[cuts[-1]]))
    return float(best[-1]), [first, *(first + cut for cut in reversed(cuts[1:]))]


def _before(values: Vector) -> Vector:
    return np.concatenate([[0.0], np.cumsum(values)])


def moves(cuts: tuple[int, ...], num_units: int) -> Iterator[tuple[int, ...]]:
    """The cuts that differ in one unit, which another of two neighbouring stages takes."""
    ends = (*cuts, num_units)
    for index in range(1, len(cuts)):
        for cut in (cuts[index] - 1, cuts[index] + 1):
            if ends[index - 1] < cut < ends[index + 1]:
                yield (*cuts[:index], cut, *cuts[index + 1 :])
