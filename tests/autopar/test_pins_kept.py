"""Pins from request to plan: every kind is kept, however it is written; what it costs; what is impossible."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import autopar
from autopar import api
from autopar.cli import main
from autopar.cli.parser import build_parser
from autopar.cli.pin_options import pins_of
from autopar.errors import InfeasibleError, PinConflictError
from autopar.plan import Parallelism, Plan
from autopar.request import training_policy
from autopar.search.pin_costs import PinPricer, pin_costs
from autopar.search.pins import Pins
from autopar.search.planner import TOLERANCE, Planner
from autopar.search.space import VIRTUAL_STAGES
from graphs import Capture
from tests.autopar.small_models import cluster, tower


@cache
def small() -> Capture:
    return tower(width=256, depth=6, vocabulary=512, sequence=128)


def planned(pins: Any = None, *, price_pins: bool = False, memory_bytes: float = 16e9, **others: Any) -> Plan:
    settings = {"global_batch": 16, "price_pins": price_pins, **others}
    return api.plan(small(), cluster(4, memory_bytes), pins=pins, **settings)


@cache
def free(space: str = "programs") -> Plan:
    return planned(space=space)


# --- what a plan shows of a pin -----------------------------------------------------------------------------


def has(**settings: object) -> Callable[[Plan], bool]:
    return lambda plan: all(getattr(plan.parallelism, name) == value for name, value in settings.items())


def begins(*modules: str) -> Callable[[Plan], bool]:
    """Stages begin with these modules."""

    def holds(plan: Plan) -> bool:
        starts = [path.split("-")[0] for stage in plan.stages for path in stage.modules[:1]]
        return set(modules) <= set(starts)

    return holds


def computes_again(**modes: str) -> Callable[[Plan], bool]:
    """The numbers of the layers that do something again, by mode; no others do."""

    def holds(plan: Plan) -> bool:
        found = {
            each.mode: "".join(path.split(".")[-1] for path in each.blocks) for each in plan.recomputation
        }
        return found == modes

    return holds


def lies(name: str, placement: str) -> Callable[[Plan], bool]:
    return lambda plan: plan.placements[name] == placement


class Case(NamedTuple):
    """A pin in its three writings, and how its plan is known; `others` are settings to plan with."""

    words: str
    yaml: str
    settings: dict[str, Any]
    holds: Callable[[Plan], bool]
    others: dict[str, Any] = {}  # noqa: RUF012  # never written


WHOLE = {"space": "whole"}

CASES = [
    Case("--tp 2", "tp: 2", {"tp": 2}, has(tp=2)),
    Case("--pin tp=2", "tp: 2", {"tp": 2}, has(tp=2)),
    Case("--pp 2", "pp: 2", {"pp": 2}, has(pp=2)),
    Case("--dp 2", "dp: 2", {"dp": 2}, has(dp=2)),
    Case("--cp 2", "cp: 2", {"cp": 2}, has(cp=2), WHOLE),
    Case("--dp-shard 2", "dp_shard: 2", {"dp_shard": 2}, has(dp_shard=2)),
    Case("--zero-stage 3", "zero_stage: 3", {"zero_stage": 3}, has(zero_stage=3)),
    Case("--microbatch-size 2", "microbatch_size: 2", {"microbatch_size": 2}, has(microbatch_size=2)),
    Case(
        "--pp 2 --schedule GPipe",
        "{pp: 2, schedule: GPipe}",
        {"pp": 2, "schedule": "GPipe"},
        has(pp=2, schedule="GPipe"),
    ),
    Case(
        "--pp 2 --schedule ZBVZeroBubble",
        "{pp: 2, schedule: ZBVZeroBubble}",
        {"pp": 2, "schedule": "ZBVZeroBubble"},
        has(pp=2, schedule="ZBVZeroBubble", num_virtual_stages=2),
        WHOLE,
    ),
    Case(
        "--pp 2 --num-virtual-stages 3",
        "{pp: 2, num-virtual-stages: 3}",
        {"pp": 2, "num_virtual_stages": 3},
        has(pp=2, num_virtual_stages=3),
    ),
    Case(
        "--tp 2 --no-sequence-parallel",
        "{tp: 2, sequence_parallel: false}",
        {"tp": 2, "sequence_parallel": False},
        has(tp=2, sequence_parallel=False),
    ),
    Case(
        "--tp 2 --no-sequence-parallel --pin embed:tp=Replicate",
        "{tp: 2, sequence_parallel: false, placements: {embed: {tp: Replicate}}}",
        {"tp": 2, "sequence_parallel": False, "placements": {"embed": {"tp": "Replicate"}}},
        lambda plan: (
            plan.placements["embed.weight"].startswith("tp R") and has(sequence_parallel=False)(plan)
        ),
    ),
    Case(
        "--recompute selective",
        "recompute: selective",
        {"recompute": "selective"},
        has(recompute="selective"),
    ),
    Case(
        "--mesh 2x2 --forbid dp=4 --forbid pp=2",
        "{mesh: 2x2, forbid: {dp: 4, pp: 2}}",
        {"mesh": (2, 2), "forbid": {"dp": [4], "pp": [2]}},
        lambda plan: (plan.parallelism.dp, plan.parallelism.pp) not in ((4, 1), (2, 2)),
    ),
    Case(
        "--forbid dp=4 --forbid tp=2",
        "forbid: {dp: 4, tp: [2]}",
        {"forbid": {"dp": {4}, "tp": {2}}},
        lambda plan: plan.parallelism.dp != 4 and plan.parallelism.tp != 2,
    ),
    Case(
        "--tp 2 --pin head:tp=Shard(1)",
        "{tp: 2, placements: {head: {tp: Shard(1)}}}",
        {"tp": 2, "placements": {"head": {"tp": "Shard(1)"}}},
        lies("head.weight", "tp S(1)"),
    ),
    Case(
        "--tp 2 --pin layers.*.down:tp=!Shard(1)",
        '{tp: 2, placements: {layers.*.down: {tp: "!Shard(1)"}}}',
        {"tp": 2, "placements": {"layers.*.down": {"tp": "!Shard(1)"}}},
        lies("layers.*.down.weight", "tp S(0)"),
    ),
    Case(
        "--recompute-module layers.[0-2]=full",
        'recompute_modules: {"layers.[0-2]": full}',
        {"recompute_modules": {"layers.[0-2]": "full"}},
        computes_again(full="012"),
    ),
    Case(
        "--recompute full --recompute-module layers.4=none",
        "{recompute: full, recompute_modules: {layers.4: none}}",
        {"recompute": "full", "recompute_modules": {"layers.4": "none"}},
        computes_again(full="01235"),
    ),
    Case(
        "--recompute-module layers.[3-4]=!none",
        'recompute_modules: {"layers.[3-4]": "!none"}',
        {"recompute_modules": {"layers.[3-4]": "!none"}},
        lambda plan: (
            {path for each in plan.recomputation for path in each.blocks} == {"layers.3", "layers.4"}
        ),
    ),
    Case(
        "--forbid recompute=none --forbid recompute=selective",
        "forbid: {recompute: [none, selective]}",
        {"forbid": {"recompute": ["none", "selective"]}},
        lambda plan: (
            sum(len(each.blocks) for each in plan.recomputation if each.mode in ("full", "kept")) == 6
        ),
    ),
    Case(
        "--pp 2 --cut-before layers.1",
        "{pp: 2, cut_before: layers.1}",
        {"pp": 2, "cut_before": ("layers.1",)},
        begins("layers.1"),
    ),
    Case(
        "--pp 2 --num-virtual-stages 2 --cut-before layers.5 --cut-before head",
        "{pp: 2, num_virtual_stages: 2, cut_before: [layers.5, head]}",
        {"pp": 2, "num_virtual_stages": 2, "cut_before": ("layers.5", "head")},
        begins("layers.5", "head"),
    ),
    Case("--cut-before layers.3", "cut_before: layers.3", {"cut_before": ("layers.3",)}, begins("layers.3")),
    Case(
        "--pp 4 --keep-together embed+layers.3",
        "{pp: 4, keep_together: [embed+layers.3]}",
        {"pp": 4, "keep_together": ("embed+layers.3",)},
        lambda plan: plan.stages[0].modules[-1] == "layers.0-3" and len(plan.stages) == 4,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_every_kind_of_pin_is_kept_however_it_is_written(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "pins.yaml"
    path.write_text(case.yaml)
    options = build_parser().parse_args(["plan", "m", "c", "--global-batch", "8", *case.words.split()])
    pins = Pins(**case.settings)
    assert Pins.load(path) == pins_of(options) == pins
    plan = planned(pins, **case.others)
    assert case.holds(plan), plan.explain()
    assert plan.prediction.step_s >= free(**case.others).prediction.step_s * (1 - TOLERANCE)
    again = planned(all_of(plan, pins), **case.others)
    assert again.prediction.step_s == pytest.approx(plan.prediction.step_s, rel=1e-9)
    assert again.stages == plan.stages


def all_of(plan: Plan, pins: Pins) -> Pins:
    """Everything that a plan has decided but strategies, as pins."""
    p = plan.parallelism
    modes = {path: each.mode for each in plan.recomputation for path in each.blocks if each.mode != "kept"}
    starts = [path.split("-")[0] for stage in plan.stages[1:] for path in stage.modules[:1]]
    return Pins.merged(
        pins,
        **{name: getattr(p, name) for name in ("tp", "pp", "cp", "dp", "dp_shard", "microbatch_size",
                                               "zero_stage", "num_virtual_stages", "sequence_parallel")},
        schedule=p.schedule if p.pp > 1 else None,
        recompute_modules=modes,
        cut_before=starts,
    )  # fmt: skip


def test_the_command_line_plans_with_pins_and_says_what_they_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "mlp.py"
    model.write_text(
        "import torch\nfrom tests.models import MLP\n\n\ndef build():\n"
        "    return MLP(depth=4), {name: torch.randn(4, 32) for name in ('x', 'target')}\n"
    )
    (tmp_path / "pins.yaml").write_text("zero_stage: 3\npp: 2")
    words = ["plan", f"{model}:build", "local-cpu*4", "--global-batch", "8", "-q"]
    pins = [
        "--pins",
        str(tmp_path / "pins.yaml"),
        "--zero-stage",
        "1",
        "--forbid",
        "schedule=Interleaved1F1B",
    ]
    saved = tmp_path / "plan.json"
    assert main([*words, *pins, "-o", str(saved)]) == 0
    told = capsys.readouterr().out
    plan = Plan.load(saved)
    assert (plan.parallelism.zero_stage, plan.parallelism.pp) == (1, 2)
    assert [each.pin for each in plan.pin_costs] == [
        "pp=2",
        "zero_stage=1",
        "forbid schedule=Interleaved1F1B",
    ]
    assert "what each pin costs a step, the others kept" in told
    assert main([*words, *pins, "--no-price-pins", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["pin_costs"] == []


# --- what pins cost -----------------------------------------------------------------------------------------


def test_a_pin_without_which_the_others_contradict_each_other_costs_nothing() -> None:
    pins = Pins(recompute="full", recompute_modules={"layers.3": "selective", "layers.[3]": "!full"})
    plan = planned(pins, price_pins=True)
    costs = {each.pin: each.cost_s for each in plan.pin_costs}
    assert costs["recompute layers.3=selective"] == 0.0
    assert costs["recompute=full"] > 0.0


def test_what_a_pin_costs_is_what_a_search_without_it_finds() -> None:
    pins = Pins(tp=2, recompute="full", cut_before=("layers.0",), forbid={"microbatch_size": {2}})
    plan = planned(pins, price_pins=True)
    assert [each.pin for each in plan.pin_costs] == [text for text, _ in pins.parts()]
    for each, (_, without) in zip(plan.pin_costs, pins.parts(), strict=True):
        found_s = planned(without).prediction.step_s
        assert each.step_s + each.cost_s == pytest.approx(plan.prediction.step_s)
        assert each.step_s == pytest.approx(found_s, rel=TOLERANCE), each.pin
    assert max(each.cost_s for each in plan.pin_costs) > 0
    assert "tp=2" in plan.explain()
    assert free().pin_costs == ()


def test_pins_whose_price_is_too_much_work_are_named() -> None:
    planner = Planner(
        small(), cluster(4), training_policy(small().graph), global_batch=16, pins=Pins(pp=2, tp=2)
    )
    best = planner.search().best
    assert best is not None
    costs, unpriced = PinPricer(planner, planner.pins, best, work=3).costs()
    assert (costs, unpriced) == ((), ("tp=2", "pp=2"))
    costs, unpriced = PinPricer(planner, planner.pins, best).costs()
    assert ([each.pin for each in costs], unpriced) == (["tp=2", "pp=2"], ())


def test_under_other_pins_a_planner_finds_what_a_new_one_finds() -> None:
    policy = training_policy(small().graph)
    first = Planner(small(), cluster(4), policy, global_batch=16, pins=Pins(tp=2, recompute="full"))
    first.search()
    for pins in (
        Pins(pp=2),
        Pins(tp=2, placements={"head": {"tp": "Shard(1)"}}),
        Pins(tp=2, sequence_parallel=True),
        Pins(cut_before=("layers.1",)),
    ):
        shared, fresh = first.under(pins), Planner(small(), cluster(4), policy, global_batch=16, pins=pins)
        one, other = shared.search().best, fresh.search().best
        assert one is not None
        assert other is not None
        assert (one.parallelism, one.evaluated.cuts) == (other.parallelism, other.evaluated.cuts)
        assert one.evaluated.step_s == pytest.approx(other.evaluated.step_s)
    assert first.pins == Pins(tp=2, recompute="full")


def test_plain_data_parallelism_is_shown_beside_whatever_is_pinned() -> None:
    pinned = planned(Pins(cut_before=("layers.1",), recompute="full", zero_stage=1))
    step_s = {each.label: each.step_s for each in free().alternatives}
    assert {each.label: each.step_s for each in pinned.alternatives if each.label in ("DDP", "FSDP")} == {
        label: step_s[label] for label in ("DDP", "FSDP")
    }


# --- what is impossible -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cut_before": ("layer.3",)}, r"layer.3 matches no module of tower; did you mean 'layers.3'"),
        ({"dp": 4, "tp": 4}, r"dp=4 x? ?.*= 16 does not divide 4 devices|tp=4 x dp=4 = 16"),
        ({"microbatch_size": 5, "zero_stage": 1}, r"microbatch_size=5 does not divide a global batch of 16"),
        (
            {"microbatch_size": 8, "forbid": {"dp": {1, 2}}, "zero_stage": 1},
            r"global batch of 16 with microbatch_size=8 and forbid dp=1 and forbid dp=2: the product of",
        ),
        ({"zero_stage": 3, "tp": 4}, r"with tp=4 and zero_stage=3: "),
        (
            {"tp": 2, "placements": {"head": {"tp": "q"}}},
            r"with tp=2 and head:tp=q: .*leave no strategy for .* of head",
        ),
        (
            {
                "pp": 2,
                "forbid": {"schedule": set(VIRTUAL_STAGES) - {"1F1B"}},
                "cut_before": ("layers.1", "layers.2"),
                "tp": 2,
            },
            r"with pp=2 and .*forbid schedule=Interleaved1F1B .*cut before layers.1 and cut before layers.2:",
        ),
        ({"ep": 2}, r"ep=2, but tower has no experts"),
        (
            {"tp": 4, "mesh": (2, 2), "dp": 2},
            r"no way to give the axes of the mesh 2x2 their roles has dp=2, tp=4",
        ),
    ],
)
def test_what_is_impossible_says_with_what_it_conflicts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PinConflictError, match=message):
        planned(Pins(**settings))


def test_degrees_at_which_a_placement_is_impossible_are_not_tried() -> None:
    capture = tower(width=256, depth=6, vocabulary=514, sequence=128)
    planner = Planner(
        capture, cluster(4), training_policy(capture.graph), global_batch=16,
        pins=Pins(placements={"head": {"tp": "Shard(0)"}}),
    )  # fmt: skip
    assert {layout.tp for layout in planner.layouts} == {1, 2}
    assert {p.tp for p in planner.under(Pins(placements={"head": {"tp": "q"}})).candidates()} == {1}


def test_without_a_pipeline_long_enough_a_layout_is_none() -> None:
    planner = Planner(
        small(), cluster(4), training_policy(small().graph), global_batch=16,
        pins=Pins(cut_before=("layers.1", "layers.2")),
    )  # fmt: skip
    assert all(p.pp * p.num_virtual_stages >= 3 for p in planner.candidates())
    assert any(p.pp == 2 for p in planner.candidates())


def test_where_one_pin_is_not_to_blame_all_are() -> None:
    pins = Pins(dp=4, tp=1, pp=1, zero_stage=0, recompute="none", microbatch_size=4)
    with pytest.raises(InfeasibleError) as caught:
        planned(pins, memory_bytes=30e6)
    (advice,) = (line for line in caught.value.relaxations if line.startswith("without"))
    assert advice.startswith("without any pin, ")


def test_pins_are_part_of_the_package() -> None:
    assert autopar.Pins is Pins
    assert not Pins()
    assert pin_costs(lambda left: 1.0, Pins(), 1.0) == ((), ())
    assert Pins(tp=2).admits(Parallelism(tp=2))
