"""Plans in which blocks and stages run different programs: found, priced as what they are, and emitted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch

import graphs
import hardware_db
from autopar import api
from autopar.models import load
from autopar.plan import Certificate, Parallelism, Plan
from autopar.request import training_policy
from autopar.rewrite.program import rewrite
from autopar.search.describe import build_plan
from autopar.search.evaluate import Evaluated
from autopar.search.local_programs import Program
from autopar.search.outcome import Solved
from autopar.search.pins import Pins
from autopar.search.planner import Planner
from autopar.search.programs import MEMORY_PRICES
from graphs import Capture
from hardware_db import Cluster
from tests.autopar.small_models import Layer, cluster
from tests.autopar.test_search_proof import repriced
from tests.autopar.tiny_models import Language, SelfAttention, all_cuts, tiny

WORST = 0.015
"""The most that a plan may cost above the best of all that may be mixed."""

ROUNDING = 1e-9


class Case(NamedTuple):
    """A tiny model on devices whose memory makes it mix."""

    kind: str
    width: int
    depth: int
    length: int
    num_devices: int
    memory_bytes: float
    global_batch: int
    pins: dict[str, Any]

    @property
    def model(self) -> Capture:
        return tiny(self.kind, self.width, self.depth, self.length)

    def machine(self, share: float = 1.0) -> Cluster:
        """The cluster, with this share of the memory."""
        return cluster(self.num_devices, share * self.memory_bytes, self.num_devices)

    @property
    def fixed(self) -> Pins:
        return Pins(zero_stage=0, **self.pins)

    def planner(self, share: float = 1.0) -> Planner:
        policy = training_policy(self.model.graph)
        return Planner(
            self.model, self.machine(share), policy, global_batch=self.global_batch, pins=self.fixed
        )


ONE_STAGE = Case("attention", 256, 4, 256, 4, 14.703e6, 32, {"tp": 4, "pp": 1, "microbatch_size": 2})
PIPELINE = Case(
    "experts", 64, 6, 256, 8, 2.2057e6, 64, {"tp": 2, "pp": 4, "microbatch_size": 2, "schedule": "1F1B"}
)
ROOMY = Case("attention", 256, 4, 1024, 4, 30e6, 32, {"tp": 4, "pp": 1, "microbatch_size": 1})

CASES = pytest.mark.parametrize("case", [ONE_STAGE, PIPELINE], ids=["one-stage", "pipeline"])


def best_of(case: Case, share: float = 1.0) -> Solved:
    best = case.planner(share).search().best
    assert best is not None
    return best


def uniform(planner: Planner, p: Parallelism) -> Iterator[Program]:
    """The programs that are the same for all blocks."""
    for level in range(len(MEMORY_PRICES)):
        yield planner.programs.program(p, level)


def mixed(planner: Planner, p: Parallelism) -> Iterator[Program]:
    """All programs that blocks and what is outside of them can be mixed of, once each."""
    made: dict[int, Program] = {}
    for level, program in enumerate(uniform(planner, p)):
        if all(dict(program.strategies["tp"]) != dict(other.strategies["tp"]) for other in made.values()):
            made[level] = program
    yield from made.values()
    num_blocks = len(planner.capture.graph.blocks)
    for outside, levels in product(made, product(made, repeat=num_blocks)):
        both = None if {*levels} == {outside} else planner.programs.depths.mixed(p, outside, levels)
        if both is not None:
            yield both


def fitting(planner: Planner, p: Parallelism, programs: Iterator[Program]) -> Iterator[Evaluated]:
    """All cuts and all that blocks may compute again, priced."""
    for program in programs:
        for cuts in all_cuts(planner, program, p):
            for choices in product(*planner.layer.table(program).options):
                found = planner.evaluator.evaluate(program.chain, p, cuts, choices)
                if found.fits:
                    yield found


@CASES
def test_what_is_short_of_memory_mixes_and_is_faster_than_any_one_program(case: Case) -> None:
    planner = case.planner()
    (p,) = planner.candidates()
    best = best_of(case)
    levels = best.program.key.levels
    assert len({best.program.key.price_level, *levels}) > 1
    solved = (planner.layer.solve(program, p) for program in uniform(planner, p))
    fit = [each.evaluated.step_s for each in solved if each is not None and each.evaluated.fits]
    assert best.evaluated.fits
    assert best.evaluated.step_s < 0.995 * min(fit)


def test_early_stages_keep_less() -> None:
    """They hold more microbatches. What makes that worth another program is a mixture of experts, whose
    fastest program keeps what it gathers."""
    model = api.captured(load("mixtral-8x7b", seq_len=4096), None, None)
    pins = Pins(dp=2, tp=4, ep=1, pp=4, schedule="1F1B", zero_stage=2, microbatch_size=1)
    machine = hardware_db.cluster("dgx-a100-40gb*4")
    planner = Planner(model, machine, training_policy(model.graph), global_batch=256, pins=pins)
    best = planner.search().best
    assert best is not None
    units, levels = best.program.chain.units, iter(best.program.key.levels)
    of_unit = [next(levels, 0) if unit.is_block else 0 for unit in units]
    stages = [of_unit[a:b] for a, b in pairwise((*best.evaluated.cuts, len(units)))]
    assert any(stages[0])
    assert not any(stages[-1])
    finished = planner.finish(best)
    assert finished.evaluated.step_s == pytest.approx(best.evaluated.step_s, rel=1e-6)
    assert finished.evaluated.fits


TINY_STAGES = Case(
    "attention", 256, 3, 512, 4, 8.9e6, 32, {"tp": 2, "pp": 2, "microbatch_size": 1, "schedule": "1F1B"}
)
TINY_BLOCKS = Case("attention", 256, 3, 1024, 4, 9.13e6, 32, {"tp": 4, "pp": 1, "microbatch_size": 1})


@pytest.mark.parametrize(
    ("case", "share"),
    [(TINY_STAGES, 1.1), (TINY_STAGES, 1.2), (TINY_BLOCKS, 1.1), (TINY_BLOCKS, 1.2)],
)
def test_no_mixture_is_much_better_than_the_plan_and_none_than_the_bound(case: Case, share: float) -> None:
    planner = case.planner(share)
    (p,) = planner.candidates()
    least_s = min(found.step_s for found in fitting(planner, p, mixed(planner, p)))
    result = planner.search()
    assert result.best is not None
    assert result.best.evaluated.step_s <= least_s * (1 + WORST)
    assert result.bound_s <= least_s * (1 + ROUNDING)


@CASES
def test_less_memory_never_makes_a_faster_mixture(case: Case) -> None:
    steps_s = [best_of(case, share).evaluated.step_s for share in (2.0, 1.2, 1.1, 1.05, 1.0)]
    assert all(less >= more * (1 - WORST) for more, less in pairwise(steps_s))
    assert steps_s[-1] > steps_s[0]


@CASES
def test_what_a_plan_of_several_programs_says_is_what_it_costs(case: Case) -> None:
    """Read back from its file, every block's strategies are known, and come to the same price."""
    plan = api.plan(
        case.model, case.machine(), global_batch=case.global_batch, price_pins=False, pins=case.fixed
    )
    again = Plan.model_validate_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    priced = repriced(again, tiny.__wrapped__(case.kind, case.width, case.depth, case.length), case.machine())
    assert priced.step_s == pytest.approx(plan.certificate.objective_s, rel=1e-9)
    assert priced.peak_memory_bytes == pytest.approx(plan.prediction.peak_memory_bytes, rel=1e-6)


def dense_first() -> Capture:
    """Two dense layers, then three of attention."""
    kinds = iter((Layer, Layer, SelfAttention, SelfAttention, SelfAttention))
    with torch.device("meta"):
        model = Language(lambda width: next(kinds)(width), 256, 5, skip=False)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(batch, 256, dtype=torch.long) for name in ("tokens", "labels")}

    return graphs.capture(model, inputs, name="dense first")


def test_blocks_of_other_classes_have_strategies_of_their_own() -> None:
    model, machine = dense_first(), cluster(4, 1e9)
    plan = api.plan(model, machine, global_batch=16, price_pins=False, pins={"tp": 2})
    of_module = {op.name: op.module for op in model.graph.ops}
    blocks = {".".join(of_module[name].split(".")[:2]) for name in plan.strategies["tp"]}
    assert {"layers.0", "layers.2"} <= blocks
    assert blocks.isdisjoint({"layers.1", "layers.3", "layers.4"})
    again = repriced(Plan.model_validate_json(plan.to_json()), dense_first(), machine)
    assert again.step_s == pytest.approx(plan.certificate.objective_s, rel=1e-9)


def test_a_program_has_a_class_for_each_form_of_a_block() -> None:
    """And what it is written from costs what was priced."""
    sources = []
    for levels in ((0, 0, 0, 0), (0, 0, 2, 2)):
        plan = plan_of(ROOMY, levels)
        fresh = tiny.__wrapped__(ROOMY.kind, ROOMY.width, ROOMY.depth, ROOMY.length)
        assert repriced(plan, fresh, ROOMY.machine()).step_s == pytest.approx(plan.prediction.step_s)
        sources.append(rewrite(ROOMY.model, plan).source)
    uniform, mixed = (source.count("class SelfAttention") for source in sources)
    assert mixed > uniform


def plan_of(case: Case, levels: tuple[int, ...]) -> Plan:
    """The plan of its one candidate whose blocks run the programs of these levels."""
    planner = case.planner()
    (p,) = planner.candidates()
    program = planner.programs.program(p) if not any(levels) else planner.programs.depths.mixed(p, 0, levels)
    assert program is not None
    solved = planner.layer.solve(program, p)
    assert solved is not None
    solved = planner.finish(solved)
    step_s = solved.evaluated.step_s
    priced = Certificate(
        status="evaluated", objective_s=step_s, bound_s=step_s, num_candidates=1, num_solved=1, pruned={}
    )
    return build_plan(planner, solved, priced)
