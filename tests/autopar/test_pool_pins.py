"""Pins on pipelines through pools: everything that is priced keeps to them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from autopar import api
from autopar.plan import Plan
from autopar.request import training_policy
from autopar.search.pin_stages import named_units
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.pool_legs import Legs
from autopar.search.pool_pin_costs import PoolPinPricer
from autopar.search.pool_prices import PricedRoute
from autopar.search.pools import TOLERANCE, PoolSearch
from tests.autopar.small_models import tower
from tests.autopar.test_pools import two_pools

BATCH = 8
DEPTH = 4


def search_under(pins: Pins, *, whole_space: bool = False) -> PoolSearch:
    capture, pools = tower(width=1024, depth=DEPTH, vocabulary=512), two_pools()
    policy = training_policy(capture.graph)
    planners = [
        Planner(capture, pool, policy, global_batch=BATCH, pins=pins, whole_space=whole_space)
        for pool in pools.pools
    ]
    return PoolSearch(Legs(planners, pools))


def priced_under(pins: Pins) -> list[PricedRoute]:
    """Every route under the pins, priced with the cuts of its bound."""
    search = search_under(pins)
    cuts = [(route, search.cuts.cut(route, 0, float("inf"))) for route in search.routes]
    return [search.prices.solve(route, 0, cut) for route, cut in cuts if cut is not None]


@pytest.mark.parametrize(
    "pins",
    [
        {"zero_stage": 3},
        {"dp_shard": 2},
        {"microbatch_size": 1},
        {"tp": 2, "sequence_parallel": False},
        {"dp": 1, "forbid": {"tp": [1]}},
        {"forbid": {"zero_stage": [0, 1]}},
        {"forbid": {"microbatch_size": [1, 2]}},
    ],
    ids=str,
)
def test_every_leg_keeps_to_the_settings(pins: dict[str, Any]) -> None:
    pinned = Pins.merged(pins)
    priced = priced_under(pinned)
    assert priced
    for leg in (leg for route in priced for leg in route.legs):
        assert pinned.admits(leg.parallelism), str(leg.parallelism)


@pytest.mark.parametrize(
    ("pins", "together", "apart"),
    [
        ({"cut_before": ["layers.1"]}, [], ["layers.1"]),
        ({"cut_before": ["layers.1", "layers.2", "layers.3"]}, [], ["layers.1", "layers.2", "layers.3"]),
        ({"keep_together": ["layers.0 + layers.2"]}, ["layers.0", "layers.1", "layers.2"], []),
        (
            {"cut_before": ["head"], "keep_together": ["layers.1 + layers.3"]},
            ["layers.1", "layers.3"],
            ["head"],
        ),
    ],
)
def test_stages_begin_where_they_must_and_nowhere_else(
    pins: dict[str, Any], together: list[str], apart: list[str]
) -> None:
    priced = priced_under(Pins.merged(pins))
    assert priced
    names = [unit.modules[0] for unit in named_units(tower(width=1024, depth=DEPTH, vocabulary=512).graph)]
    for route in priced:
        stages = [set(names[a:b]) for a, b in pairwise((*route.cuts, len(names)))]
        assert {names[cut] for cut in route.cuts} >= set(apart)
        assert any(set(together) <= stage for stage in stages)


def test_pp_counts_the_stages_of_all_legs() -> None:
    assert {len(route.cuts) for route in priced_under(Pins(pp=3))} == {3}
    forbidden = Pins(forbid={"pp": {2, 4}})
    assert {len(route.cuts) for route in priced_under(forbidden)} == {3}


def test_fewer_microbatches_than_stages_are_for_the_whole_space() -> None:
    def fewest(search: PoolSearch) -> int:
        return min(route.num_microbatches - route.num_stages for route in search.routes)

    assert fewest(search_under(Pins())) == 0
    assert fewest(search_under(Pins(), whole_space=True)) < 0


@pytest.mark.parametrize(
    "pins",
    [
        {"schedule": "GPipe"},
        {"forbid": {"schedule": ["1F1B"]}},
        {"num_virtual_stages": 2},
        {"offload": "optimizer"},
        {"mesh": (2,)},
    ],
    ids=str,
)
def test_what_no_pipeline_through_pools_can_do_leaves_none(pins: dict[str, Any]) -> None:
    assert not search_under(Pins.merged(pins)).routes


def planned(pins: Pins, **settings: Any) -> Plan:
    model = tower(width=2048, depth=12, vocabulary=512)
    return api.plan(model, two_pools(), global_batch=64, pins=pins, **settings)


@pytest.mark.parametrize(
    ("pins", "num_pools"),
    [
        ({"pp": 3, "tp": 1, "forbid": {"zero_stage": {2}}}, 2),
        ({"cut_before": ("layers.2",), "recompute": "full", "microbatch_size": 1}, 2),
        ({"pp": 1, "tp": 2}, 0),
        ({"microbatch_size": 1, "tp": 2, "placements": {"layers.3.up": {"tp": "Shard(1)"}}}, 2),
    ],
    ids=str,
)
def test_what_a_pin_costs_is_what_a_search_without_it_finds(pins: dict[str, Any], num_pools: int) -> None:
    pinned = Pins(**pins)
    plan = planned(pinned)
    assert len(plan.pools) == num_pools
    assert [each.pin for each in plan.pin_costs] == [text for text, _ in pinned.parts()]
    for each, (_, without) in zip(plan.pin_costs, pinned.parts(), strict=True):
        found_s = planned(without, price_pins=False).prediction.step_s
        assert each.step_s + each.cost_s == pytest.approx(plan.prediction.step_s)
        assert each.step_s == pytest.approx(found_s, rel=TOLERANCE), each.pin
    assert max(each.cost_s for each in plan.pin_costs) > 0
    assert "what each pin costs" in plan.explain()
    assert not planned(pinned, price_pins=False).pin_costs


def test_pins_whose_price_is_too_much_work_are_named() -> None:
    search = search_under(Pins(tp=1, microbatch_size=1))
    result = search.run()
    assert PoolPinPricer(search, result, work=3).costs() == ((), ("microbatch_size=1", "tp=1"))
    costs, unpriced = PoolPinPricer(search, result).costs()
    assert ([each.pin for each in costs], unpriced) == (["microbatch_size=1", "tp=1"], ())


def test_a_search_that_was_stopped_does_not_price_pins() -> None:
    plan = planned(Pins(tp=1), time_limit_s=0.0)
    assert not plan.pin_costs
    assert plan.warnings[-1] == "there was no time to find out what these pins cost: tp=1"
