"""What a parallelism that the user names costs, checked against formulas and against its own parts."""

from __future__ import annotations

from functools import cache
from math import isclose
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import graphs
from autopar import api
from autopar.cli.parser import build_parser
from autopar.errors import InvalidParallelismError
from autopar.plan import Plan, ScheduleName
from autopar.pricing import DEFAULT_SOFTWARE
from costmodel import (
    SCHEDULES,
    Collective,
    CollectiveKind,
    CostModelError,
    Group,
    collective_time_s,
    software,
)
from costmodel.orders import V_SCHEDULES, stage_ranks
from graphs import Capture
from tests.autopar.small_models import Tower, cluster, tower

ERA = software(DEFAULT_SOFTWARE)


def evaluated(num_devices: int = 4, **settings: Any) -> Plan:
    settings = {"global_batch": 16, **settings}
    return api.evaluate(tower(), cluster(num_devices), **settings)


def entry(plan: Plan, name: str, stage: int = 0) -> float:
    return plan.stages[stage].memory_bytes[name]


def collective_s(kind: CollectiveKind, num_bytes: float) -> float:
    """Over all four devices, at the rate that a training step leaves of the links'."""
    return collective_time_s(Collective(kind, num_bytes, Group(4, 1)), cluster(4)) / ERA.collective_share


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero_stage": 3},
        {"tp": 2, "zero_stage": 1},
        {"tp": 4, "microbatch_size": 4},
        {"pp": 2, "recompute": "full"},
        {"pp": 2, "tp": 2, "schedule": "GPipe"},
        {"pp": 2, "num_virtual_stages": 2, "recompute": "selective"},
    ],
)
def test_terms_add_up_and_the_certificate_says_evaluated(settings: dict[str, Any]) -> None:
    plan = evaluated(**settings)
    prediction = plan.prediction
    assert isclose(sum(prediction.terms_s.values()), prediction.step_s)
    assert plan.certificate.status == "evaluated"
    assert plan.parallelism.world_size == 4
    assert plan.parallelism.global_batch == 16
    assert prediction.tokens_per_s == pytest.approx(16 * 256 / prediction.step_s)
    assert prediction.mfu == pytest.approx(
        3 * plan.model.flops_per_sample * 16 / (prediction.step_s * 4 * 50e12)
    )
    assert len(plan.stages) == plan.parallelism.pp * plan.parallelism.num_virtual_stages


@pytest.mark.parametrize(
    ("zero_stage", "parameters", "gradients", "optimizer"),
    [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)],
)
def test_model_states_follow_the_zero_paper(
    zero_stage: int, parameters: int, gradients: int, optimizer: int
) -> None:
    plan = evaluated(zero_stage=zero_stage)
    num_parameters = plan.model.num_parameters
    assert entry(plan, "parameters") == pytest.approx(4 * num_parameters / parameters)
    assert entry(plan, "gradients") == pytest.approx(4 * num_parameters / gradients)
    assert entry(plan, "optimizer") == pytest.approx(8 * num_parameters / optimizer)


def test_activations_are_what_autograd_saves() -> None:
    """Counted by torch itself, on the real model and one microbatch."""
    model = Tower(64, 3, 128)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    kept: dict[int, int] = {}
    fixed = {parameter.data_ptr() for parameter in model.parameters()} | {tokens.data_ptr()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        keep_alive.append(tensor)
        return tensor

    keep_alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    plan = api.evaluate(
        model,
        cluster(1),
        inputs=lambda batch: {
            name: torch.zeros(batch, 32, dtype=torch.long) for name in ("tokens", "labels")
        },
        global_batch=2,
        microbatch_size=2,
    )
    assert entry(plan, "activations") == pytest.approx(sum(kept.values()), rel=0.01)


def test_ddp_synchronises_every_gradient_once() -> None:
    plan = evaluated(global_batch=4)
    size = 4 * plan.model.num_parameters
    assert 0 < plan.prediction.terms_s["gradient_sync"] <= 1.2 * collective_s("all_reduce", size)


def test_one_device_communicates_nothing() -> None:
    terms = evaluated(1).prediction.terms_s
    for name in ("tensor_parallel", "parameter_gather", "send_recv", "pipeline_bubble", "gradient_sync"):
        assert terms[name] == 0


def test_one_device_is_its_own_reference() -> None:
    plan = evaluated(1)
    assert plan.prediction.single_device_step_s == pytest.approx(plan.prediction.step_s)


def test_recomputation_trades_time_for_memory() -> None:
    plain, selective, full = (evaluated(recompute=mode) for mode in ("none", "selective", "full"))
    activations = [entry(plan, "activations") for plan in (plain, selective, full)]
    assert activations[0] > activations[2]
    assert plain.prediction.terms_s["recompute"] == 0
    assert 0 < selective.prediction.terms_s["recompute"] < full.prediction.terms_s["recompute"]


def test_stages_share_the_model_and_early_ones_hold_more_microbatches() -> None:
    plan = evaluated(pp=4, microbatch_size=1)
    assert sum(entry(plan, "parameters", stage) for stage in range(4)) == pytest.approx(
        4 * plan.model.num_parameters
    )
    modules = [name for stage in plan.stages for name in stage.modules]
    assert modules[0] == "embed"
    assert modules[-1] == "head"
    assert plan.prediction.terms_s["pipeline_bubble"] > 0
    assert entry(plan, "activations", 1) > entry(plan, "activations", 2)


def test_tensor_parallelism_splits_memory_where_memory_is_short() -> None:
    small = cluster(4, memory_bytes=180e6)
    plan = api.evaluate(tower(), small, global_batch=16, tp=4)
    assert not plan.warnings
    assert plan.prediction.peak_memory_bytes <= 180e6
    assert entry(plan, "parameters") < 4 * plan.model.num_parameters / 2


def test_out_of_memory_is_a_warning_not_an_error() -> None:
    plan = api.evaluate(tower(), cluster(4, memory_bytes=100e6), global_batch=16)
    assert plan.prediction.peak_memory_bytes > plan.cluster.memory_bytes
    assert "out of memory by" in plan.warnings[0]


def test_the_same_call_gives_the_same_bytes() -> None:
    assert evaluated(tp=2, pp=2).to_json() == evaluated(tp=2, pp=2).to_json()


def test_a_parallelism_says_the_same_as_its_settings() -> None:
    settings: dict[str, Any] = {"tp": 2, "dp_shard": 2, "zero_stage": 2, "microbatch_size": 2}
    plan = evaluated(**settings, recompute="full", sequence_parallel=False)
    again = api.evaluate(tower(), cluster(4), parallelism=plan.parallelism)
    assert again.to_json() == plan.to_json()
    others: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tp": 2}, "tp"),
        ({"global_batch": 8}, "a global batch of 8 instead of its 16"),
    )
    for also, named in others:
        with pytest.raises(InvalidParallelismError, match=f"says everything, but {named} was given as well"):
            api.evaluate(tower(), cluster(4), parallelism=plan.parallelism, **also)
    with pytest.raises(InvalidParallelismError, match="how many samples has a step"):
        api.evaluate(tower(), cluster(4))


def test_sequence_parallelism_is_on_unless_said_to_be_off() -> None:
    """Then what lies between the products is kept whole by every rank."""
    split, said, whole = (evaluated(tp=4, sequence_parallel=each) for each in (None, True, False))
    assert said.prediction == split.prediction
    assert said.strategies == split.strategies != whole.strategies
    assert entry(whole, "activations") > entry(split, "activations")


def test_a_plan_records_the_software_that_it_is_for() -> None:
    eager, fused = evaluated(), evaluated(software="te-2024")
    assert eager.prediction.software == DEFAULT_SOFTWARE
    assert fused.prediction.software == "te-2024"
    assert fused.prediction.terms_s["compute"] != eager.prediction.terms_s["compute"]
    assert "te-2024" in fused.explain()
    searched = api.plan(tower(), cluster(4), global_batch=16, software="te-2024", tp=1, pp=1)
    assert searched.prediction.software == "te-2024"
    assert searched.prediction.step_s <= fused.prediction.step_s
    for call in (evaluated, lambda **settings: api.plan(tower(), cluster(4), global_batch=16, **settings)):
        with pytest.raises(CostModelError, match=r"unknown software 'te-2023'; did you mean .*te-2024"):
            call(software="te-2023")


def test_blocks_are_dealt_out_evenly_over_stages() -> None:
    """Whatever the ends weigh."""
    modules = [stage.modules for stage in evaluated(pp=2).stages]
    assert modules == [("embed", "layers.0-2"), ("layers.3-5", "head")]


def test_strategies_name_every_representative_op() -> None:
    plan = evaluated(tp=2)
    graph = tower().graph
    names = {graph.ops[index].name for index in graph.representative}
    assert set(plan.strategies) == {"dp", "tp"}
    assert names == set(plan.strategies["dp"])
    assert names <= set(plan.strategies["tp"])


def test_a_module_is_captured_with_its_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.linear(x).sum()}

    plan = api.evaluate(Model(), cluster(2), inputs={"x": torch.zeros(2, 8)}, global_batch=4)
    assert plan.model.num_parameters == 72
    assert plan.model.input_shapes == {"x": (1, 8)}
    with pytest.raises(InvalidParallelismError, match="needs example inputs"):
        api.evaluate(Model(), cluster(2), global_batch=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dp": 3}, r"dp 3 x cp 1 x tp 1 x pp 1 = 3 devices, but toys has 4"),
        ({"tp": 4, "pp": 2}, r"dp 1 x cp 1 x tp 4 x pp 2 = 8 devices"),
        ({"tp": 0}, r"tp=0 is not a count"),
        (
            {"microbatch_size": 3},
            r"a global batch of 16 does not divide into dp 4 x microbatch 3 = 12 samples; .* 12 or 24",
        ),
        ({"dp_shard": 2}, r"dp_shard=2 has nothing to shard at zero_stage=0"),
        ({"dp_shard": 3, "zero_stage": 1}, r"dp_shard=3 does not divide dp=4; choose one of 1, 2, 4"),
        ({"zero_stage": 5}, r"zero_stage=5 is unknown"),
        ({"ep": 2}, r"tower has no experts"),
        ({"num_virtual_stages": 2}, r"2 virtual stages on a rank needs a pipeline; .* num_virtual_stages=1"),
        (
            {"schedule": "DualPipeV"},
            r"DualPipeV with 2 virtual stages on a rank needs .* pp of 2 or more, or 1F1B",
        ),
        ({"pp": 4, "num_virtual_stages": 4}, r"16 pipeline stages are more than the 8 pieces"),
        (
            {"pp": 2, "num_virtual_stages": 2, "schedule": "GPipe"},
            r"GPipe has one stage per rank, got 2; use Interleaved1F1B",
        ),
        (
            {"pp": 2, "num_virtual_stages": 4, "schedule": "ZBVZeroBubble"},
            r"ZBVZeroBubble has two stages on each rank, .* num_virtual_stages=4; use 2, or leave it out",
        ),
        (
            {"pp": 4, "schedule": "DualPipeV", "microbatch_size": 4},
            r"DualPipeV on 4 ranks needs a microbatch for each of its 8 stages, got 4; use more",
        ),
        (
            {"pp": 4, "num_virtual_stages": 2, "global_batch": 14},
            r"Interleaved1F1B runs 14 microbatches on 4 ranks .* use a multiple of 4",
        ),
        (
            {"pp": 2, "schedule": "1f1b"},
            r"schedule='1f1b' is unknown; choose one of GPipe, 1F1B, .*DualPipeV",
        ),
        ({"global_batch": 0}, r"a global batch of 0 has no sample"),
    ],
)
def test_errors_show_the_numbers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParallelismError, match=message):
        evaluated(**settings)


def test_a_degree_that_divides_nothing_lists_the_sizes() -> None:
    with pytest.raises(InvalidParallelismError, match=r"tp=7 divides no dimension .* 2048, 1024, 512"):
        api.evaluate(tower(), cluster(7, per_node=7), global_batch=14, tp=7)


@cache
def gpt2() -> Capture:
    """A GPT-2 that cuts into eight stages of a layer each, its embedding small enough not to matter."""
    config = GPT2Config(n_embd=256, n_layer=8, n_head=4, vocab_size=512, n_positions=256, use_cache=False)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(batch, 256, dtype=torch.long) for name in ("input_ids", "labels")}

    return graphs.capture(model.train(), inputs, name="gpt2")


def scheduled(schedule: ScheduleName, **settings: Any) -> Plan:
    return api.evaluate(gpt2(), cluster(4), global_batch=32, pp=4, schedule=schedule, **settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_torch_has_a_price(schedule: ScheduleName) -> None:
    plan = scheduled(schedule)
    prediction = plan.prediction
    assert plan.parallelism.schedule == schedule
    assert isclose(sum(prediction.terms_s.values()), prediction.step_s)
    assert min(prediction.terms_s.values()) >= 0
    assert len(plan.stages) == (8 if schedule in V_SCHEDULES else 4)
    ranks = stage_ranks(schedule, 4, plan.parallelism.num_virtual_stages)
    held = {rank: stage.memory_bytes for rank, stage in zip(ranks, plan.stages, strict=True)}
    for rank, stage in zip(ranks, plan.stages, strict=True):
        assert stage.memory_bytes == held[rank]


def test_schedules_that_put_weight_gradients_off_have_smaller_bubbles() -> None:
    bubble_s = {
        schedule: scheduled(schedule).prediction.terms_s["pipeline_bubble"]
        for schedule in ("GPipe", "1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    }
    assert bubble_s["1F1B"] <= bubble_s["GPipe"]  # stages are not quite alike
    for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        assert bubble_s[schedule] < 0.8 * bubble_s["1F1B"]
    assert bubble_s["ZBVZeroBubble"] < bubble_s["InterleavedZeroBubble"]


def test_a_v_schedule_means_two_stages_on_a_rank() -> None:
    assert scheduled("ZBVZeroBubble").to_json() == scheduled("ZBVZeroBubble", num_virtual_stages=2).to_json()


def test_a_rank_of_a_v_holds_both_ends_and_what_they_share_once() -> None:
    """GPT-2's embedding is its head; in a loop the first and the last rank each have a copy."""
    loop, v_shaped = scheduled("1F1B"), scheduled("ZBVZeroBubble")
    tied_bytes = 4 * 512 * 256
    all_bytes = 4 * loop.model.num_parameters
    assert sum(entry(loop, "parameters", stage) for stage in range(4)) == all_bytes + tied_bytes
    assert sum(entry(v_shaped, "parameters", stage) for stage in range(4)) == all_bytes
    assert entry(v_shaped, "parameters", 0) > entry(v_shaped, "parameters", 1) + tied_bytes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_can_be_asked_for(schedule: ScheduleName) -> None:
    plan = api.plan(tower(), cluster(4), global_batch=16, pp=2, schedule=schedule)
    assert plan.parallelism.schedule == schedule
    assert len(plan.stages) == 2 * plan.parallelism.num_virtual_stages
    words = ["evaluate", "llama3-8b", "dgx-h100", "--global-batch", "64", "--pp", "4", "--schedule", schedule]
    assert build_parser().parse_args(words).schedule == schedule


class Attention(nn.Module):
    """One causal attention over a long sequence of vectors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (linear(x).view(split).transpose(1, 2) for linear in self.qkv)
        return {"loss": nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum()}


def attention(cp: int) -> Plan:
    with torch.device("meta"):
        model = Attention(512, 4)
    return api.evaluate(
        model,
        cluster(4),
        inputs=lambda batch: {"x": torch.zeros(batch, 4096, 512)},
        global_batch=4,
        dp=4 // cp,
        cp=cp,
    )


def test_context_parallelism_divides_rows_and_gathers_keys_and_values() -> None:
    """The same work, split by rows instead of samples; K and V are gathered, their gradients reduced."""
    whole, context = attention(1), attention(4)
    assert context.parallelism.num_microbatches == 4 * whole.parallelism.num_microbatches
    assert context.prediction.terms_s["compute"] == pytest.approx(
        whole.prediction.terms_s["compute"], rel=0.1
    )
    size = 4096 * 512 * 4
    moved_s = collective_s("all_gather", size) + collective_s("reduce_scatter", size)
    assert context.prediction.terms_s["tensor_parallel"] == pytest.approx(4 * 2 * moved_s, rel=0.05)
    # Keys and values, too, are kept as the shards that they were gathered from; the slice of the input is a
    # copy.
    activations = entry(whole, "activations") / 4 + size / 4
    assert entry(context, "activations") == pytest.approx(activations)
    assert entry(context, "parameters") == entry(whole, "parameters")
    assert set(context.strategies) == {"cp"}


def test_a_context_axis_that_divides_no_sequence_says_who_reads_how_many_positions() -> None:
    with pytest.raises(
        InvalidParallelismError,
        match=r"cp=3 divides the sequence of no input of tower; of positions tokens has 256 \(read by ",
    ):
        api.evaluate(tower(), cluster(3, per_node=3), global_batch=3, cp=3)


class Mixture(nn.Module):
    """A layer of experts that every row visits in a fixed order: as many rows for each."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, width, 2 * width))
        self.down = nn.Parameter(torch.empty(experts, 2 * width, width))
        self.ends = torch.arange(1, experts + 1, dtype=torch.int32)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = x.flatten(0, 1)
        ends = self.ends * (rows.shape[0] // len(self.ends))
        hidden = torch.nn.functional.grouped_mm(rows, self.up, offs=ends)
        return {"loss": torch.nn.functional.grouped_mm(hidden, self.down, offs=ends).float().sum()}


def mixture(**settings: Any) -> Plan:
    model = Mixture(8, 256).bfloat16()
    return api.evaluate(
        model,
        cluster(4),
        inputs=lambda batch: {"x": torch.zeros(batch, 1024, 256, dtype=torch.bfloat16)},
        global_batch=4,
        **settings,
    )


def test_expert_parallelism_deals_out_experts_and_exchanges_rows() -> None:
    whole, dealt = mixture(), mixture(ep=4)
    assert entry(dealt, "parameters") == pytest.approx(entry(whole, "parameters") / 4)
    assert entry(dealt, "optimizer") == pytest.approx(entry(whole, "optimizer") / 4)
    size = 1024 * 256 * 2
    exchanges_s = 4 * collective_s("all_to_all", size)  # two forward, two backward
    exchanges_s += collective_s("all_to_all", 8 * 4)  # how many rows for each of the experts
    assert dealt.prediction.terms_s["tensor_parallel"] == pytest.approx(exchanges_s)
    assert dealt.prediction.terms_s["gradient_sync"] == 0  # each expert has one owner
    assert whole.prediction.terms_s["gradient_sync"] > 0
    partly = mixture(ep=2)
    assert entry(partly, "parameters") == pytest.approx(entry(whole, "parameters") / 2)
    assert partly.prediction.terms_s["gradient_sync"] > 0


def test_experts_must_divide() -> None:
    with pytest.raises(
        InvalidParallelismError, match=r"ep=3 must divide both the 8 experts .* 4 data-parallel ranks"
    ):
        mixture(ep=3)


def test_warns_where_samples_meet() -> None:
    class Sums(nn.Module):
        """Of all samples up to each."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Sums())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.body(x).square().mean()}

    plan = api.evaluate(
        Model(), cluster(2), inputs=lambda b: {"x": torch.zeros(b, 3, 16, 16)}, global_batch=4
    )
    assert any("samples meet in body.1" in warning for warning in plan.warnings)
    assert plan.prediction.terms_s["tensor_parallel"] > 0
