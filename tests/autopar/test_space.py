"""The space: what it lists, and that floors hold for all of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from autopar import api
from autopar.errors import PinConflictError
from autopar.records.clusters import cluster_of
from autopar.records.configuration import configuration
from autopar.records.schema import Record, read_records
from autopar.request import training_policy
from autopar.search.candidates import Candidates
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.space import Degrees, divisors, layouts, longest_tensor_axis, shardings, virtual_stages
from costmodel import optimizer_policy
from tests.autopar.small_models import cluster, tower

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published.json"


@cache
def published() -> tuple[Record, ...]:
    """One complete run for every combination of the settings that are tested here."""
    runs = {
        (r.cluster.accelerator, r.cluster.n_devices, r.batch, r.parallelism): r
        for r in read_records(PUBLISHED)
        if r.tier in ("A", "B")
    }
    return tuple(runs.values())


def test_microbatches_have_every_size_that_divides_the_batch_of_a_replica() -> None:
    degrees = Degrees((1, 2), (1,), (1,), num_units=4)
    found = [layout for layout in layouts(cluster(4), 96, degrees, Pins()) if layout.dp == 4]
    assert sorted(layout.microbatch_size for layout in found) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert all(layout.microbatch_size * layout.num_microbatches * layout.dp == 96 for layout in found)


@pytest.mark.parametrize(
    ("pp", "num_blocks", "expected"),
    [
        (8, 96, {2, 3, 4, 6, 12}),  # GPT-3 175B
        (4, 80, {2, 4, 5, 10, 20}),  # Llama 70B
        (16, 126, {2, 4, 8}),  # Llama 405B: embedding and head stand for a block each
        (2, 48, {2, 3, 4, 6, 8, 12, 24}),
    ],
)
def test_virtual_stages_deal_the_blocks_out_evenly(pp: int, num_blocks: int, expected: set[int]) -> None:
    found = virtual_stages("Interleaved1F1B", pp, num_blocks)
    assert expected <= set(found)
    assert list(found) == sorted(found)
    assert 1 not in found
    assert virtual_stages("ZBVZeroBubble", pp, num_blocks) == (2,)


def test_a_tensor_axis_may_leave_the_scale_up_domain_but_not_the_cluster() -> None:
    assert longest_tensor_axis(cluster(4)) == 4
    assert longest_tensor_axis(cluster(64, per_node=4)) == 8


def test_what_was_run_and_published_is_in_the_space() -> None:
    assert len(published()) > 100
    missing = [record.id for record in published() if not listed(record)]
    assert missing == []


def listed(record: Record) -> bool:
    how, machine = configuration(record), cluster_of(record)
    p = how.known
    degrees = Degrees(
        tuple(n for n in divisors(machine.num_devices) if n <= longest_tensor_axis(machine)),
        (p.cp,),
        (p.ep,),
        record.model.layers,
    )
    found = layouts(machine, p.global_batch, degrees, Pins(pp=p.pp))
    sizes = {layout.microbatch_size for layout in found if (layout.tp, layout.dp) == (p.tp, p.dp)}
    stages = {1, *virtual_stages(p.schedule, p.pp, record.model.layers)}
    return p.microbatch_size in sizes and p.num_virtual_stages in stages


def test_floors_hold_for_sizes_that_do_not_divide_each_other() -> None:
    planner = Planner(tower(), cluster(4, 16e9), training_policy(tower().graph), global_batch=24)
    assert {2, 3, 8} <= {layout.microbatch_size for layout in planner.layouts}
    for p in planner.candidates():
        if p.pp == p.cp == 1 and p.zero_stage == 0:
            microbatch_s = planner.layer.table(planner.programs.program(p)).microbatch_s
            assert planner.floors.tensor_s(p.microbatch_size, p.tp, p.ep) <= microbatch_s * (1 + 1e-9), str(p)


@pytest.mark.parametrize("forbid", [{}, {"num_microbatches": {4}, "zero_stage": {2}}])
def test_ways_are_the_same_for_all_microbatches_and_may_fit_each_by_itself(
    forbid: dict[str, set[int]],
) -> None:
    pins = Pins(forbid={name: frozenset(values) for name, values in forbid.items()})
    policy, machine = training_policy(tower().graph), cluster(8, 8.0 * tower().graph.num_parameters)
    planner = Planner(tower(), machine, policy, global_batch=16, pins=pins)
    candidates, fits = Candidates(planner, planner.layouts), set[bool]()
    for scheduled in (each for layout in planner.layouts for each in candidates.schedules(layout)):
        ways = [*shardings(scheduled, planner.cluster, planner.degrees, planner.pins)]
        assert [*candidates.of(scheduled)] == ways
        assert candidates.num_shardings(scheduled) == len(ways)
        fits |= {planner.way_floors.way_may_fit(p) for p in ways}
        assert [*candidates.fitting(scheduled)] == [p for p in ways if planner.way_floors.way_may_fit(p)]
    assert fits == {False, True}


def test_programs_are_all_ways_that_torch_runs_and_no_others() -> None:
    """With the degrees of programs, of which 1F1B has a microbatch for each stage."""
    policy = training_policy(tower().graph)
    whole, programs = (
        Planner(tower(), cluster(8), policy, global_batch=4, whole_space=whole) for whole in (True, False)
    )
    plain = [p for p in whole.candidates() if p.cp == p.ep == 1]
    starved = [p for p in plain if p.schedule == "1F1B" and p.num_microbatches < p.pp]
    assert starved
    expected = [p for p in plain if p not in starved]
    assert list(programs.candidates()) == expected
    assert any(p.num_microbatches < p.pp for p in expected)


def test_a_pin_that_starves_1f1b_is_refused_for_programs_alone() -> None:
    pins = {"pp": 4, "schedule": "1F1B", "microbatch_size": 4}
    with pytest.raises(PinConflictError, match=r"pp=4.*1F1B in a program has no more than microbatches"):
        api.plan(tower(), cluster(4), global_batch=4, pins=pins)
    whole = api.plan(tower(), cluster(4), global_batch=4, pins=pins, space="whole", price_pins=False)
    assert (whole.parallelism.pp, whole.parallelism.num_microbatches) == (4, 1)


@pytest.mark.parametrize("policy", ["adamw-mixed", "adamw-mixed-fp32-gradients"])
def test_programs_with_states_on_the_host_add_up_gradients_as_shards_do(policy: str) -> None:
    """`compile` refuses wide gradients there, so no plan for a program has them."""

    def stages(whole_space: bool) -> set[int]:
        planner = Planner(
            tower(), cluster(2), optimizer_policy(policy), global_batch=4,
            pins=Pins(dp=2, offload="optimizer"), whole_space=whole_space,
        )  # fmt: skip
        return {p.zero_stage for p in planner.candidates()}

    assert stages(whole_space=True) > {0}
    assert (stages(whole_space=False) == {0}) is (policy == "adamw-mixed-fp32-gradients")
