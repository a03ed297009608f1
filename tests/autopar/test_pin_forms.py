"""Placements pinned for some of many equal blocks: kept where they are asked for and nowhere else, in the
plan, its report and its program."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar import api
from autopar.errors import PinConflictError
from autopar.plan import Plan
from autopar.report import explain
from autopar.request import training_policy
from autopar.search.pin_forms import told_apart
from autopar.search.pins import Pins
from autopar.search.planner import TOLERANCE, Planner
from autopar.search.shallow import shallow
from graphs import Capture, capture
from tests.autopar.programs_on_ranks import run
from tests.autopar.small_models import cluster, tower
from tests.autopar.test_search_proof import repriced
from tests.models import hugging_face, language

DEPTH = 12
LLAMA = hugging_face(
    "LlamaForCausalLM",
    "LlamaConfig",
    language,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)


@cache
def deep() -> Capture:
    return tower(width=256, depth=DEPTH, vocabulary=512, sequence=128)


def pins_of(placements: dict[str, str], **settings: Any) -> Pins:
    return Pins(placements={path: {"tp": text} for path, text in placements.items()}, **settings)


@cache
def planned(*placements: tuple[str, str]) -> Plan:
    pins = pins_of(dict(placements), tp=2)
    return api.plan(deep(), cluster(4), global_batch=16, price_pins=False, pins=pins)


def splits(plan: Plan, weight: str, depth: int = DEPTH) -> str:
    """Which dimension of a weight is split, layer by layer."""
    names = (weight.replace("*", str(index)) for index in range(depth))
    texts = (plan.placements.get(name, plan.placements.get(weight, "")) for name in names)
    return "".join(text.removeprefix("tp S(")[:1] for text in texts)


def test_blocks_of_which_pins_ask_something_else_are_of_another_form() -> None:
    pins = pins_of({"layers.[3,4].up": "Shard(1)", "layers.4": "!Replicate"})
    found = told_apart(deep(), pins)
    assert [block.form for block in found.graph.blocks] == [0, 0, 0, 1, 2, *[0] * 7]
    assert told_apart(found, pins) is found
    assert told_apart(found, Pins()).graph.blocks == deep().graph.blocks
    assert told_apart(deep(), pins_of({"layers.*.up": "Shard(1)"})) is deep()
    alike = told_apart(deep(), pins_of({"layers.3.up": "Shard(1)", "layers.8.up": "Shard(1)"}))
    assert [block.form for block in alike.graph.blocks] == [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    every = told_apart(deep(), pins_of({f"layers.{index}.up": "Shard(1)" for index in range(DEPTH)}))
    assert every.graph.blocks == deep().graph.blocks
    # A run of equal blocks is still made shallow: of the last seven three stay.
    assert len(shallow(found).capture.graph.blocks) == 3 + 1 + 1 + 3


@pytest.mark.parametrize(
    ("placements", "up", "down"),
    [
        ({"layers.3.up": "Shard(1)"}, "000100000000", "111111111111"),
        ({"layers.0.up": "!Shard(0)", "layers.11.down": "S(0)"}, "100000000000", "111111111110"),
        ({"layers.[2-6].up": "Shard(1)"}, "001111100000", "111111111111"),
        ({"layers.*.up": "Shard(1)", "layers.5.up": "Shard(0)"}, "111110111111", "111111111111"),
        ({"layers.[0,2,4,6,8,10].up.weight": "h"}, "101010101010", "111111111111"),
    ],
    ids=str,
)
def test_some_blocks_are_as_pinned_and_the_others_as_they_were(
    placements: dict[str, str], up: str, down: str
) -> None:
    plan, free = planned(*placements.items()), planned()
    weights = "layers.*.up.weight", "layers.*.down.weight"
    assert [splits(free, weight) for weight in weights] == ["0" * DEPTH, "1" * DEPTH]
    assert [splits(plan, weight) for weight in weights] == [up, down]
    assert plan.prediction.step_s > free.prediction.step_s
    assert plan.certificate.gap <= TOLERANCE
    fresh = tower.__wrapped__(256, DEPTH, 512, 128)
    again = repriced(Plan.model_validate_json(plan.to_json()), fresh, cluster(4))
    assert again.step_s == pytest.approx(plan.certificate.objective_s, rel=1e-9)
    assert again.peak_memory_bytes == pytest.approx(plan.prediction.peak_memory_bytes, rel=1e-6)


def test_to_ask_for_what_is_done_anyway_costs_nothing() -> None:
    plan = planned(("layers.3.up", "Shard(0)"), ("layers.7.down", "!Shard(0)"))
    assert plan.prediction.step_s == pytest.approx(planned().prediction.step_s, rel=1e-9)


def test_the_shallow_model_finds_what_the_whole_one_does() -> None:
    pins = pins_of({"layers.[3,8].up": "Shard(1)", "head": "Shard(1)"}, tp=2)
    policy = training_policy(deep().graph)
    steps_s = []
    for shorten in (True, False):
        planner = Planner(deep(), cluster(4), policy, global_batch=16, pins=pins, shorten=shorten)
        best = planner.search().best
        assert best is not None
        steps_s.append(planner.finish(best).evaluated.step_s)
    assert steps_s[0] == pytest.approx(steps_s[1], rel=1e-6)


def test_what_it_costs_is_told_and_a_planner_under_other_pins_forgets_the_form() -> None:
    pins = pins_of({"layers.3.up": "Shard(1)"}, tp=2)
    plan = api.plan(deep(), cluster(4), global_batch=16, pins=pins)
    (cost,) = (each for each in plan.pin_costs if each.pin == "layers.3.up:tp=Shard(1)")
    assert cost.step_s == pytest.approx(planned().prediction.step_s, rel=TOLERANCE)
    assert cost.cost_s > 0
    planner = Planner(deep(), cluster(4), training_policy(deep().graph), global_batch=16, pins=pins)
    assert {block.form for block in planner.capture.graph.blocks} == {0, 1}
    assert {block.form for block in planner.under(Pins()).programs.shallow.capture.graph.blocks} == {0}


def test_the_report_names_the_blocks_that_differ() -> None:
    told = explain(planned(("layers.[3-4].up", "Shard(1)")))
    lines = [line.strip() for line in told.splitlines()]
    others = lines.index("layers.0-2, layers.5-11")
    assert lines[others + 1].startswith("up.weight  tp S(0")
    assert lines[lines.index("layers.3-4") + 1].endswith("tp S(1)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers.3.up": "q"}, r"with tp=2 and layers.3.up:tp=q: .*leave no strategy for .* of layers.3.up"),
        (
            {"layers.13.up": "Shard(1)"},
            r"layers.13.up:tp=Shard\(1\): matches no module or parameter of tower",
        ),
        ({"layers.3.up": "Shard(2)"}, r"none of its parameters has that dimension"),
        (
            {"layers.3.up": "!Shard(0)", "layers.[2-3].up": "!Shard(1)"},
            r"with tp=2 and layers.3.up:tp=!Shard\(0\) and layers.\[2-3\].up:tp=!Shard\(1\): ",
        ),
    ],
)
def test_what_is_impossible_for_one_block_says_with_what_it_conflicts(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(PinConflictError, match=message):
        planned(*settings.items())


@pytest.mark.distributed
@pytest.mark.parametrize("degrees", [{"tp": 2, "pp": 2}, {"tp": 2, "dp": 2, "zero_stage": 3}], ids=str)
def test_programs_do_what_the_model_does(degrees: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LLAMA.build().to(torch.float64)
    pins = pins_of({"model.layers.2.mlp.up_proj": "Shard(1)"})
    num_ranks = degrees["tp"] * degrees.get("pp", 1) * degrees.get("dp", 1)
    captured = capture(model, language, name="llama")
    plan = autopar.plan(
        captured,
        f"local-cpu*{num_ranks}",
        global_batch=8,
        price_pins=False,
        pins=Pins.merged(pins, **degrees),
    )
    assert splits(plan, "model.layers.*.mlp.up_proj.weight", 4) == "0010"
    program = autopar.compile(captured, plan)
    program.save(tmp_path)
    autopar.save_reference(program, model, language, tmp_path)
    assert run([tmp_path], num_ranks) == {str(tmp_path): "equal"}
