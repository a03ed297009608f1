"""The clock of the layers of a search, and what a plan tells of them."""

from __future__ import annotations

from typing import get_args

import pytest

import autopar
from autopar.plan import LayerEffort, Plan
from autopar.report import view
from autopar.search import effort
from autopar.search.effort import Effort, Layer, clocked, cut_size
from autopar.search.linear_model import Size
from hardware_db.pools import join_pools
from tests.autopar.small_models import cluster, tower


class Clock:
    """Processor time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def process_time(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(effort, "time", found)
    return found


def seconds(of: Effort) -> dict[str, float | None]:
    return {each.layer: each.cpu_s for each in of.layers() if each.cpu_s}


def test_time_belongs_to_the_innermost_layer_at_work(clock: Clock) -> None:
    found = Effort()
    clock.now_s = 1.0
    with found.on("local programs"):
        clock.now_s = 3.0
        with found.on("operators"):
            clock.now_s = 7.0
        clock.now_s = 15.0
    clock.now_s = 31.0
    assert seconds(found) == {"candidates": 1.0 + 16.0, "local programs": 2.0 + 8.0, "operators": 4.0}


def test_time_until_an_error_counts(clock: Clock) -> None:
    class Failing:
        def __init__(self) -> None:
            self.effort = Effort()

        @clocked("stages")
        def run(self, took_s: float) -> None:
            clock.now_s += took_s
            raise KeyboardInterrupt

    failing = Failing()
    with pytest.raises(KeyboardInterrupt):
        failing.run(2.0)
    clock.now_s += 1.0
    assert seconds(failing.effort) == {"stages": 2.0, "candidates": 1.0}


def test_the_largest_problem_is_that_with_most_variables() -> None:
    found = Effort()
    for size in (Size(5, 2, 1), Size(9, 1, 0), Size(7, 8, 7)):
        found.solved("operators", size)
    found.solved("operators")
    (layer,) = (each for each in found.layers() if each.layer == "operators")
    assert (layer.num_problems, layer.num_variables, layer.num_rows, layer.num_integer) == (4, 9, 1, 0)


def test_a_cut_has_an_arc_for_every_run_of_units_as_every_stage() -> None:
    runs = [(start, stop) for stop in range(1, 6) for start in range(stop)]
    assert cut_size(5, 3) == Size(3 * len(runs), 3 * 5, 0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autopar.plan(tower(), cluster(4, 330e6), global_batch=16)


def by_name(plan: Plan) -> dict[str, LayerEffort]:
    return {each.layer: each for each in plan.certificate.layers}


def test_a_plan_tells_what_every_layer_solved(plan: Plan) -> None:
    layers = by_name(plan)
    assert set(layers) == set(get_args(Layer))
    assert layers["candidates"].num_variables == plan.certificate.num_candidates
    operators = layers["operators"]
    assert operators.num_problems > 1
    assert 0 < operators.num_integer < operators.num_variables
    assert layers["local programs"].num_variables == 0


def test_seconds_are_told_but_are_no_part_of_the_plan(plan: Plan) -> None:
    loaded = Plan.model_validate_json(plan.to_json())
    assert all(each.cpu_s is not None for each in plan.certificate.layers)
    assert all(each.cpu_s is None for each in loaded.certificate.layers)
    assert loaded.to_json() == plan.to_json()
    sizes = [(each.name, each.num_problems, each.num_variables) for each in view(plan).search.layers]
    assert sizes == [
        (each.name, each.num_problems, each.num_variables) for each in view(loaded).search.layers
    ]


def test_layers_stand_in_the_explanation(plan: Plan) -> None:
    operators = by_name(plan)["operators"]
    (line,) = (line for line in plan.explain().splitlines() if line.split()[:1] == ["operators"])
    assert line.split()[1:5] == [
        f"{number:,}"
        for number in (
            operators.num_problems, operators.num_variables, operators.num_rows, operators.num_integer
        )
    ]  # fmt: skip


def test_pools_tell_it_for_all_of_them_together() -> None:
    fast = cluster(2)
    slow = cluster(2, memory_bytes=15e9)
    pools = join_pools([fast, slow], link_bytes_per_s=50e9, link_latency_s=1e-5)
    layers = by_name(autopar.plan(tower(), pools, global_batch=16, pp=2))
    assert layers["candidates"].num_problems == 1 + 2  # pipelines, and each pool by itself
    assert layers["stages"].num_variables == cut_size(layers["stages"].num_rows // 2, 2).variables
