"""Floors of layouts and ways, and what their stages are bounded by, against prices: none claims too much."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest

from autopar.errors import PinConflictError
from autopar.localize import localize
from autopar.plan import Parallelism, ScheduleName
from autopar.request import training_policy
from autopar.search.local_programs import Program
from autopar.search.other_programs import looks_at
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.solver import solve
from autopar.search.space import VIRTUAL_STAGES, Layout, Scheduled, parallelism
from costmodel import software
from costmodel.orders import OVERLAPPING_SCHEDULES
from hardware_db import Cluster
from tests.autopar.small_models import cluster, tower
from tests.autopar.tiny_models import KINDS, programs_of, tiny

ROUNDING = 1e-8
STATE_BYTES = 16
"""What a trained parameter takes."""

ERAS = ("te-2024", "te-2026", "compiled-2024")
"""Software that hides a little, half and none of what tensor axes move."""

CLOSER = ("layout, quickly", "layout", "schedule", "way", "way with its program")
"""What the search looks at one after the other."""

SEED = 0
MOST_WAYS = 3
"""How many ways of a search are priced."""


class Priced(NamedTuple):
    """A way to run a layout with one of its programs, and the step it comes to."""

    p: Parallelism
    program: Program
    step_s: float


def slowed(machine: Cluster, factor: float) -> Cluster:
    """The same with slower links."""
    levels = (
        replace(level, bandwidth_bytes_per_s=level.bandwidth_bytes_per_s / factor) for level in machine.levels
    )
    return replace(machine, levels=tuple(levels))


def random_planner(rng: random.Random, schedule: ScheduleName, tp: int) -> Planner:
    """A tiny model in two or four stages, on links on which communication may take longer than computing."""
    model = tiny(rng.choice(KINDS), rng.choice([64, 256]), 7, rng.choice([64, 256]))
    memory_bytes = rng.choice([4.0, 1.0, 0.5, 0.4]) * STATE_BYTES * model.graph.num_parameters
    num_devices = rng.choice([4, 8])
    machine = slowed(cluster(num_devices, memory_bytes, rng.choice([2, 8])), rng.choice([1, 10, 100]))
    pins = Pins(schedule=schedule, tp=tp, pp=rng.choice([2, 4]) if tp * 4 <= num_devices else 2)
    era, batch = software(rng.choice(ERAS)), num_devices * rng.choice([1, 2, 4])
    return Planner(model, machine, training_policy(model.graph), era, global_batch=batch, pins=pins)


def computing_least(planner: Planner, p: Parallelism) -> Program:
    """The program of a way that computes least, whatever it communicates."""
    programs = planner.programs
    key = programs.key(p, 0)
    ilp, replica = programs.ilp(key), programs.replica_of(key)
    costs = [1e-3 * seconds for seconds in ilp.model.costs]
    for variable, cost in ilp.op_costs.items():
        costs[variable] += cost.computed_s
    assignment = ilp._assignment(solve(ilp.model.priced(costs)).values)
    local = localize(replica.local, assignment)
    return Program(key, programs.chain(replica.whole, local, key, programs.shallow.repeats), None, {})


def priced(planner: Planner, rng: random.Random) -> Iterator[Priced]:
    """Some ways that fit, each with all its programs, and one that the search does not make."""
    try:
        ways = [*planner.candidates()]
    except PinConflictError:  # fewer microbatches than the schedule asks for
        return
    for p in rng.sample(ways, min(MOST_WAYS, len(ways))):
        others = [computing_least(planner, p)] if p.tp > 1 else []
        for program in (*programs_of(planner, p), *others):
            solved = planner.layer.solve(program, p)
            if solved is not None and solved.evaluated.fits:
                yield Priced(p, program, solved.evaluated.step_s)


def layout_of(p: Parallelism) -> Layout:
    return Layout(p.microbatch_size, p.tp, p.cp, p.ep, p.pp, p.dp, p.num_microbatches)


def claims_s(planner: Planner, way: Priced) -> dict[str, float]:
    """All that is said to be no more than the step."""
    p, program, floors, layer = way.p, way.program, planner.way_floors, planner.layer
    fastest = planner.programs.program(p)  # which closes a way for all others
    found = {
        "layout, quickly": floors.quick_layout_s(layout_of(p)),
        "way": floors.way_s(p),
        "way with the fastest program": floors.way_s(p, fastest),
        "way with its program": floors.way_s(p, program),
    }
    hides = p.schedule in OVERLAPPING_SCHEDULES
    found["layout"] = floors.layout_s(layout_of(p), overlapping=hides)
    scheduled = Scheduled(layout_of(p), p.schedule, p.num_virtual_stages)
    found |= {
        "schedule": floors.scheduled_s(scheduled),
        "schedule with the fastest program": floors.scheduled_s(scheduled, fastest),
        "schedule with its program": floors.scheduled_s(scheduled, program),
        "schedule, closer": floors.busiest_s(scheduled, None),
        "way, closer": floors.close_s(p),
        "stages of its schedule": floors.busiest_s(scheduled, program),
        "stages of the fastest program": floors.stages_s(p, fastest, float("inf")),
    }
    chains = {"program": program}
    if p.tp > 1:
        least = planner.programs.least
        for look in looks_at(p):
            chains[f"any program, {look}"] = least.relaxed(p, trades=look.trades, mixed=look.is_mixed)
    for name, each in chains.items():
        draft = layer.draft(each, p)
        assert draft is not None, f"{name} of {p} fits"
        found |= {f"stages of {name}": layer.floor_s(each, p, float("inf")), f"cuts of {name}": draft.bound_s}
        for time in ("first", "second"):  # with what the first has learnt
            tight = layer.tightened(each, p, draft, float("inf"))
            assert tight.bound_s >= draft.bound_s
            found[f"chains of {name}, {time}"] = tight.bound_s
    return found


def check(planner: Planner, ways: Sequence[Priced]) -> None:
    """No claim is above the price, and a closer look never lowers a floor."""
    assert ways
    for way in ways:
        assert planner.way_floors.may_fit(layout_of(way.p))
        assert planner.way_floors.way_may_fit(way.p)
        claims = claims_s(planner, way)
        for name, seconds in claims.items():
            assert seconds <= way.step_s * (1 + ROUNDING), f"{name}: {way.p}"
        for far, near in pairwise(CLOSER):
            assert claims[far] <= claims[near] * (1 + ROUNDING), f"{far}, then {near}: {way.p}"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("schedule", VIRTUAL_STAGES)
def test_no_floor_claims_more_than_a_way_takes(schedule: ScheduleName, tp: int) -> None:
    """Whatever the schedule hides, and whatever must be computed again."""
    rng = random.Random(SEED)
    planner = random_planner(rng, schedule, tp)
    check(planner, [*priced(planner, rng)])


@pytest.mark.parametrize("schedule", OVERLAPPING_SCHEDULES)
def test_the_fastest_program_does_not_stand_for_one_that_computes_less(schedule: ScheduleName) -> None:
    """Where a schedule hides what that communicates more."""
    model, machine = tower(512, 6, 1024, 256), slowed(cluster(8, per_node=8), 30)
    pins = Pins(schedule=schedule, tp=4, pp=2, microbatch_size=4)
    planner = Planner(model, machine, training_policy(model.graph), global_batch=64, pins=pins)
    p = next(planner.candidates())
    fastest, least = (
        planner.layer.table(program) for program in (planner.programs.program(p), computing_least(planner, p))
    )
    assert least.computed_s < 0.96 * fastest.computed_s
    assert least.microbatch_s > fastest.microbatch_s
    rank = planner.way_floors._rank(p, planner.programs.program(p))
    assert rank.microbatch_s == fastest.microbatch_s
    assert 0.9 * least.computed_s < rank.computed_s <= least.computed_s
    relaxed = planner.layer.table(planner.programs.least.relaxed(p, trades=False))
    assert relaxed.computed_s <= least.computed_s * (1 + ROUNDING)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("era", ERAS)
def test_no_rank_computes_less_than_its_part(era: str, tp: int) -> None:
    """Even where the host is slower than one device, but not than a rank, which waits for others."""
    model, machine = tower(64, 1, 512, 32), cluster(8, per_node=1)
    planner = Planner(model, machine, training_policy(model.graph), software(era), global_batch=64)
    p = parallelism(tp=tp, microbatch_size=8, num_microbatches=8)
    relaxed = planner.programs.least.relaxed(p, trades=False)
    floors = planner.layer.table(relaxed)
    assert floors.computed_s == pytest.approx(floors.microbatch_s)  # nothing of it is a host's or a link's
    device = planner.programs.device(8).chain
    for program in (planner.programs.given(p), *programs_of(planner, p)):
        units = zip(program.chain.units, device.units, relaxed.chain.units, strict=True)
        for unit, whole, floor in units:
            computed_s = (unit.cost.forward_s + unit.cost.backward_s) * (1 + ROUNDING)
            part = whole.part(1 / tp)
            assert 0 < part.forward_s + part.backward_s <= computed_s, unit.first_op
            assert floor.cost.forward_s + floor.cost.backward_s <= unit.cost.total_s * (1 + ROUNDING)
        table = planner.layer.table(program)
        assert planner.floors.computed_s(8, tp, 1) <= table.computed_s * (1 + ROUNDING)
        assert planner.floors.tensor_s(8, tp, 1) <= table.microbatch_s * (1 + ROUNDING)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_what_a_schedule_puts_off_is_on_no_microbatchs_way(schedule: ScheduleName) -> None:
    """On a tensor axis gradients of weights take more than their share of one device's time."""
    model, pins = tiny("mlp", 256, 7, 256), Pins(schedule=schedule, tp=4, pp=2, microbatch_size=16)
    planner = Planner(model, cluster(8, per_node=8), training_policy(model.graph), global_batch=16, pins=pins)
    check(planner, [*priced(planner, random.Random(SEED))])
