"""What must be computed again, where it costs least: the linear program over chains against a grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from autopar.plan import ScheduleName
from autopar.request import training_policy
from autopar.search.again_bound import AgainBound, Path
from autopar.search.even_stages import moments
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.runs import Array
from costmodel import simulate
from tests.autopar.small_models import cluster
from tests.autopar.tiny_models import tiny

SCHEDULES: tuple[ScheduleName, ...] = (
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)

NUM_POINTS = 9
"""Of each stage in the grid, from nothing computed again to all that can be."""

SHORT = 0.4
"""What ranks keep too much, as a part of what they can free."""

ROUNDING = 1e-6


def bound_of(schedule: ScheduleName, paths: list[Path]) -> AgainBound:
    """That of a tiny pipeline with two stages on each of two ranks."""
    model = tiny("mlp", 64, 7, 64)
    pins = Pins(schedule=schedule, tp=1, pp=2, dp=1, num_virtual_stages=2, microbatch_size=4, zero_stage=0)
    planner = Planner(model, cluster(2), training_policy(model.graph), global_batch=24, pins=pins)
    p, layer = next(iter(planner.candidates())), planner.layer
    program = planner.programs.program(p)
    draft = layer.draft(program, p)
    assert draft is not None
    even = layer.even(program)
    evaluated = layer.evaluator.evaluate(program.chain, p, draft.cuts, even.table.base)
    sends_s = (0.0,) * (len(draft.cuts) - 1)
    bound = AgainBound(even, evaluated, np.zeros(p.pp), sends_s, layer.evaluator.overlap, paths)
    most = freed_bytes(bound, np.array(even.most_relief_s(draft.cuts)))
    return AgainBound(even, evaluated, SHORT * most, sends_s, layer.evaluator.overlap, paths)


def freed_bytes(bound: AgainBound, again_s: Array) -> Array:
    """By how much less ranks keep at most for so much computed again in each stage: the cheapest first."""
    kept, segments = bound.even.kept_bytes(bound.p, bound.cuts), bound.even.table.sums(bound.cuts).segments
    left = kept.copy()
    for rank, stages in enumerate(bound.mine):
        for place, stage in enumerate(stages):
            flights, left_s = moments(bound.p)[rank, :, place], again_s[stage]
            for rate, size, numbers in segments:
                taken_s = min(left_s, rate * size * numbers[stage])
                left[rank] -= flights * (taken_s / rate if rate else size * numbers[stage])
                left_s -= taken_s
    found: Array = kept.max(axis=1) - left.max(axis=1)
    return found


def grid(bound: AgainBound) -> Iterator[Array]:
    """All that frees enough."""
    most_s = bound.even.most_relief_s(bound.cuts)
    for point in itertools.product(*(np.linspace(0, most, NUM_POINTS) for most in most_s)):
        again_s = np.array(point)
        if (freed_bytes(bound, again_s) >= bound.excess_bytes * (1 - ROUNDING)).all():
            yield again_s


def step_s(bound: AgainBound, again_s: Array) -> float:
    """The simulated step with so much computed again, were nothing communicated."""
    timeline = simulate(
        bound.p.schedule, bound.p.pp, bound.p.num_microbatches, [each.forward_s for each in bound.passes],
        [each.backward_s + more_s for each, more_s in zip(bound.passes, again_s.tolist(), strict=True)],
        bound.send_s, bound.p.num_virtual_stages, weight_s=[stage.weight_s for stage in bound.stages],
    )  # fmt: skip
    return max(end_s + once_s for end_s, once_s in zip(timeline.finish_s, bound.once_s, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_chains_bound_every_place(schedule: ScheduleName) -> None:
    bound = bound_of(schedule, [])
    found_s = bound.tightened(0.0, float("inf"))
    least_s = min(step_s(bound, again_s) for again_s in grid(bound))
    assert bound.bound_s() <= found_s * (1 + ROUNDING)
    assert 0.97 * least_s <= found_s <= least_s * (1 + ROUNDING)


@pytest.mark.parametrize("schedule", SCHEDULES[:-1])
def test_what_was_learnt_is_enough_the_second_time(schedule: ScheduleName) -> None:
    paths: list[Path] = []
    first_s = bound_of(schedule, paths).tightened(0.0, float("inf"))
    known = [*paths]
    assert known
    assert len(set(known)) == len(known)
    assert bound_of(schedule, paths).tightened(0.0, float("inf"), num_rounds=1) >= first_s * (1 - 1e-3)
