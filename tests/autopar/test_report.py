"""The report: the figures it works out, and the text and JSON that carry them."""

from __future__ import annotations

import json

import pytest

from autopar.errors import AutoparError
from autopar.plan import Parallelism, Plan
from autopar.report import explain, units, view
from autopar.report.sharding import group_placements

GB = 1e9


def test_verdict_comes_first_with_all_its_figures(plan: Plan) -> None:
    head = explain(plan).split("\n\n")[0]
    for expected in (
        "verdict: optimal; at most 5.0 % from the optimum",
        "2.00 s for 64 samples",
        "131,072 tokens/s",
        "50.0 GB of 80.0 GB (62.5 %)",
        "300 ms, 15.0 % of the step",
        "0.781 = T_64 / (64 T_1)",
    ):
        assert expected in head


def test_cost_terms_add_up_to_the_step(plan: Plan) -> None:
    report = view(plan)
    assert sum(term.seconds for term in report.terms) == pytest.approx(plan.prediction.step_s)
    assert sum(term.share for term in report.terms) == pytest.approx(1)


def test_exposed_communication_is_what_is_neither_work_nor_waiting(plan: Plan) -> None:
    assert view(plan).verdict.exposed_communication_s == pytest.approx(0.2 + 0.1)


def test_scale_factor_is_speedup_over_devices(plan: Plan) -> None:
    assert view(plan).verdict.scale_factor == pytest.approx(100.0 / (64 * 2.0))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_training_time_of_the_formula_agrees_with_the_step_where_a_step_costs_6tp(
    plan: Plan, recompute: str
) -> None:
    """8TP/(nX) counts recomputed FLOPs in X, 6TP/(nX) does not: for one plan both are the same time."""
    degrees = plan.parallelism.model_dump() | {"recompute": recompute}
    plan = plan.model_copy(update={"parallelism": Parallelism.model_validate(degrees)})
    training = view(plan, 1e12).training
    assert training is not None
    assert training.formula == {"none": "6TP/(nX)", "full": "8TP/(nX)"}[recompute]
    assert training.predicted_s == pytest.approx(1e12 / 131_072)
    assert training.formula_s == pytest.approx(training.predicted_s, rel=1e-3)


def test_price_is_devices_times_hours(plan: Plan) -> None:
    cluster = plan.cluster.model_copy(update={"price_usd_per_device_hour": 2.0})
    training = view(plan.model_copy(update={"cluster": cluster}), 131_072 * 3600).training
    assert training is not None
    assert training.price_usd == pytest.approx(2.0 * 64)


@pytest.mark.parametrize("tokens", [0, -1.0, float("nan")])
def test_a_token_budget_is_positive(plan: Plan, tokens: float) -> None:
    with pytest.raises(AutoparError, match="token budget is a positive number"):
        explain(plan, tokens)


def test_mesh_axes_say_how_far_apart_their_ranks_are(plan: Plan) -> None:
    axes = {axis.name: (axis.size, axis.stride, axis.within_node) for axis in view(plan).axes}
    assert axes == {"pp": (2, 32, False), "dp_shard": (4, 8, False), "tp": (8, 1, True)}


def test_a_plan_that_does_not_fit_says_by_how_much_first(plan: Plan) -> None:
    prediction = plan.prediction.model_copy(update={"peak_memory_bytes": 92.5 * GB})
    lines = explain(plan.model_copy(update={"prediction": prediction})).splitlines()
    assert lines[1] == "verdict: does not fit: 12.5 GB over the memory of a device"


def test_runners_up_stand_with_their_reason(plan: Plan) -> None:
    text = explain(plan)
    assert "out of memory by 60.0 GB" in text
    assert "1.25x slower: parameter gathers +0.6 s" in text
    assert [other.label for other in view(plan).runners_up] == ["DDP", "FSDP"]


def test_ops_split_alike_are_counted_together(plan: Plan) -> None:
    strategies = {"tp": {"linear": "o", "linear_1": "o", "linear_2": "h", "rms_norm_1": "s"}}
    operations = view(plan.model_copy(update={"strategies": strategies})).operations
    assert [(op.kind, op.count, dict(op.strategies)["tp"]) for op in operations] == [
        ("linear", 2, "o"),
        ("linear", 1, "h"),
        ("rms_norm", 1, "s"),
    ]


def test_no_line_is_wider_than_a_hundred_columns(plan: Plan) -> None:
    long = plan.model_copy(
        update={
            "warnings": ("no sharding rule for mylib.op, so it is replicated " * 4,),
            "alternatives": tuple(
                a.model_copy(update={"reason": "because " * 30}) for a in plan.alternatives
            ),
        }
    )
    assert max(map(len, explain(long, 1e13).splitlines())) <= 100


def test_json_has_the_same_figures(plan: Plan) -> None:
    report = json.loads(explain(plan, 1e12, "json"))
    assert report["verdict"]["step_s"] == 2.0
    assert report["training"]["formula"] == "8TP/(nX)"
    assert sum(term["seconds"] for term in report["terms"]) == pytest.approx(2.0)
    assert report["runners_up"][0]["step_s"] is None


def test_unknown_format_names_the_known_ones(plan: Plan) -> None:
    with pytest.raises(AutoparError, match="there are text, json"):
        explain(plan, format="html")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (8.75e-5, "87.5 us"),
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (119, "119 s"),
        (120, "2.00 min"),
        (7200, "2.00 h"),
        (86400 * 34, "34.0 days"),
    ],
)
def test_durations_read_in_the_unit_people_use(value: float, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(8_030_261_248, "8.03 B"), (1e12, "1.00 T"), (999, "999"), (1234, "1.23 k"), (0.05, "0.05")],
)
def test_counts_keep_three_digits(value: float, text: str) -> None:
    assert units.count(value) == text


def test_like_placements_of_all_instances_of_a_block_are_one_line() -> None:
    """Parameters are grouped by block; instances that differ are named."""
    placements = {f"layers.{index}.mlp.up.weight": "tp: S(0)" for index in range(8)}
    placements |= {f"layers.{index}.norm.weight": "S(0)" if index == 1 else "R" for index in range(8)}
    placements |= {"head.weight": "tp: S(0)"}
    blocks = {
        block.path: {p.parameter: p.placement for p in block.placements}
        for block in group_placements(placements)
    }
    assert blocks == {
        "layers.*": {"mlp.up.weight": "tp: S(0)"},
        "layers.0, layers.2-7": {"norm.weight": "R"},
        "layers.1": {"norm.weight": "S(0)"},
        "head": {"weight": "tp: S(0)"},
    }
