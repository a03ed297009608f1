"""Every kind of model gets a plan: nothing in the search knows what a transformer is."""

from __future__ import annotations

from functools import cache

import pytest

import graphs
from autopar import api
from autopar.api import Space
from autopar.plan import Parallelism, Plan
from autopar.request import training_policy
from autopar.search.describe import parameter_placements
from autopar.search.planner import Planner
from graphs import Capture
from tests.autopar.small_models import cluster
from tests.autopar.tiny_models import programs_of
from tests.models import case

DEVICES = 8
ROUNDING = 1e-9
KINDS = {
    "decoder": "llama", "encoder": "bert", "encoder-decoder": "t5", "mixture of experts": "mixtral",
    "vision transformer": "vit", "convolutions": "resnet", "skips": "unet", "embedding tables": "dlrm",
    "two towers": "clip",
}  # fmt: skip


@cache
def captured(name: str) -> Capture:
    model = case(name)
    return graphs.capture(model.build(), model.inputs, name=name)


@pytest.mark.parametrize("space", ["programs", "whole"])
@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_gets_a_plan(name: str, space: Space) -> None:
    model = captured(name)
    plan = api.plan(model, cluster(DEVICES, per_node=1), global_batch=2, space=space)
    assert plan.parallelism.world_size == DEVICES
    assert 0 < plan.certificate.bound_s <= plan.certificate.objective_s == plan.prediction.step_s
    assert plan.certificate.gap < 0.05
    assert plan.prediction.peak_memory_bytes <= plan.cluster.memory_bytes
    assert Plan.model_validate_json(plan.to_json()).to_json() == plan.to_json()
    # Replicas of a model with experts route their own tokens: nothing is said of their data axis.
    assert set(plan.strategies) - {"dp"} == {axis for axis, size in sizes(plan).items() if size > 1}


@pytest.mark.parametrize(
    ("name", "tp", "cp"), [*((name, 4, 1) for name in KINDS.values()), ("llama", 2, 2), ("opt", 2, 2)]
)
def test_every_rank_starts_as_many_kernels_as_one_device(name: str, tp: int, cp: int) -> None:
    """However its ops are split: floors count on that. The positions of "opt" are counted from constants that
    each reader may make by itself."""
    model = captured(name)
    planner = Planner(model, cluster(8), training_policy(model.graph), global_batch=8)
    p = Parallelism(tp=tp, cp=cp, microbatch_size=2, num_microbatches=4)
    device = planner.programs.device(p.microbatch_size).chain
    for program in (planner.programs.given(p), *programs_of(planner, p)):
        for unit, whole in zip(program.chain.units, device.units, strict=True):
            forward_s, backward_s = unit.launches.forward_s, unit.launches.backward_s
            inputs_s = backward_s - unit.launches.weight_s
            assert forward_s >= whole.launches.forward_s * (1 - ROUNDING), unit.first_op
            assert backward_s >= whole.launches.backward_s * (1 - ROUNDING), unit.first_op
            assert inputs_s >= (whole.launches.backward_s - whole.launches.weight_s) * (1 - ROUNDING)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_every_parameter_has_a_placement_on_a_tensor_axis(name: str) -> None:
    """However little of the model the axis can split."""
    model = captured(name)
    planner = Planner(model, cluster(2), training_policy(model.graph), global_batch=1)
    placements = parameter_placements(model.graph, planner.as_given(Parallelism(tp=2)))
    placed = [path for pattern in placements for path in matching(pattern, model)]
    assert sorted(placed) == sorted(parameter.name for parameter in model.graph.parameters)


def sizes(plan: Plan) -> dict[str, int]:
    p = plan.parallelism
    return {"cp": p.cp, "tp": p.tp}


def matching(pattern: str, model: Capture) -> list[str]:
    """The parameters that a pattern of a plan stands for, `*` being one number of a path."""
    parts = pattern.split(".")
    return [
        parameter.name
        for parameter in model.graph.parameters
        if len(split := parameter.name.split(".")) == len(parts)
        and all(
            want == part or (want == "*" and part.isdigit()) for want, part in zip(parts, split, strict=True)
        )
    ]
