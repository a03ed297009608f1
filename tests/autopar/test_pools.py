"""Pipelines through pools of different devices, against trying every cut, every way and every assignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from math import inf
from typing import Any

import numpy as np
import pytest

from autopar import api
from autopar.compiler import compile
from autopar.errors import (
    AutoparError,
    InfeasibleError,
    PinConflictError,
    RewriteError,
    SearchTimeoutError,
)
from autopar.launch.spec import job_of
from autopar.plan import Plan
from autopar.report.view import view
from autopar.request import training_policy
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.pool_cuts import LegTimes, RouteCut, best_cuts, seam_floors
from autopar.search.pool_legs import Legs
from autopar.search.pool_prices import Prices
from autopar.search.pool_routes import routes
from autopar.search.pools import TOLERANCE, PoolSearch
from autopar.search.programs import MEMORY_PRICES
from autopar.search.stage_times import StageTimes
from autopar.search.stages import legal
from costmodel import peak_in_flight, simulate
from hardware_db import Cluster, Pools, join_pools
from tests.autopar.small_models import cluster, tower

BATCH = 8


def slower(machine: Cluster, factor: float) -> Cluster:
    """The cluster with devices that compute so many times slower."""
    device = machine.device
    peaks = {name: fact.scaled(1 / factor, "slow") for name, fact in device.peak_dense_flops_per_s.items()}
    return replace(
        machine, id="slow", name="slow", device=device.model_copy(update={"peak_dense_flops_per_s": peaks})
    )


@cache
def two_pools(memory_bytes: float = 16e9, factor: float = 3.0, num_devices: int = 2) -> Pools:
    fast = cluster(num_devices, memory_bytes)
    return join_pools([fast, slower(fast, factor)], link_bytes_per_s=50e9, link_latency_s=1e-5)


def search_of(pools: Pools, pins: Pins | None = None, depth: int = 3) -> PoolSearch:
    capture = tower(width=1024, depth=depth, vocabulary=512)
    policy = training_policy(capture.graph)
    planners = [
        Planner(capture, pool, policy, global_batch=BATCH, pins=pins, whole_space=False)
        for pool in pools.pools
    ]
    return PoolSearch(Legs(planners, pools))


@cache
def planned(factor: float = 3.0, **settings: Any) -> Plan:
    capture = tower(width=2048, depth=12, vocabulary=512)
    return api.plan(capture, two_pools(factor=factor), **{"global_batch": 64, "pp": 2, **settings})


@pytest.mark.parametrize(("tp", "memory_bytes"), [(1, 16e9), (1, 220e6), (2, 16e9), (2, 220e6), (2, 160e6)])
def test_comes_within_the_tolerance_of_every_cut_way_and_assignment(tp: int, memory_bytes: float) -> None:
    pools, pins = two_pools(memory_bytes), Pins(tp=tp)
    found = search_of(pools, pins)
    result = found.run()
    legs = search_of(pools, pins).legs
    prices, num_units = Prices(legs), legs.planners[0].num_units
    alone = [planner.search().best for planner in legs.planners]
    best_s = min((each.evaluated.step_s for each in alone if each is not None), default=inf)
    for route in routes(legs.planners):
        inner = combinations(range(1, num_units), route.num_stages - 1)
        numbers = (range(len(legs.ways(leg))) for leg in route.legs)
        levels = range(len(MEMORY_PRICES) if tp > 1 else 1)
        for cuts, ways, level in product(inner, list(product(*numbers)), levels):
            priced = prices.solve(route, level, RouteCut((0, *cuts), ways, 0.0))
            if priced.fits:
                best_s = min(best_s, priced.step_s)
    assert found.best_s <= best_s * (1 + TOLERANCE)
    assert result.bound_s <= best_s * (1 + 1e-9)
    assert result.num_solved + sum(result.pruned.values()) == result.num_candidates


def random_legs(random: np.random.Generator, num_stages: tuple[int, ...], m: int) -> list[LegTimes]:
    """Legs whose units differ, and take other times on each pool; nothing is computed again or done once."""
    num_units = sum(num_stages) + 3
    flights = list(peak_in_flight("1F1B", sum(num_stages), m, 1))
    legs: list[LegTimes] = []
    for p in num_stages:
        forward_s, backward_s = random.uniform(0.5, 2.0, (2, num_units)) * random.uniform(0.5, 3.0)
        leg = LegTimes.of(forward_s, backward_s, p)
        both = [np.subtract.outer(-before, -before) for before in leg.before_s]
        stages = [StageTimes(legal(both[0] + both[1], None), both[0], 0 * both[0])] * p
        own, flights = tuple(flights[:p]), flights[p:]
        send_s = random.uniform(0.0, 0.4, num_units) * bool(legs)
        legs.append(replace(leg, in_flight=own, ways=[stages], send_s=send_s))
    return legs


@pytest.mark.parametrize("num_stages", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 1, 1)])
@pytest.mark.parametrize("m", [1, 2, 5, 24])
def test_no_cuts_take_less_than_their_bound(num_stages: tuple[int, ...], m: int) -> None:
    random = np.random.default_rng(m)
    legs = random_legs(random, num_stages, m)
    floors_s, seams = seam_floors(legs, m)
    floor_of = {tuple(each): floor_s for each, floor_s in zip(seams.tolist(), floors_s.tolist(), strict=True)}
    num_units = len(legs[0].send_s)
    starts = np.cumsum((0, *num_stages))
    of_stage = [q for q, p in enumerate(num_stages) for _ in range(p)]
    best_s = np.inf
    for inner in combinations(range(1, num_units), sum(num_stages) - 1):
        ends = (0, *inner, num_units)
        works = [
            [float(before[b] - before[a]) for before in legs[q].before_s]
            for q, a, b in zip(of_stage, ends, ends[1:], strict=False)
        ]
        sends_s = [
            float(legs[q].send_s[a]) if s in starts else 0.0
            for s, (q, a) in enumerate(zip(of_stage, ends, strict=False))
        ]
        forward_s, backward_s = zip(*works, strict=True)
        step_s = simulate("1F1B", len(works), m, forward_s, backward_s, sends_s[1:]).step_s
        assert floor_of[tuple(ends[s] for s in starts)] <= step_s * (1 + 1e-9)
        best_s = min(best_s, step_s)
    found = best_cuts(legs, m)
    assert found is not None
    assert 0.9 * best_s <= found.bound_s <= best_s * (1 + 1e-9)
    assert best_cuts(legs, m, cutoff_s=found.bound_s) is None


@pytest.mark.parametrize("num_stages", [(1, 1), (2, 1), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("m", [1, 2, 5, 24])
def test_no_way_that_works_once_a_step_takes_less_than_its_bound(num_stages: tuple[int, ...], m: int) -> None:
    random = np.random.default_rng(m)
    slower = (1.0, 1.2)
    once_s = random.uniform(0.5, 3.0, (len(num_stages), 2)) * (1.0, 0.0)  # of each unit, the quick way only
    legs = [
        replace(leg, ways=[_slowed(leg.ways[0], *way) for way in zip(slower, once_s[q], strict=True)])
        for q, leg in enumerate(random_legs(random, num_stages, m))
    ]
    num_units, starts = len(legs[0].send_s), np.cumsum((0, *num_stages))
    of_stage = [q for q, p in enumerate(num_stages) for _ in range(p)]
    best_s = np.inf
    for inner in combinations(range(1, num_units), sum(num_stages) - 1):
        runs = [*zip(of_stage, (0, *inner), (*inner, num_units), strict=True)]
        sends_s = [float(legs[q].send_s[a]) if s in starts else 0.0 for s, (q, a, _) in enumerate(runs)]
        for picks in product((0, 1), repeat=len(legs)):
            forward_s, backward_s = (
                [slower[picks[q]] * float(before[q][b] - before[q][a]) for q, a, b in runs]
                for before in zip(*(leg.before_s for leg in legs), strict=True)
            )
            finish_s = simulate("1F1B", len(runs), m, forward_s, backward_s, sends_s[1:]).finish_s
            ends_s = (
                end_s + once_s[q, picks[q]] * (b - a) for end_s, (q, a, b) in zip(finish_s, runs, strict=True)
            )
            best_s = min(best_s, max(ends_s))
    found = best_cuts(legs, m)
    assert found is not None
    assert 0.8 * best_s <= found.bound_s <= best_s * (1 + 1e-9)


def _slowed(stages: Sequence[StageTimes], slower: float, once_s: float) -> list[StageTimes]:
    """Stages that take so many times longer, and each unit so long once a step."""
    numbers = np.arange(len(stages[0].once_s))
    units = np.maximum(0, numbers - numbers[:, None])
    times = StageTimes(slower * stages[0].microbatch_s, slower * stages[0].forward_s, once_s * units)
    return [times] * len(stages)


def test_a_fast_pool_gets_more_layers() -> None:
    def layers(plan: Plan) -> dict[str | None, int]:
        """The layers of every pool, of which a stage holds a run, as in `layers.3-8`."""
        counts: dict[str | None, int] = {}
        for stage in plan.stages:
            runs = [name.removeprefix("layers.").split("-") for name in stage.modules if "layers" in name]
            counts[stage.pool] = sum(int(run[-1]) - int(run[0]) + 1 for run in runs)
        return counts

    found = layers(planned(factor=3.0))
    assert sum(found.values()) == 12
    assert found["toys"] > 2 * found["slow"] > 0


def test_the_step_is_the_objective_and_its_terms_add_up() -> None:
    plan = planned()
    assert plan.pools
    assert plan.prediction.step_s == plan.certificate.objective_s
    assert sum(plan.prediction.terms_s.values()) == pytest.approx(plan.prediction.step_s)
    assert plan.certificate.gap <= TOLERANCE
    assert plan.certificate.bound_s <= plan.certificate.objective_s


def test_groups_lie_inside_their_pool() -> None:
    plan = planned(tp=2)
    ranks: set[int] = set()
    for pool in plan.pools:
        assert pool.parallelism.world_size == pool.cluster.num_devices
        for groups in pool.rank_groups:
            assert all(0 <= rank < pool.cluster.num_devices for group in groups.groups() for rank in group)
        ranks |= set(range(pool.first_rank, pool.first_rank + pool.cluster.num_devices))
    assert ranks == set(range(plan.cluster.num_devices))
    assert [pool.first_stage for pool in plan.pools] == [0, plan.pools[0].parallelism.pp]
    assert len({pool.parallelism.global_batch for pool in plan.pools}) == 1


@pytest.mark.parametrize("num_looks", [0, 40, 100])
def test_a_search_out_of_time_returns_the_best_so_far_with_its_gap(
    num_looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still until the search has looked at it so many times."""
    search = search_of(two_pools(), depth=12)
    bound_s = search_of(two_pools(), depth=12).run().bound_s
    ticks = iter([0.0] * num_looks)
    monkeypatch.setattr("autopar.search.pools.time.monotonic", lambda: next(ticks, 2.0))
    search.deadline = 1.0
    result = search.run()
    assert result.stopped == "time limit"
    assert result.best is not None or result.alone is not None
    assert 0 < result.bound_s < bound_s * (1 + TOLERANCE)
    assert search.best_s >= bound_s * (1 - 1e-9)
    assert result.num_solved + sum(result.pruned.values()) == result.num_candidates


def test_an_interrupt_before_a_pool_alone_has_a_plan_stops_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = search_of(two_pools())

    def interrupted(*_: object) -> None:
        raise SearchTimeoutError("no plan yet when the search was stopped (interrupted)")

    for planner in search.planners:
        monkeypatch.setattr(planner, "search", interrupted)
    result = search.run()
    assert result.stopped == "interrupted"
    assert result.best is not None
    assert not result.tried_alone
    assert result.bound_s < search.best_s


def test_work_counts_from_what_may_fit() -> None:
    search = search_of(two_pools(memory_bytes=100e6))
    assert search.work == 0
    search.run()
    assert search.work >= 0


def test_equal_pools_are_planned_as_one_cluster() -> None:
    apart, whole = (
        api.plan(tower(), spec, global_batch=32) for spec in ("dgx-a100*2 + dgx-a100*2", "dgx-a100*4")
    )
    assert apart.to_json() == whole.to_json()


def test_a_pool_that_does_not_help_stays_idle() -> None:
    pools = two_pools(factor=30.0)
    plan = api.plan(tower(), pools, global_batch=32)
    alone = api.plan(tower(), pools.pools[0], global_batch=32)
    assert not plan.pools
    assert plan.parallelism == alone.parallelism
    assert plan.prediction == alone.prediction
    assert "slow stays idle" in plan.warnings[0]


def test_plans_survive_json_and_are_explained() -> None:
    plan = planned()
    assert Plan.model_validate_json(plan.to_json()).to_json() == plan.to_json()
    text = plan.explain()
    assert "pools, in the order of the pipeline" in text
    for pool in plan.pools:
        assert f"{pool.cluster.id}: stage" in text
    assert f"({plan.cluster.num_devices} x {plan.cluster.device})" in text
    assert max(map(len, text.splitlines())) <= 110


def test_compile_refuses_pools() -> None:
    with pytest.raises(RewriteError, match="2 pools of different devices"):
        compile(tower(width=2048, depth=12, vocabulary=512), planned())


def test_launch_refuses_pools() -> None:
    with pytest.raises(AutoparError, match="2 pools of different devices"):
        job_of(planned())


def test_the_report_shows_the_strategies_of_every_pool() -> None:
    plan = planned(tp=2)
    report = view(plan)
    for pool in plan.pools:
        assert any(block.path.startswith(f"{pool.cluster.id}: ") for block in report.blocks)
        assert any(op.kind.startswith(f"{pool.cluster.id}: ") for op in report.operations)


def test_pins_that_leave_nothing_say_so() -> None:
    with pytest.raises(PinConflictError, match="pp counts the stages on all"):
        api.plan(tower(), two_pools(), global_batch=32, pp=64)


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(InfeasibleError, match=r"none of \d+ pipelines .* fits") as error:
        api.plan(tower(), two_pools(20e6), global_batch=32)
    assert error.value.excess_bytes > 0
