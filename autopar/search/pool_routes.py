"""Routes: the ways in which a pipeline can go through pools of devices.

A route visits some of the pools, each once, in some order; the part on one pool is a *leg* of as many stages
as divide its devices. Legs have their own tensor and data parallelism; context
and expert parallelism are for those who pin them. A microbatch of the pipeline
is G samples, of which each of the dp_q replicas of leg q takes G / dp_q: microbatches are as uneven as the
pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import NamedTuple

from autopar.plan import ScheduleName
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.space import Layout, divisors, runs

SCHEDULES: tuple[ScheduleName, ...] = ("1F1B", "InterleavedZeroBubble", "GPipe")
"""Schedules with one stage on a rank: with more, every microbatch would cross between pools as often. The
first is searched, the others are for those who pin them."""


class Leg(NamedTuple):
    """A pool, by its number, and the layout of its part of the pipeline, whose `pp` are the leg's stages."""

    pool: int
    layout: Layout


class Route(NamedTuple):
    """Legs in the order of the pipeline."""

    legs: tuple[Leg, ...]
    schedule: ScheduleName

    @property
    def num_stages(self) -> int:
        """Stages of all legs."""
        return sum(leg.layout.pp for leg in self.legs)

    def first_stage(self, number: int) -> int:
        """The stage with which leg `number` begins."""
        return sum(leg.layout.pp for leg in self.legs[:number])

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step, the same for all legs."""
        return self.legs[0].layout.num_microbatches


def routes(planners: Sequence[Planner], global_batch: int, pins: Pins) -> Iterator[Route]:
    """All routes, in a fixed order. Of the pins, `pp` counts the stages of all legs, and every leg keeps to
    the others."""
    num_units = planners[0].num_units
    for samples in divisors(global_batch):
        legs = [list(_legs(pool, planner, samples, global_batch)) for pool, planner in enumerate(planners)]
        for number in range(1, len(planners) + 1):
            for order in permutations(range(len(planners)), number):
                for chosen in product(*(legs[pool] for pool in order)):
                    yield from _scheduled(chosen, num_units, pins)


def _scheduled(legs: tuple[Leg, ...], num_units: int, pins: Pins) -> Iterator[Route]:
    num_stages = sum(leg.layout.pp for leg in legs)
    if num_stages > num_units or num_stages not in pins.values("pp", (num_stages,)):
        return
    for schedule in pins.values("schedule", SCHEDULES[:1]) if num_stages > 1 else SCHEDULES[:1]:
        if schedule in SCHEDULES and runs(schedule, num_stages, legs[0].layout.num_microbatches, 1):
            yield Route(legs, schedule)


def _legs(pool: int, planner: Planner, samples: int, global_batch: int) -> Iterator[Leg]:
    """The legs on one pool whose replicas share microbatches of so many samples."""
    pins, degrees = planner.pins, planner.degrees
    num_devices = planner.cluster.num_devices
    inner = product(pins.values("tp", degrees.tp), pins.values("cp", (1,)), pins.values("ep", (1,)))
    for (tp, cp, ep), pp in product(inner, divisors(num_devices)):
        dp, remainder = divmod(num_devices, tp * cp * pp)
        if remainder or samples % dp or pp > degrees.num_units or dp not in pins.values("dp", (dp,)):
            continue
        size = samples // dp
        if size not in pins.values("microbatch_size", (size,)) or size & (size - 1):
            continue
        if dp % ep == 0:
            yield Leg(pool, Layout(size, tp, cp, ep, pp, dp, global_batch // samples))
