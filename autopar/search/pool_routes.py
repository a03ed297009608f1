"""Routes: the ways in which a pipeline can go through pools of devices.

A route visits two or more pools, each once, in some order; the part on one pool is a *leg* of as many stages
as divide its devices. Legs have their own tensor and data parallelism; context and expert parallelism are for
those who pin them. A microbatch of the pipeline is G samples, of which each of the dp_q replicas of leg q
takes G / dp_q: microbatches are as uneven as the pools. The schedule is 1F1B: with several stages on a rank,
every microbatch would cross between pools as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import NamedTuple

from autopar.plan import ScheduleName
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.space import Layout, divisors, runs, scale_up_size

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


def routes(planners: Sequence[Planner], global_batch: int, pins: Pins) -> Iterator[Route]:
    """All routes, in a fixed order. Of the pins, `pp` counts the stages of all legs, and every leg keeps to
    the others; a `mesh`, which is of one cluster, leaves none, nor does offloading."""
    is_possible = SCHEDULE in pins.values("schedule", (SCHEDULE,)) and 1 in pins.values(
        "num_virtual_stages", (1,)
    )
    if not is_possible or pins.mesh is not None or "none" not in pins.values("offload", ("none",)):
        return
    fewest, most = planners[0].pin_space.num_stages(planners[0].num_units)
    for samples in divisors(global_batch):
        legs = [list(_legs(pool, planner, samples, global_batch)) for pool, planner in enumerate(planners)]
        for number in range(2, len(planners) + 1):
            for order in permutations(range(len(planners)), number):
                for chosen in product(*(legs[pool] for pool in order)):
                    route = Route(chosen)
                    pp = route.num_stages
                    suits = fewest <= pp <= most and pp in pins.values("pp", (pp,))
                    if suits and runs(SCHEDULE, pp, route.num_microbatches, 1):
                        yield route


def _legs(pool: int, planner: Planner, samples: int, global_batch: int) -> Iterator[Leg]:
    """The legs on one pool whose replicas share microbatches of so many samples."""
    pins, cluster = planner.pins, planner.cluster
    inside = tuple(n for n in planner.degrees.tp if n <= scale_up_size(cluster))
    inner = product(pins.values("tp", inside), pins.values("cp", (1,)), pins.values("ep", (1,)))
    for (tp, cp, ep), pp in product(inner, divisors(cluster.num_devices)):
        dp, remainder = divmod(cluster.num_devices, tp * cp * pp)
        if remainder or samples % dp or dp % ep or dp not in pins.values("dp", (dp,)):
            continue
        layout = Layout(samples // dp, tp, cp, ep, pp, dp, global_batch // samples)
        if pp >= planner.num_units or not pins.values("microbatch_size", (layout.microbatch_size,)):
            continue
        if planner.pin_space.admits(layout, planner.programs.replica):
            yield Leg(pool, layout)
