"""The outer search against trying every candidate, its certificate, its pins."""

from __future__ import annotations

from typing import Any

import pytest

from autopar import api
from autopar.errors import InvalidParallelismError, PinConflictError
from autopar.module_paths import module_ranges
from autopar.plan import Parallelism, Plan
from autopar.request import training_policy
from autopar.search import branch
from autopar.search.pins import Pins
from autopar.search.planner import TOLERANCE, Planner
from autopar.search.space import Degrees, layouts, ways
from hardware_db import Cluster
from tests.autopar.small_models import cluster, tower


def planned(num_devices: int = 4, memory_bytes: float = 16e9, **settings: Any) -> Plan:
    return api.plan(tower(), cluster(num_devices, memory_bytes), **{"global_batch": 16, **settings})


def planner_of(machine: Cluster) -> Planner:
    return Planner(tower(), machine, training_policy(tower().graph), global_batch=16)


def exhaustive(planner: Planner) -> float:
    """The best step time when every candidate is priced and nothing is pruned."""
    solved = [planner.solve(p) for p in planner.candidates()]
    return min(s.evaluated.step_s for s in solved if s.evaluated.fits)


@pytest.mark.parametrize("memory_bytes", [16e9, 330e6, 200e6, 120e6])
def test_comes_within_the_tolerance_of_pricing_every_candidate(memory_bytes: float) -> None:
    machine = cluster(4, memory_bytes)
    result = planner_of(machine).search()
    assert result.best is not None
    best_s = exhaustive(planner_of(machine))
    assert result.best.evaluated.step_s <= best_s * (1 + TOLERANCE)
    assert result.bound_s <= best_s * (1 + 1e-9)
    assert result.best.evaluated.peak_memory_bytes <= memory_bytes


@pytest.mark.parametrize("memory_bytes", [16e9, 200e6])
def test_floors_lie_below_every_price(memory_bytes: float) -> None:
    planner = planner_of(cluster(8, memory_bytes))
    for p in planner.candidates():
        solved = planner.solve(p)
        step_s = solved.evaluated.step_s * (1 + 1e-9)
        device = planner.floors.device(p.microbatch_size, p.ep)
        microbatch_s = planner.floors.tensor_s(p.microbatch_size, p.tp, p.ep) / p.cp
        assert planner.bounds.step_s(p, microbatch_s, device) <= step_s or not solved.evaluated.fits, str(p)
        assert solved.bound_s <= step_s, str(p)
        light = p.model_copy(update={"recompute": "mixed"})
        assert planner.bounds.memory_bytes(light) <= solved.evaluated.peak_memory_bytes * (1 + 1e-9), str(p)


def test_a_plan_without_tensor_axis_and_pipeline_is_what_evaluate_says_of_it() -> None:
    """Then there is nothing that a person would have pinned otherwise."""
    plan = planned(4)
    assert plan.parallelism.tp == plan.parallelism.pp == 1
    again = api.evaluate(tower(), cluster(4), parallelism=plan.parallelism)
    assert again.prediction == plan.prediction
    assert again.stages == plan.stages
    assert again.strategies == plan.strategies


@pytest.mark.parametrize(("num_devices", "pins"), [(8, {"tp": 2}), (4, {"tp": 4}), (4, {"pp": 4})])
def test_a_plan_is_no_slower_than_what_a_person_pins(num_devices: int, pins: dict[str, int]) -> None:
    plan = planned(num_devices, **pins)
    pinned = api.evaluate(tower(), cluster(num_devices), parallelism=plan.parallelism)
    assert plan.prediction.step_s <= pinned.prediction.step_s * (1 + 1e-9)


def test_the_certificate_counts_every_candidate() -> None:
    certificate = planned().certificate
    assert certificate.num_solved + sum(certificate.pruned.values()) == certificate.num_candidates
    assert 0 < certificate.bound_s <= certificate.objective_s
    assert certificate.gap < 0.1


def test_ddp_and_fsdp_are_always_among_the_alternatives() -> None:
    plan = planned(8, 150e6)
    reasons = {other.label: other.reason for other in plan.alternatives}
    assert {"DDP", "FSDP"} <= set(reasons)
    assert "out of memory by" in reasons["DDP"]
    for other in plan.alternatives:
        assert other.parallelism.world_size == 8
        assert other.parallelism.global_batch == 16
        if (
            other.step_s is not None
            and other.peak_memory_bytes is not None
            and other.peak_memory_bytes <= 150e6
        ):
            assert other.step_s >= plan.prediction.step_s * (1 - 1e-9)


@pytest.mark.parametrize("memory_bytes", [400e6, 250e6])
def test_fsdp_is_shown_at_its_best(memory_bytes: float) -> None:
    model = tower(depth=12)
    policy = training_policy(model.graph)
    planner = Planner(model, cluster(4, memory_bytes), policy, global_batch=64)
    plain = planner.under(Pins(tp=1, cp=1, ep=1, pp=1, zero_stage=3, dp_shard=4))
    fsdp = planner.search().baselines["FSDP"]
    assert fsdp is not None
    assert fsdp.evaluated.fits
    assert fsdp.evaluated.step_s == pytest.approx(exhaustive(plain), rel=1e-9)


@pytest.mark.parametrize("most_cuts", [0, 64])
def test_runners_up_are_other_meshes_however_little_is_looked_at_for_them(
    most_cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "MORE_CUTS", most_cuts)
    found = planner_of(cluster(8, 200e6)).search()
    assert found.best is not None
    assert found.runners_up
    best_s = found.best.evaluated.step_s
    assert found.bound_s <= best_s <= min(each.evaluated.step_s for each in found.runners_up)
    meshes = {
        (p.pp, p.tp, p.cp, p.ep, p.dp_shard, p.dp_replicate)
        for p in (each.parallelism for each in (found.best, *found.runners_up))
    }
    assert len(meshes) == 1 + len(found.runners_up)


def test_the_same_search_gives_the_same_bytes() -> None:
    assert planned(8, 200e6).to_json() == planned(8, 200e6).to_json()


@pytest.mark.parametrize(
    "pins",
    [
        {"tp": 2},
        {"pp": 2},
        {"dp": 1},
        {"zero_stage": 3},
        {"recompute": "full"},
        {"microbatch_size": 2},
        {"pp": 2, "schedule": "GPipe"},
        {"pp": 2, "num_virtual_stages": 2},
    ],
)
def test_pins_are_kept(pins: dict[str, Any]) -> None:
    plan = planned(4, **pins)
    for name, value in pins.items():
        assert getattr(plan.parallelism, name) == value
    assert plan.prediction.step_s >= planned(4).prediction.step_s * (1 - 1e-9)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"tp": 3}, r"tp=3 does not divide 4 devices; divisors are 1, 2, 4"),
        ({"dp": 4, "tp": 4}, r"dp=4"),
        ({"microbatch_size": 5}, r"microbatch_size=5"),
        ({"pp": 0}, r"pp=0 is not a count"),
        ({"zero_stage": 9}, r"zero_stage=9 is unknown; choose one of 0, 1, 2, 3"),
    ],
)
def test_impossible_pins_say_so(pins: dict[str, Any], message: str) -> None:
    with pytest.raises(PinConflictError, match=message):
        planned(4, **pins)


def test_no_time_still_gives_a_plan_that_says_how_far_it_came() -> None:
    hasty, best = planned(4, time_limit_s=0.0), planned(4)
    assert hasty.certificate.pruned["time limit"] > 0
    assert hasty.certificate.bound_s <= best.prediction.step_s <= hasty.prediction.step_s * (1 + 1e-9)


def test_a_batch_of_nothing_is_an_error() -> None:
    with pytest.raises(InvalidParallelismError, match="has no sample"):
        planned(4, global_batch=0)


def test_progress_ends_complete() -> None:
    seen: list[tuple[str, int, int]] = []
    planned(4, progress=lambda *step: seen.append(step))
    assert seen[0][0] == "capture"
    assert seen[-1][0].startswith("search")
    assert all(0 <= done <= total for _, done, total in seen)


def test_a_larger_cluster_is_not_slower() -> None:
    assert planned(8).prediction.step_s <= planned(4).prediction.step_s


def all_ways(machine: Cluster, pins: Pins) -> list[Parallelism]:
    degrees = Degrees((1, 2, 4), (1, 2), (1,), 8)
    return [p for layout in layouts(machine, 32, degrees, pins) for p in ways(layout, machine, degrees, pins)]


def test_candidates_use_all_devices_once() -> None:
    found = all_ways(cluster(16), Pins())
    assert len({p.model_dump_json() for p in found}) == len(found)
    for p in found:
        assert p.world_size == 16
        assert p.global_batch == 32
        assert Parallelism.model_validate(p.model_dump()) == p


def test_node_local_sharding_is_offered() -> None:
    found = all_ways(cluster(16), Pins(zero_stage=3))
    assert any((p.dp_replicate, p.dp_shard) == (4, 4) for p in found)
    assert any((p.dp_replicate, p.dp_shard, p.tp) == (4, 2, 2) for p in found)


def test_modules_are_written_as_ranges() -> None:
    paths = ["embed", "", *(f"layers.{index}" for index in range(3)), "layers.7", "head"]
    assert module_ranges(paths) == ("embed", "layers.0-2", "layers.7", "head")
