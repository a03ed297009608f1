"""Experts dealt out over ranks: what is sent, what stays, and what cannot be dealt out."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import RewriteError
from autopar.expert_parallel import expert_parallel
from autopar.localize import Localized
from autopar.op_kinds import EXCHANGES
from autopar.placements import sharded
from autopar.plan import Parallelism
from autopar.rewrite.mesh import ProgramMesh
from autopar.rewrite.program import rewrite
from autopar.runtime.mesh import JOINT, joint
from graphs import Capture, capture
from tests.autopar.random_plans import plan_of
from tests.autopar.tiny_models import tiny
from tests.models import case


@cache
def captured(name: str) -> Capture:
    return capture(case(name).build(), case(name).inputs, name=name)


@pytest.mark.parametrize(("name", "num_layers"), [("mixtral", 2), ("qwen3moe", 2), ("deepseekv3", 1)])
def test_rows_travel_once_to_their_experts_and_once_back(name: str, num_layers: int) -> None:
    local = expert_parallel(Localized.of(captured(name).at(2)), 2)
    targets = Counter(op.target for op in local.graph.ops)
    assert {target: targets[target] for target in EXCHANGES} == dict.fromkeys(EXCHANGES, num_layers)
    assert len({op.name for op in local.graph.ops}) == len(local.graph.ops)
    for op in local.graph.ops:
        for read in op.inputs:
            assert read not in local.graph.producer or (
                local.graph.producer[read] < local.graph.producer[op.outputs[0]]
            )


def test_each_rank_has_its_part_of_the_experts_and_all_else_whole() -> None:
    graph = captured("mixtral").at(2)
    local = expert_parallel(Localized.of(graph), 2)
    for each in graph.parameters:
        whole, mine = graph.tensors[each.tensor].shape, local.graph.tensors[each.tensor].shape
        if ".experts." in each.name:
            assert mine == (whole[0] // 2, *whole[1:])
            assert local.states[each.tensor]["ep"] == sharded(0)
        else:
            assert mine == whole
    products = [op for op in local.graph.ops if "grouped_mm" in op.target]
    for op in products:
        rows, weight, ends = (local.graph.tensors[name].shape for name in op.inputs)
        assert ends == weight[:1] == (2,)
        assert rows == (64, weight[1]), "on average as many rows as before"


def test_what_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(RewriteError, match="llama has no experts"):
        expert_parallel(Localized.of(captured("llama").at(2)), 2)
    with pytest.raises(RewriteError, match="ep=3 does not divide the 4 experts"):
        expert_parallel(Localized.of(captured("mixtral").at(2)), 3)
    with pytest.raises(RewriteError, match="not sorted in a way that could be followed"):
        expert_parallel(Localized.of(tiny("experts", 16, 2, 16).at(2)), 2)


class Block(nn.Module):
    """A mixture whose gate and experts are in the same module, written by hand."""

    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.weight = nn.Parameter(torch.randn(experts, width, width, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores = self.gate(rows.float()).softmax(-1)
        score, expert = scores.max(-1)
        keys, order = torch.sort(expert)
        ends = torch.histc(keys.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)
        made = nn.functional.grouped_mm(rows[order], self.weight, offs=ends) * score[order].unsqueeze(1)
        back = torch.zeros(rows.shape).index_add(0, order, made.float())
        return back.view(x.shape).square().mean()


def test_a_mixture_written_by_hand_is_dealt_out_but_not_sharded_with_its_gate() -> None:
    model = capture(Block(), lambda batch: {"x": torch.randn(batch, 8, 8, dtype=torch.bfloat16)})
    plain = Parallelism(dp_replicate=4, ep=2, microbatch_size=2)
    source = rewrite(model, plan_of(model.graph, plain, {})).source
    assert '"weight": {"ep": Split(0)}' in source
    assert source.count("to_experts(") == 1
    sharded_too = Parallelism(dp_shard=4, ep=2, zero_stage=1, microbatch_size=2)
    with pytest.raises(
        RewriteError, match=r"the root over fewer ranks than gate\.\w+, .*zero_stage=0 or ep=1"
    ):
        rewrite(model, plan_of(model.graph, sharded_too, {}))


def test_ranks_that_share_experts_are_neighbours_on_one_data_axis() -> None:
    def axes(**degrees: object) -> dict[str, int]:
        return ProgramMesh.of(Parallelism.model_validate(degrees)).axes

    assert axes(dp_replicate=4, tp=2, ep=2) == {"dp_replicate": 2, "ep": 2, "tp": 2}
    assert axes(dp_replicate=2, ep=2, pp=2) == {"pp": 2, "ep": 2}
    assert axes(dp_replicate=2, dp_shard=4, ep=4, zero_stage=2) == {"dp_replicate": 2, "dp_shard": 1, "ep": 4}
    with pytest.raises(RewriteError, match="ep=4 does not divide dp_shard=2"):
        axes(dp_replicate=2, dp_shard=2, ep=4, zero_stage=2)


def test_a_joint_axis_is_made_once_for_the_same_ranks() -> None:
    axes = ("dp_replicate", "ep", "tp")
    assert {name: joint(axes, name) for name in JOINT} == {
        "dp": "dp", "dp_cp": "dp", "shard": "ep", "expert_dp": "dp_replicate", "expert_shard": None,
    }  # fmt: skip
    assert joint(("cp", "tp"), "dp_cp") == "cp"
    assert joint(("dp_shard", "ep", "cp"), "shard") == "dp_cp"


def test_gradients_of_experts_are_summed_over_those_who_hold_the_same() -> None:
    plain = ProgramMesh.of(Parallelism(dp_replicate=4, ep=2))
    assert plain.expert_gradients == "dp_replicate"
    assert ProgramMesh.of(Parallelism(dp_replicate=2, ep=2)).expert_gradients is None
    assert ProgramMesh.of(Parallelism(dp_shard=4, ep=2, zero_stage=1)).expert_gradients is None


def test_a_stage_that_begins_amid_experts_is_refused() -> None:
    """It would receive as many rows as there are on average, where a rank has more or fewer."""
    parallelism = Parallelism(dp_replicate=2, ep=2, pp=2, num_microbatches=2, microbatch_size=2)
    model = captured("mixtral")
    products = [op for op in model.graph.ops if "grouped_mm" in op.target]
    plan = plan_of(model.graph, parallelism, {})
    router = next(op for op in model.graph.ops if op.module == "model.layers.1.mlp.gate")
    for op, is_inside in ((products[0], True), (products[1], True), (router, False)):
        last = plan.stages[1].model_copy(update={"first_op": op.name})
        cut_there = plan.model_copy(update={"stages": (plan.stages[0], last)})
        if is_inside:
            with pytest.raises(
                RewriteError, match=rf"stage 2 of 2 would begin with {op.name} .* amid experts"
            ):
                rewrite(model, cut_there)
        else:
            assert rewrite(model, cut_there)
