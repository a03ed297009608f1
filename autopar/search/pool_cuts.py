"""Where to cut a chain of units into the stages of a 1F1B pipeline that goes through several pools.

A unit takes other times on every pool. Leg q of the pipeline, on one pool, takes the units between two
*seams* and cuts them into its own p_q stages. P is all of a microbatch, messages between pools included, A_i
its forward up to unit i, and B_ij what a stage with units [i, j) takes by the order of its schedule
(`autopar.search.stage_times`). With R_i the backward from there on and what the first rank has to do once a
step, O_ij what the stage itself has to do then,

    V_ij = A_i + B_ij + max(R_i, O_ij)

and the cuts whose largest V is least (`autopar.search.stages.cheapest`) are exact for stages between seams. P
depends on the seams alone, so they are gone through one by one, those first that promise most. Where leg q
takes W_q of a microbatch, with n stages and S_{q+1} seconds of it after it, one round trip after the first
makes

    P + S_{q+1} + (m - 1 - n) W_q / p_q      and      A_q + W_q / (1 - (1 - 1/m)^p_q) + R_q

bounds whatever the cuts inside, and a link that takes d for a message P + (m - 1) d. Of the first leg, seams
change P alone, and the least P of all bounds V; of the last, they do not change V - P where O is left out.
So two dynamic programs, for all beginnings of the chain and for all its ends, bound what these legs make of
every seam (`_end_floors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.search.runs import Array
from autopar.search.stage_times import StageTimes, busy_s
from autopar.search.stages import cheapest, largest_after, largest_before

Seams = NDArray[np.int_]


@dataclass(frozen=True)
class LegTimes:
    """What forward and backward of all units before each take on one pool, and for each unit the message with
    which a leg begins there.

    `ways` are the ways in which the leg can be run, each with its `num_stages` stages, on which `in_flight`
    microbatches are in flight; what is no run of units takes forever there.
    """

    before_s: tuple[Array, Array]
    send_s: Array
    num_stages: int
    in_flight: tuple[int, ...] = ()
    ways: Sequence[Sequence[StageTimes]] = ()

    @classmethod
    def of(cls, forward_s: Array, backward_s: Array, num_stages: int) -> LegTimes:
        """The leg with these times of units, without messages."""
        before_s = (np.append(0.0, np.cumsum(forward_s)), np.append(0.0, np.cumsum(backward_s)))
        return cls(before_s, np.zeros_like(forward_s), num_stages)


class RouteCut(NamedTuple):
    """The units with which stages begin, 0 first; the way that each leg is run; and what no cuts undercut."""

    cuts: tuple[int, ...]
    ways: tuple[int, ...]
    bound_s: float


class Offsets(NamedTuple):
    """One microbatch: up to a leg, back from there to the first rank, and all of it; and what the first rank
    does once a step."""

    arrival_s: float
    return_s: float
    path_s: float
    first_once_s: float

    def plus(self, forward_s: float, backward_s: float) -> Offsets:
        """After more of the way."""
        arrival_s, return_s = self.arrival_s + forward_s, self.return_s + backward_s
        return self._replace(arrival_s=arrival_s, return_s=return_s)


def best_cuts(legs: Sequence[LegTimes], num_microbatches: int, cutoff_s: float = np.inf) -> RouteCut | None:
    """The cuts and ways whose bound is least: no others are below both that and the cutoff.

    None where nothing fits, or nothing is below the cutoff.
    """
    best: RouteCut | None = None
    floors_s, seams = seam_floors(legs, num_microbatches)
    if not len(seams):
        return None
    floors_s = np.maximum(floors_s, _end_floors(legs, seams, num_microbatches))
    for number in np.argsort(floors_s, kind="stable").tolist():
        limit_s = cutoff_s if best is None else best.bound_s
        if floors_s[number] >= limit_s:
            break
        found = _between(legs, tuple(seams[number].tolist()), num_microbatches, limit_s)
        if found is not None:
            best = found._replace(bound_s=max(found.bound_s, float(floors_s[number])))
    return best


def seam_floors(legs: Sequence[LegTimes], num_microbatches: int) -> tuple[Array, Seams]:
    """What no cuts between seams undercut, and the seams, 0 and the number of units included: a row each."""
    m = num_microbatches
    seams = _all_seams(len(legs[0].send_s), tuple(leg.num_stages for leg in legs))
    sends_s = [leg.send_s[seams[:, q]] for q, leg in enumerate(legs)]
    parts_s = [
        [before[seams[:, q + 1]] - before[seams[:, q]] for before in leg.before_s]
        for q, leg in enumerate(legs)
    ]
    path_s = sum(forward_s + backward_s for forward_s, backward_s in parts_s) + 2 * sum(sends_s)
    floors_s = path_s + (m - 1) * np.max(sends_s, axis=0)
    after_s, num_after = np.zeros(len(seams)), 0
    for leg, (forward_s, backward_s), send_s in reversed(list(zip(legs, parts_s, sends_s, strict=True))):
        p, work_s = leg.num_stages, forward_s + backward_s
        most = min(num_after + p, m)
        alone_s = work_s / (1 - (1 - 1 / m) ** p)
        floors_s = np.maximum(floors_s, path_s - after_s - work_s + alone_s)
        floors_s = np.maximum(floors_s, path_s + ((m - 1) * work_s - (most - 1) * forward_s) / p)
        if most < m:
            floors_s = np.maximum(floors_s, path_s + after_s + (m - 1 - num_after) / p * work_s)
        after_s, num_after = after_s + work_s + 2 * send_s, num_after + p
    return floors_s, seams


@lru_cache(maxsize=256)
def _all_seams(num_units: int, num_stages: tuple[int, ...]) -> Seams:
    """All seams that leave every leg a unit for each of its stages."""
    inner = combinations(range(1, num_units), len(num_stages) - 1)
    found = [(0, *each, num_units) for each in inner]
    possible = [
        seams
        for seams in found
        if all(b - a >= least for least, (a, b) in zip(num_stages, pairwise(seams), strict=True))
    ]
    return np.array(possible, dtype=int).reshape(-1, len(num_stages) + 1)


def _end_floors(legs: Sequence[LegTimes], seams: Seams, m: int) -> Array:
    """What no cuts of the first leg, and none of the last, undercut between seams."""
    path_s = _path_s(legs, seams.T)
    first_s = [
        largest_before([span.values_s() for span in stages])
        for stages in _all_spans(legs[0], float(path_s.min()), m)
    ]
    whole_s = float(sum(before[-1] for before in legs[-1].before_s))
    last_s = [
        largest_after([span.busy_s + span.return_s for span in stages])
        for stages in _all_spans(legs[-1], whole_s, m)
    ]
    floors_s: Array = np.maximum(
        np.min(first_s, axis=0)[seams[:, 1]], path_s - whole_s + np.min(last_s, axis=0)[seams[:, -2]]
    )
    return floors_s


def _all_spans(leg: LegTimes, path_s: float, m: int) -> list[list[_Span]]:
    """The runs of all units as stages in each way, were the leg the first and a microbatch's path so long."""
    offsets = Offsets(0.0, 0.0, path_s, 0.0)
    return [_spans(leg, stages, 0, len(leg.send_s), offsets, m) for stages in leg.ways]


def _between(legs: Sequence[LegTimes], seams: Sequence[int], m: int, limit_s: float) -> RouteCut | None:
    """The best between these seams, if it is below the limit."""
    offsets = Offsets(0.0, 0.0, float(_path_s(legs, np.array(seams))), 0.0)
    cuts: list[int] = []
    ways = []
    bound_s = 0.0
    for leg, (first, last) in zip(legs, pairwise(seams), strict=True):
        offsets = offsets.plus(float(leg.send_s[first]), float(leg.send_s[first]))
        spans = [_spans(leg, stages, first, last, offsets, m) for stages in leg.ways]
        if not first:
            once_s = min(_first_once_s(stages, limit_s) for stages in spans)
            if once_s == np.inf:
                return None
            offsets = offsets._replace(first_once_s=once_s)
        tried = (cheapest([span.values_s(offsets.first_once_s) for span in stages]) for stages in spans)
        found = {number: cut for number, cut in enumerate(tried) if cut is not None}
        way = min(found, key=lambda number: found[number].bound_s, default=None)
        if way is None or found[way].bound_s >= limit_s:
            return None
        bound_s = max(bound_s, found[way].bound_s)
        cuts += [first + cut for cut in found[way].cuts]
        ways.append(way)
        offsets = offsets.plus(*(float(before[last] - before[first]) for before in leg.before_s))
    return RouteCut(tuple(cuts), tuple(ways), bound_s)


def _path_s(legs: Sequence[LegTimes], seams: Seams) -> Array:
    """One microbatch through all stages and back; several choices of seams are columns."""
    pairs = zip(legs, pairwise(seams), strict=True)
    path_s: Array = sum(
        2 * leg.send_s[first] + sum(before[last] - before[first] for before in leg.before_s)
        for leg, (first, last) in pairs
    )
    return path_s


class _Span(NamedTuple):
    """V of the runs of units between two seams as one of a leg's stages, in its parts."""

    busy_s: Array
    return_s: Array
    once_s: Array

    def values_s(self, first_once_s: float = 0.0) -> Array:
        """V where the first rank has so much to do once a step."""
        values_s: Array = self.busy_s + np.maximum(self.return_s + first_once_s, self.once_s)
        return values_s


def _spans(
    leg: LegTimes, stages: Sequence[StageTimes], first: int, last: int, offsets: Offsets, m: int
) -> list[_Span]:
    """Those of the runs of units [first, last), for each stage."""
    here = slice(first, last + 1)
    forward_s, backward_s = (before[here] - before[first] for before in leg.before_s)
    arrival_s, return_s = offsets.arrival_s + forward_s, offsets.return_s + backward_s
    after_s = offsets.path_s - arrival_s - return_s
    known: dict[tuple[int, int], _Span] = {}
    keys = [(id(times), flight) for times, flight in zip(stages, leg.in_flight, strict=True)]
    for key, times in zip(keys, stages, strict=True):
        if key not in known:
            own = StageTimes(*(seconds[here, here] for seconds in times))
            taken_s = arrival_s[:, None] + busy_s(own, after_s, m, key[1])
            known[key] = _Span(taken_s, return_s[:, None], own.once_s)
    return [known[key] for key in keys]


def _first_once_s(spans: Sequence[_Span], limit_s: float) -> float:
    """The least that the first stage does once a step if the others stay below the limit; infinite where they
    cannot."""
    once_s = spans[0].once_s[0]
    rest_s = np.where(np.arange(len(once_s)) < len(once_s) - 1, np.inf, 0.0)
    for span in reversed(spans[1:]):
        rest_s = np.maximum(span.values_s(), rest_s).min(axis=1)
    return float(np.min(once_s[1:], initial=np.inf, where=rest_s[1:] < limit_s))
