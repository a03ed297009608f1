"""What is searched beside degrees: shapes of a slice against each shape alone, and offloading as a last
resort."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import autopar
import graphs
import hardware_db
from autopar import api
from autopar.errors import InfeasibleError, PinConflictError
from autopar.plan import Plan
from autopar.request import training_policy
from autopar.search import attempts
from autopar.search.pins import Pins
from autopar.search.planner import TOLERANCE, Planner
from graphs import Capture
from hardware_db import Cluster
from tests.autopar.small_models import Tower, tower
from tests.autopar.small_models import cluster as toys

# --- shapes of a slice --------------------------------------------------------------------------------------

CHIPS = 256  # of a TPU v4: 4x8x8 or 4x4x16


def shape_planner(cluster: Cluster, **pins: object) -> Planner:
    capture = tower(depth=2)
    settings = Pins.merged(None, **pins)
    policy = training_policy(capture.graph)
    return Planner(capture, cluster, policy, global_batch=CHIPS, pins=settings, whole_space=False)


@pytest.mark.parametrize("pins", [{"tp": 4, "pp": 1}, {"tp": 8, "pp": 1, "zero_stage": 0}], ids=str)
def test_the_best_shape_is_that_of_the_shapes_searched_alone(pins: dict[str, object]) -> None:
    shapes = hardware_db.slice_shapes(hardware_db.cluster(f"tpu-v4*{CHIPS}"))
    alone = {shape.id: shape_planner(shape, **pins).search() for shape in shapes}
    steps_s = {name: each.best.evaluated.step_s for name, each in alone.items() if each.best is not None}
    for order in (shapes, shapes[::-1]):
        found = attempts.search([shape_planner(shape, **pins) for shape in order])
        assert found.result.best is not None
        step_s = found.result.best.evaluated.step_s
        best_s = min(steps_s.values())
        # A later shape has to be better by more than what ends a search.
        assert best_s <= step_s <= best_s * (1 + TOLERANCE)
        assert steps_s[found.planner.cluster.id] == pytest.approx(step_s, rel=TOLERANCE)
        assert found.result.bound_s <= best_s
        assert found.result.num_candidates == sum(each.num_candidates for each in alone.values())
    assert len(steps_s) == len(shapes) == 2


def test_a_plan_names_its_shape_and_a_given_shape_stays() -> None:
    def planned(cluster: str) -> Plan:
        return api.plan(tower(depth=2), cluster, global_batch=CHIPS, tp=4, pp=1, price_pins=False)

    shapes = ("tpu-v4-4x8x8", "tpu-v4-4x4x16")
    free = planned(f"tpu-v4*{CHIPS}")
    assert free.cluster.id in shapes
    given = {name: planned(name) for name in shapes}
    assert {name: plan.cluster.id for name, plan in given.items()} == {name: name for name in shapes}
    same = given[free.cluster.id]
    assert free.prediction.step_s == same.prediction.step_s
    assert free.rank_groups == same.rank_groups


def test_pins_that_no_shape_allows_are_refused_as_one_cluster_refuses_them() -> None:
    with pytest.raises(PinConflictError, match="tp=3"):
        api.plan(tower(depth=2), f"tpu-v4*{CHIPS}", global_batch=CHIPS, tp=3)


# --- offloading ---------------------------------------------------------------------------------------------

DEVICE_BYTES, HOST_BYTES = 100e6, 1e9


def small(host_bytes: float | None = HOST_BYTES, device_bytes: float = DEVICE_BYTES) -> Cluster:
    """Two devices with less memory than the states of the tower take, and their hosts."""
    if host_bytes is None:
        return toys(2, device_bytes)
    return replace(
        toys(2, device_bytes),
        host_memory_bytes_per_device=host_bytes,
        host_memory_bytes_per_s_per_device=40e9,
        host_link_bytes_per_s_per_device=12e9,
    )


@cache
def offloaded() -> Plan:
    return api.plan(tower(), small(), global_batch=16)


def test_states_are_offloaded_where_nothing_else_fits_and_the_plan_says_so() -> None:
    plan = offloaded()
    assert plan.parallelism.offload == "optimizer"
    assert plan.fits
    share = plan.parallelism.dp_shard if plan.parallelism.zero_stage else 1
    least = 16 * tower().graph.num_parameters / (plan.parallelism.tp * plan.parallelism.pp * share)
    assert least * 0.999 <= plan.prediction.host_memory_bytes <= 1.1 * least  # what tp cannot split is whole
    (warning,) = plan.warnings
    assert "so they are offloaded: they take 0.1 GB of the 1.0 GB" in warning
    assert warning in " ".join(plan.explain().split())


def test_what_fits_is_not_offloaded() -> None:
    plan = api.plan(tower(), small(device_bytes=1e9), global_batch=16)
    assert (plan.parallelism.offload, plan.warnings) == ("none", ())


def test_a_pin_offloads_what_would_fit_and_a_ban_keeps_what_does_not() -> None:
    roomy = small(device_bytes=1e9)
    pinned = api.plan(tower(), roomy, global_batch=16, pins={"offload": "optimizer"}, price_pins=False)
    free = api.plan(tower(), roomy, global_batch=16)
    assert pinned.parallelism.offload == "optimizer"
    assert pinned.prediction.step_s > free.prediction.step_s
    assert pinned.prediction.terms_s["optimizer"] > pinned.prediction.step_s / 4
    assert pinned.certificate.bound_s >= pinned.prediction.step_s * (1 - TOLERANCE)
    for pins in ({"offload": "none"}, {"forbid": {"offload": ["optimizer"]}}):
        with pytest.raises(InfeasibleError, match="does not fit toys"):
            api.plan(tower(), small(), global_batch=16, pins=pins)


@pytest.mark.parametrize(
    ("host_bytes", "device_bytes", "why"),
    [
        (
            None,
            DEVICE_BYTES,
            "Nor can the host help: .* nothing is known of host_link_bytes_per_s_per_device",
        ),
        (1e6, DEVICE_BYTES, "With offloading, .* is out of the host's memory by 0.1 GB: offloaded optimizer"),
        (HOST_BYTES, 50e6, r"With offloading, .* is out of memory by [\d.]+ MB in the .*: parameters"),
    ],
)
def test_where_offloading_is_no_help_the_error_says_why(
    host_bytes: float | None, device_bytes: float, why: str
) -> None:
    with pytest.raises(InfeasibleError, match=why) as error:
        api.plan(tower(), small(host_bytes, device_bytes), global_batch=16)
    assert "does not fit toys" in str(error.value)
    assert error.value.excess_bytes > 0
    assert error.value.relaxations


def whole_tower() -> Capture:
    """The tower with real weights, so that it can be compiled."""
    model = Tower(width=64, depth=2, vocabulary=128)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(batch, 16, dtype=torch.long) for name in ("tokens", "labels")}

    return graphs.capture(nn.Sequential(model)[0], inputs, name="tower")


def test_the_program_of_an_offloaded_plan_trains_with_the_hosts_optimizer() -> None:
    capture = whole_tower()
    states_bytes = 16 * capture.graph.num_parameters
    plan = api.plan(capture, small(device_bytes=0.75 * states_bytes / 2), global_batch=4)
    assert plan.parallelism.offload == "optimizer"
    train = autopar.compile(capture, plan).files["train.py"]
    assert "OPTIMIZER = HostAdamW" in train
    roomy = api.plan(capture, small(device_bytes=1e9), global_batch=4)
    assert "HostAdamW" not in autopar.compile(capture, roomy).files["train.py"]
