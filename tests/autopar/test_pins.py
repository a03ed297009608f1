"""Pins: what they leave, against trying everything; the three ways to write them; what they conflict with."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.parser import build_parser
from autopar.cli.pin_options import pins_of
from autopar.errors import PinConflictError
from autopar.plan import Parallelism, Plan
from autopar.report import explain
from autopar.search.axis_problem import AxisProblem
from autopar.search.block_ilp import BlockIlp
from autopar.search.given import GivenPrograms
from autopar.search.module_patterns import covering, covers
from autopar.search.pin_conflicts import check_pins, dividing_degrees, minimal_conflict
from autopar.search.pin_costs import pin_costs
from autopar.search.pin_stages import named_units, num_stages
from autopar.search.pinned import BytesMoved
from autopar.search.pins import Pins
from autopar.search.shallow import Shallow
from autopar.search.space import Degrees, divisors, layouts, ways
from costmodel import software
from tests.autopar.small_models import cluster, tower

ROOT = Path(__file__).parents[2]
DEVICES, BATCH = 16, 32


def candidates(pins: Pins) -> list[Parallelism]:
    machine = cluster(DEVICES)
    degrees = Degrees((1, 2, 4), (1, 2), (1, 2), 8)
    found = layouts(machine, BATCH, degrees, pins)
    return [p for layout in found for p in ways(layout, machine, degrees, pins)]


@cache
def all_there_is() -> frozenset[Parallelism]:
    """The whole space, with experts that are dealt out beside a tensor axis, which some pin must ask for."""
    return frozenset(p for ep in (1, 2) for p in candidates(Pins(ep=ep)))


def is_tried(p: Parallelism, pins: Pins) -> bool:
    return p.tp == 1 or p.ep == 1 or pins.tp is not None or pins.ep is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"tp": 2},
        {"dp": 4, "cp": 2},
        {"zero_stage": 3, "dp_shard": 4},
        {"pp": 2, "schedule": "ZBVZeroBubble"},
        {"ep": 2, "microbatch_size": 2},
        {"mesh": (4, 4)},
        {"mesh": (2, 8), "forbid": {"tp": [1], "zero_stage": [0, 3]}},
        {"forbid": {"schedule": ["1F1B"], "dp_replicate": [1], "num_virtual_stages": [3]}},
    ],
)
def test_the_space_under_pins_is_what_they_admit_of_the_whole_space(settings: dict[str, Any]) -> None:
    pins = Pins(**settings)
    found = candidates(pins)
    assert found
    assert len(found) == len(set(found))
    assert set(found) == {p for p in all_there_is() if pins.admits(p) and is_tried(p, pins)}


def test_what_the_space_leaves_open_is_as_pinned() -> None:
    found = candidates(Pins(sequence_parallel=False, offload="optimizer", tp=4))
    assert found
    assert {(p.tp, p.sequence_parallel, p.offload) for p in found} == {(4, False, "optimizer")}


@pytest.mark.parametrize("mesh", [(16,), (4, 4), (2, 2, 4), (8, 2)])
def test_a_mesh_admits_what_some_way_to_give_its_axes_roles_has(mesh: tuple[int, ...]) -> None:
    roles = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
    possible = {
        tuple(prod(s for s, role in zip(mesh, given, strict=True) if role == name) for name in roles)
        for given in product(roles, repeat=len(mesh))
    }
    pins = Pins(mesh=mesh)
    for degrees in product(divisors(16), repeat=5):
        if prod(degrees) == 16:
            p = Parallelism(**dict(zip(roles, degrees, strict=True)))  # type: ignore[arg-type]  # degrees by name
            assert pins.admits(p) is (degrees in possible), str(p)
            assert pins.admits(p) <= (p.dp in pins.values("dp", [p.dp]))


def test_without_a_pipeline_any_schedule_holds_and_without_a_tensor_axis_any_sequence_parallelism() -> None:
    pins = Pins(schedule="ZBVZeroBubble", sequence_parallel=True, forbid={"schedule": ["1F1B"]})
    assert pins.admits(Parallelism())
    assert not pins.admits(Parallelism(pp=2))
    assert not pins.admits(Parallelism(tp=2, sequence_parallel=False))


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [
        ("layers.3", "layers.3.mlp.up.weight", "layers.3"),
        ("layers.3", "layers.31", None),
        ("layers.*.up", "layers.3.mlp.up", None),
        ("**.up", "layers.3.mlp.up", "layers.3.mlp.up"),
        ("layers.[0-2,5]", "layers.5", "layers.5"),
        ("layers.[0-12]", "layers.11.mlp", "layers.11"),
        ("layers.[0-2,5]", "layers.3", None),
        ("h.*.c_*", "h.7.c_attn.bias", "h.7.c_attn"),
    ],
)
def test_patterns_cover_modules_and_what_is_in_them(pattern: str, path: str, found: str | None) -> None:
    assert covering(pattern, path) == found
    assert covers(pattern, path) is (found is not None)


def solved(placements: dict[str, dict[str, str]], size: int = 2) -> tuple[dict[str, str], float]:
    """How parameters lie on a tensor axis in the best solution, and what it costs."""
    graph = tower().at(4)
    rule = Pins(placements=placements).rule(graph, "tp")
    solution = BlockIlp(AxisProblem(graph, "tp", size, BytesMoved(size), None, rule)).solve()
    sources = solution.assignment.sources
    return {p.name: str(sources[p.tensor].value) for p in graph.parameters}, solution.objective_s


@pytest.mark.parametrize(
    ("path", "placement", "parameter", "expected"),
    [
        ("layers.*.down", "Shard(0)", "layers.3.down.weight", "S(0)"),
        ("layers.*.down", "!S(1)", "layers.0.down.weight", "S(0)"),
        ("layers.*.down.weight", "o", "layers.0.down.weight", "S(0)"),
        ("head", "Shard(1)", "head.weight", "S(1)"),
        ("embed", "Shard(1)", "embed.weight", "S(1)"),
        ("embed", "Replicate", "embed.weight", "R"),
    ],
)
def test_parameters_lie_as_pinned(path: str, placement: str, parameter: str, expected: str) -> None:
    free, best_s = solved({})
    found, cost_s = solved({path: {"tp": placement}})
    assert found[parameter] == expected
    assert cost_s >= best_s * (1 - 1e-9)
    assert (cost_s == pytest.approx(best_s)) or free[parameter] != expected


def test_of_patterns_the_last_counts_and_what_is_forbidden_stays_so() -> None:
    assert solved({"head": {"tp": "S(1)"}, "head.weight": {"tp": "S(0)"}})[0]["head.weight"] == "S(0)"
    with pytest.raises(PinConflictError, match="leave no strategy"):
        solved({"head": {"tp": "!S(0)"}, "head.weight": {"tp": "S(0)"}})
    pins = Pins(recompute="none", recompute_modules={"layers.*": "full", "layers.[4-5]": "selective"})
    assert [pins.recompute_of(path) for path in ("layers.3", "layers.4", "mixer.0")] == [
        "full",
        "selective",
        "none",
    ]


def test_blocks_are_left_what_is_not_forbidden() -> None:
    pins = Pins(recompute_modules={"layers.0": "full"}, forbid={"recompute": ["none"]})
    assert pins.recompute_values("layers.0", ("none", "keep-1", "full")) == ("full",)
    assert pins.recompute_values("layers.1", ("none", "keep-1", "full")) == ("keep-1", "full")
    pins = Pins(recompute_modules={"layers.*": "!full", "layers.1": "!none", "layers.2": "full"})
    assert pins.recompute_values("layers.0", ("none", "keep-1", "full")) == ("none", "keep-1")
    assert pins.recompute_values("layers.1", ("none", "keep-1", "full")) == ("keep-1",)
    assert pins.recompute_values("layers.2", ("none", "keep-1", "full")) == ()


def test_named_units_are_those_of_the_chain() -> None:
    programs = GivenPrograms(Shallow(tower(), {}))
    chain = programs.chain(Parallelism(microbatch_size=2), software("torch-eager"))
    assert [unit.modules for unit in named_units(tower().graph)] == [unit.modules for unit in chain.units]


@pytest.mark.parametrize(
    ("pins", "must", "may"),
    [
        ({}, (), (1, 2, 3, 4, 5, 6, 7)),
        ({"cut_before": ("layers.2", "head")}, (3, 7), (1, 2, 3, 4, 5, 6, 7)),
        ({"cut_before": ("layers.[2,4]", "embed")}, (3, 5), (1, 2, 3, 4, 5, 6, 7)),
        ({"keep_together": ("layers.[1-3]",)}, (), (1, 2, 5, 6, 7)),
        ({"keep_together": ("embed + layers.1", "head")}, (), (3, 4, 5, 6, 7)),
        ({"keep_together": ("layers",)}, (), (1, 7)),
    ],
)
def test_cuts_by_module(pins: dict[str, Any], must: tuple[int, ...], may: tuple[int, ...]) -> None:
    units = named_units(tower().graph)  # embed, six layers, head
    pinned = Pins(**pins)
    assert (pinned.must_cut(units), pinned.may_cut(units)) == (must, may)
    assert num_stages(pinned, units) == (len(must) + 1, len(may) + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 6}, "tp=6 does not divide 64 devices; divisors are 1, 2, 4, 8, 16, 32, 64"),
        ({"tp": 8, "pp": 4, "cp": 4}, "tp=8 x cp=4 x pp=4 = 128 does not divide 64 devices"),
        ({"tp": 2, "pp": 2, "cp": 2, "dp": 4}, "= 32 is not 64 devices"),
        ({"tp": 2, "pp": 1, "cp": 1, "microbatch_size": 4}, "dp=32 x microbatch_size=4 does not divide a"),
        ({"mesh": (8, 4)}, "mesh=8x4 has 32 devices, the cluster 64"),
        ({"mesh": (8, 8), "tp": 16}, "tp=16 is no product of axes of the mesh 8x8; these are 1, 8, 64"),
        ({"mesh": (8, 8), "tp": 8, "pp": 8, "cp": 8}, "no way to give the axes of the mesh 8x8 their roles"),
        ({"zero_stage": 9}, "zero_stage=9 is unknown; choose one of 0, 1, 2, 3"),
        ({"schedule": "1F1b"}, "did you mean '1F1B'"),
        ({"pp": 0}, "pp=0 is not a count"),
        ({"tp": True}, "tp=True is not a count"),
        ({"tp": 4, "forbid": {"tp": [4]}}, "tp=4 is pinned and forbidden"),
        ({"forbid": {"zero_stage": range(4)}}, "every zero_stage is forbidden"),
        ({"forbid": {"zerostage": [3]}}, "did you mean 'zero_stage'"),
        ({"zero_stage": 0, "dp_shard": 4}, "dp_shard=4 shards the training state, but zero_stage=0"),
        ({"schedule": "GPipe", "num_virtual_stages": 2}, "GPipe has one stage per rank"),
        ({"pp": 1, "num_virtual_stages": 2}, "needs a pipeline, but pp=1"),
        ({"pp": 1, "cut_before": ("layers.2",)}, "cut_before layers.2 needs at least 2 stages, but pp=1"),
        (
            {"pp": 2, "num_virtual_stages": 1, "cut_before": ("layers.2", "layers.4")},
            "cut_before layers.2, layers.4 needs at least 3 stages, but pp=2",
        ),
        ({"pp": 8, "keep_together": ("layers.[0-4]",)}, "8 stages, but it has 4 pieces; keep_together"),
        (
            {"cut_before": ("layers.2",), "keep_together": ("layers",)},
            "cut_before layers.2 would cut keep_together layers apart",
        ),
        ({"cut_before": ("layers.9",)}, "layers.9 matches no module of tower; did you mean 'layers.5'"),
        ({"cut_before": ("layers.2.up",)}, "no stage can begin there; did you mean 'layers.2'"),
        ({"placements": {"layer.*.up": {"tp": "Shard(0)"}}}, "did you mean 'layers.*.up'"),
        (
            {"recompute": "full", "recompute_modules": {"layers.[2-3]": "!full", "layers.3": "none"}},
            "recompute=full and recompute layers.[2-3]=!full leave layers.2 none of none, selective, full",
        ),
        (
            {"recompute_modules": {"layers.2": "!none"}, "forbid": {"recompute": ["full", "selective"]}},
            "recompute layers.2=!none and forbid recompute=full and forbid recompute=selective leave",
        ),
        ({"placements": {"layers.*.up": {"tp": "Shard(2)"}}}, "none of its parameters has that dimension"),
        ({"placements": {"head": {"tp": "shard"}}}, "is no placement; write"),
        ({"placements": {"head": {"dp": "Shard(0)"}}}, "on the data axes zero_stage and dp_shard say"),
        ({"recompute_modules": {"layers.2.up": "full"}}, "lies inside the block layers.2"),
        ({"recompute_modules": {"layer.2": "full"}}, "matches no repeated block of tower; did you mean"),
        ({"recompute_modules": {"layers.2": "ful"}}, "did you mean 'full'"),
        ({"recompute_modules": {"layers.2": "!ful"}}, "layers.2=!ful is unknown; choose one of none, "),
        ({"cut_before": ("layers.[4-2]",)}, "no list of numbers"),
    ],
)  # fmt: skip
def test_an_impossible_pin_says_with_what_it_conflicts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PinConflictError, match=message.replace("[", r"\[").replace("]", r"\]")):
        check_pins(Pins(**settings), tower().graph, 64, 64)


def test_a_placement_that_no_strategy_has_names_the_op_and_what_it_offers() -> None:
    pins = Pins(tp=2, placements={"head": {"tp": "q"}})
    with pytest.raises(PinConflictError) as caught:
        AxisProblem(tower().graph, "tp", 2, BytesMoved(2), None, pins.rule(tower().graph, "tp"))
    assert "tp=2 and head:tp=q leave no strategy for" in str(caught.value)
    assert "of head, which on tp may use: h (head.weight S(1)); " in str(caught.value)
    assert "o (head.weight S(0))" in str(caught.value)


def test_degrees_must_divide_what_is_split() -> None:
    graph = tower(width=96, depth=2, vocabulary=36).graph
    pins = Pins(placements={"head": {"tp": "Shard(0)"}})
    assert dividing_degrees(pins, graph, "tp", (1, 2, 4, 8)) == (1, 2, 4)
    with pytest.raises(PinConflictError, match=r"splits a dimension of 36 \(head.weight\), which tp=8"):
        check_pins(Pins.merged(pins, tp=8), graph, 64, 64)


def test_the_minimal_conflict_is_impossible_and_needs_every_pin_of_it() -> None:
    pins = Pins(tp=8, cp=4, dp=1, zero_stage=3, microbatch_size=2)

    def possible(left: Pins) -> bool:
        return prod(n or 1 for n in (left.tp, left.cp, left.pp)) <= 16 or left.dp is None

    assert minimal_conflict(possible, pins) == ("tp=8", "dp=1", "cp=4")
    assert minimal_conflict(lambda left: not left, pins) == ("zero_stage=3",)
    assert minimal_conflict(lambda left: False, pins) == ()


def test_file_python_and_command_line_say_the_same(tmp_path: Path) -> None:
    written = Pins(
        tp=8,
        mesh=(8, 8),
        sequence_parallel=False,
        forbid={"zero_stage": {3}, "schedule": {"GPipe", "LoopedBFS"}},
        placements={"model.layers.*.mlp.down_proj": {"tp": "Shard(1)"}, "lm_head": {"tp": "!Shard(0)"}},
        recompute_modules={"model.layers.[0-3]": "full"},
        cut_before=("model.layers.16",),
        keep_together=("model.norm + lm_head",),
    )
    yaml = """
tp: 8
mesh: 8x8
sequence-parallel: false
forbid: {zero_stage: 3, schedule: [GPipe, LoopedBFS]}
placements:
  model.layers.*.mlp.down_proj: {tp: Shard(1)}
  lm_head: {tp: "!Shard(0)"}
recompute_modules: {"model.layers.[0-3]": full}
cut_before: model.layers.16
keep_together: [model.norm + lm_head]
"""
    (tmp_path / "pins.yaml").write_text(yaml)
    assert Pins.load(tmp_path / "pins.yaml") == written
    words = (
        "plan m c --global-batch 8 --tp 8 --mesh 8x8 --no-sequence-parallel --forbid zero-stage=3 "
        "--forbid schedule=GPipe --forbid schedule=LoopedBFS "
        "--pin model.layers.*.mlp.down_proj:tp=Shard(1) --pin lm_head:tp=!Shard(0) "
        "--recompute-module model.layers.[0-3]=full --cut-before model.layers.16"
    )
    options = build_parser().parse_args([*words.split(), "--keep-together", "model.norm + lm_head"])
    assert pins_of(options) == written


def test_options_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    path.write_text(json.dumps({"tp": 8, "forbid": {"pp": 2, "dp": [2, 4]}, "cut_before": "a",
                                "placements": {"x": {"tp": "o"}, "y": {"tp": "o"}}}))  # fmt: skip
    words = "plan m c --global-batch 8 --forbid tp=8 --dp 4 --cut-before b --pin x:tp=h --pins"
    pins = pins_of(build_parser().parse_args([*words.split(), str(path)]))
    assert pins == Pins(
        dp=4,
        forbid={"tp": {8}, "pp": {2}, "dp": {2}},
        cut_before=("a", "b"),
        placements={"y": {"tp": "o"}, "x": {"tp": "h"}},
    )
    assert list(pins.placements) == ["y", "x"], "of patterns the last counts"
    assert Pins.merged(path, tp=2).tp == 2


def test_the_example_is_read_and_holds_for_a_path_of_llama() -> None:
    pins = Pins.load(ROOT / "examples" / "pins.yaml")
    assert pins.recompute_of("model.layers.7") == "full"
    assert pins.recompute_of("model.layers.8") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero_stge: 3", "zero_stge: unknown pin; did you mean 'zero_stage'"),
        ("tp: [2, 4]", "tp: got .2, 4., expected one value"),
        ("placements: {lm_head: Shard(0)}", "placements: lm_head: got 'Shard.0.', expected a mapping"),
        ("placements: {lm_head: {tp: !Shard(0)}}", "in quotes"),
        ("mesh: 8 by 8", "expected the sizes of its axes"),
        ("- tp", "expected settings such as `tp: 8`"),
    ],
)
def test_a_wrong_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pins.yaml"
    path.write_text(text)
    with pytest.raises(PinConflictError, match=f"(?s)pins.yaml: .*{message}"):
        Pins.load(path)


def test_parts_are_all_pins_and_without_them_nothing_is_pinned() -> None:
    pins = Pins.load(ROOT / "examples" / "pins.yaml")
    texts = [text for text, _ in pins.parts()]
    assert len(texts) == len(set(texts)) == 10
    assert ", ".join(texts) == str(pins)
    left = pins
    while left:
        (_, left), *others = left.parts()
        assert len(others) == len(list(left.parts()))
    assert left == Pins()
    assert str(left) == "nothing pinned"


def test_a_pin_costs_what_a_step_gains_without_it(plan: Plan) -> None:
    def search(left: Pins) -> float | None:
        return None if left.ep is None else 1.0 + 0.25 * bool(left.tp) + 0.5 * bool(left.dp)

    costs, unpriced = pin_costs(search, Pins(tp=8, dp=4, pp=2, ep=2), 1.75)
    assert {each.pin: (each.step_s, each.cost_s) for each in costs} == {
        "tp=8": (1.5, 0.25),
        "pp=2": (1.75, 0.0),
        "dp=4": (1.25, 0.5),
    }
    assert unpriced == ("ep=2",)
    told = explain(plan.model_copy(update={"pin_costs": costs}))
    table = told[told.index("what each pin costs") :].splitlines()[1:5]
    assert [line.split() for line in table] == [
        ["pin", "without", "it", "with", "it", "costs"],
        ["tp=8", "1.50", "s", "1.75", "s", "+16.7%"],
        ["pp=2", "1.75", "s", "1.75", "s", "nothing"],
        ["dp=4", "1.25", "s", "1.75", "s", "+40.0%"],
    ]
