"""Routes: the ways in which a pipeline can go through pools of devices.

A route visits two or more pools, each once, in some order; the part on one pool is a *leg* of as many stages
as divide its devices. Legs have their own tensor and data parallelism; context and expert parallelism are for
those who pin them. A microbatch of the pipeline is G samples, of which each of the dp_q replicas of leg q
takes G / dp_q: microbatches are as uneven as the pools. The schedule is 1F1B: with several stages on a rank,
every microbatch would cross between pools as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import NamedTuple

from autopar.plan import Parallelism, ScheduleName, has_program
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.space import Degrees, Layout, divisors, runs, scale_up_size, ways

SCHEDULE: ScheduleName = "1F1B"


class Leg(NamedTuple):
    """A pool, by its number, and the layout of its part of the pipeline, whose `pp` are the leg's stages."""

    pool: int
    layout: Layout


class Route(NamedTuple):
    """Legs in the order of the pipeline."""

    legs: tuple[Leg, ...]

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


def routes(planners: Sequence[Planner]) -> Iterator[Route]:
    """All routes, in a fixed order; planners share batch and pins. Of the pins, `pp` counts the stages of all
    legs, and every leg keeps to the others; a `mesh`, which is of one cluster, leaves none, nor does
    offloading."""
    global_batch, pins = planners[0].global_batch, planners[0].pins
    fixed = (("schedule", SCHEDULE), ("num_virtual_stages", 1), ("offload", "none"))
    if pins.mesh is not None or not all(value in pins.values(name, (value,)) for name, value in fixed):
        return
    degrees = planners[0].degrees
    for samples in divisors(global_batch):
        legs = [list(_legs(pool, planner, samples)) for pool, planner in enumerate(planners)]
        for number in range(2, len(planners) + 1):
            for order in permutations(range(len(planners)), number):
                for chosen in product(*(legs[pool] for pool in order)):
                    route = Route(chosen)
                    if _suits(route.num_stages, route.num_microbatches, degrees, pins):
                        yield route


def _suits(pp: int, num_microbatches: int, degrees: Degrees, pins: Pins) -> bool:
    """Whether pins leave so many stages, and the schedule runs on them: in torch, where programs are asked
    for."""
    is_left = degrees.fewest_stages <= pp <= degrees.num_units and pp in pins.values("pp", (pp,))
    is_run = runs(SCHEDULE, pp, num_microbatches, 1)
    return is_left and is_run and (has_program(SCHEDULE, pp, num_microbatches) or not degrees.programs_only)


def _legs(pool: int, planner: Planner, samples: int) -> Iterator[Leg]:
    """The legs on one pool whose replicas share microbatches of so many samples."""
    pins, own, cluster = planner.pins, _leg_pins(planner.pins), planner.cluster
    inside = tuple(n for n in planner.degrees.tp if n <= scale_up_size(cluster))
    inner = product(pins.values("tp", inside), pins.values("cp", (1,)), pins.values("ep", (1,)))
    for (tp, cp, ep), pp in product(inner, divisors(cluster.num_devices)):
        dp, remainder = divmod(cluster.num_devices, tp * cp * pp)
        if remainder or samples % dp or dp % ep or dp not in pins.values("dp", (dp,)):
            continue
        layout = Layout(samples // dp, tp, cp, ep, pp, dp, planner.global_batch // samples)
        is_run = pp < planner.num_units and any(True for _ in _ways(planner, layout, own))
        if is_run and planner.pin_space.admits(layout, planner.programs.replica):
            yield Leg(pool, layout)


def leg_ways(planner: Planner, layout: Layout) -> tuple[Parallelism, ...]:
    """The ways to shard a leg over its data axes: over none, the fewest or the most replicas."""
    found = tuple(_ways(planner, layout, _leg_pins(planner.pins)))
    shards = {p.dp_shard for p in found if p.zero_stage}
    usual = {1, min(shards, default=1), max(shards, default=1)}
    return tuple(p for p in found if p.dp_shard in usual)


def _ways(planner: Planner, layout: Layout, pins: Pins) -> Iterator[Parallelism]:
    degrees = planner.degrees._replace(fewest_stages=1, programs_only=False)
    return ways(layout, planner.cluster, degrees, pins)


def _leg_pins(pins: Pins) -> Pins:
    """The pins without those that are about the whole pipeline."""
    forbid = {name: values for name, values in pins.forbid.items() if name not in ("schedule", "pp")}
    return replace(pins, pp=None, schedule=SCHEDULE, num_virtual_stages=None, forbid=forbid)
