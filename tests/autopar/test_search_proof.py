"""What the search claims, held against everything there is: spaces so small that each plan can be priced."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from autopar import api
from autopar.data_parallel import data_parallel
from autopar.errors import InfeasibleError
from autopar.localize import Localized, localize
from autopar.op_kinds import without_order
from autopar.plan import Parallelism, Plan
from autopar.pricing import Pricer
from autopar.request import training_policy
from autopar.rewrite.local import chosen
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.experts import deal_out_experts
from autopar.search.pins import Pins
from autopar.search.planner import TOLERANCE, Planner
from autopar.search.units import Unit, build_chain
from costmodel import Group
from graphs import Capture
from hardware_db import Cluster
from tests.autopar.small_models import cluster, tower
from tests.autopar.test_known_ideas import decoder
from tests.autopar.tiny_models import KINDS, all_plans, num_plans, programs_of, tiny

ROUNDING = 1e-9
MOST_PLANS = 80
WORST = 0.015
"""The most that a plan may cost above the optimum. The search stops at its tolerance; stages are judged by
what can be added up before a schedule puts them to the test, and memory is taken off in whole variants."""

PINNED = ("microbatch_size", "tp", "cp", "pp", "dp_shard", "zero_stage", "schedule", "num_virtual_stages")
STATE_BYTES = 16
"""What a trained parameter takes."""

OFFLOADED = 0.25
"""How often the optimizer's states are the host's."""

MEMORY_SHARES = (4.0, 2.0, 1.5, 1.2, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def planner_of(model: Capture, machine: Cluster, global_batch: int, **pins: Any) -> Planner:
    policy = training_policy(model.graph)
    return Planner(model, machine, policy, global_batch=global_batch, pins=Pins(**pins))


def random_planner(rng: random.Random) -> Planner:
    """A tiny model on two to eight devices that may or may not have memory enough; now and then the host
    keeps the optimizer's states."""
    model = tiny(rng.choice(KINDS), rng.choice([64, 256]), rng.choice([2, 3]), rng.choice([64, 256]))
    num_devices = rng.choice([2, 3, 4, 4, 6, 8])
    per_node = rng.choice([n for n in (2, 4, 8) if num_devices % n == 0] or [num_devices])
    memory_bytes = rng.choice(MEMORY_SHARES) * STATE_BYTES * model.graph.num_parameters
    machine = cluster(num_devices, memory_bytes, per_node)
    global_batch = num_devices * rng.choice([1, 2, 4])
    if rng.random() < OFFLOADED:
        return planner_of(model, with_hosts(machine), global_batch, offload="optimizer")
    return planner_of(model, machine, global_batch)


def with_hosts(machine: Cluster) -> Cluster:
    """The same with host memory, and links to it that the search can feel."""
    return replace(
        machine,
        host_memory_bytes_per_device=1e9,
        host_memory_bytes_per_s_per_device=40e9,
        host_link_bytes_per_s_per_device=12e9,
    )


def pinned(planner: Planner, rng: random.Random) -> Planner:
    """The same search with settings of some candidate pinned, so many that what is left can all be priced."""
    chosen = rng.choice([*planner.candidates()])
    names = rng.sample(PINNED, len(PINNED))
    for number in range(3, len(names) + 1):
        settings = {name: getattr(chosen, name) for name in names[:number] if is_said(chosen, name)}
        narrowed = planner.under(replace(planner.pins, **settings))
        if num_plans(narrowed) <= MOST_PLANS:
            break
    return narrowed


def is_said(p: Parallelism, name: str) -> bool:
    """Whether a setting means something: a schedule only with a pipeline."""
    return p.pp > 1 or name not in ("schedule", "num_virtual_stages")


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_is_better_than_the_bound_and_none_much_better_than_the_one_found(seed: int) -> None:
    rng = random.Random(seed)
    everything = random_planner(rng)
    for _ in range(4):
        planner = pinned(everything, rng)
        fitting = [found for found in all_plans(planner) if found.fits]
        result = planner.search()
        if not fitting:
            assert result.best is None
            continue
        best = min(fitting, key=lambda found: found.step_s)
        assert result.best is not None, f"{best.parallelism} fits"
        found = result.best.evaluated
        assert found.fits
        assert result.bound_s <= best.step_s * (1 + ROUNDING), str(best.parallelism)
        assert found.step_s <= best.step_s * (1 + WORST), f"{found.parallelism}, not {best.parallelism}"
        if found.parallelism.axis_order == best.parallelism.axis_order:
            assert found.step_s >= best.step_s * (1 - ROUNDING)


@pytest.mark.parametrize("seed", range(12))
def test_floors_lie_below_every_price(seed: int) -> None:
    """Of time and memory, for a layout, a way to run it and its program: splitting work over n ranks never
    divides its time by more."""
    rng = random.Random(seed)
    check_floors(pinned(random_planner(rng), rng))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ep", [2, 4])
def test_floors_know_which_ranks_share_experts(ep: int, zero_stage: int) -> None:
    """Their states are dealt out, and what is left of the data axes may have none of them to synchronise."""
    pins = {"tp": 1, "pp": 1, "ep": ep, "zero_stage": zero_stage, "microbatch_size": 2}
    check_floors(planner_of(tiny("experts", 256, 2, 64), cluster(4, 1e9, 2), 8, **pins))


def check_floors(planner: Planner) -> None:
    floors, bounds = planner.floors, planner.bounds
    prices: dict[Parallelism, list[Evaluated]] = {}
    for found in all_plans(planner):
        prices.setdefault(found.parallelism.model_copy(update={"recompute": "mixed"}), []).append(found)
    for p, plans in prices.items():
        microbatch_s = floors.tensor_s(p.microbatch_size, p.tp, p.ep) / p.cp
        microbatch_s += floors.context_s(p.microbatch_size, p.tp, p.cp)
        device = floors.device(p.microbatch_size, p.ep)
        for program in programs_of(planner, p):
            assert microbatch_s <= planner.layer.table(program).microbatch_s * (1 + ROUNDING), str(p)
        least_bytes = min(found.peak_memory_bytes for found in plans)
        assert bounds.memory_bytes(p) <= least_bytes * (1 + ROUNDING), str(p)
        fitting_s = [found.step_s for found in plans if found.fits]
        if fitting_s:
            plain = p.model_copy(update={"recompute": "none"})
            assert bounds.step_s(plain, microbatch_s, device) <= min(fitting_s) * (1 + ROUNDING), str(p)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("global_batch", [1, 2, 8])
def test_updates_of_late_stages_hide_while_the_pipeline_runs_empty(
    global_batch: int, pp: int, offload: str
) -> None:
    """Cuts that give late stages more parameters beat even ones: no floor may count both the bubble and an
    average update."""
    model = tower(depth=16, vocabulary=64, sequence=1024)
    pins = {"tp": 1, "pp": pp, "schedule": "1F1B", "microbatch_size": 1, "zero_stage": 0, "offload": offload}
    planner = planner_of(model, with_hosts(cluster(pp)), global_batch, **pins)
    (p,) = planner.candidates()
    device = planner.floors.device(1, 1)
    step_s = planner.solve(p).evaluated.step_s
    assert planner.bounds.step_s(p, device.microbatch_s, device) <= step_s * (1 + ROUNDING)


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (4, 1)])
@pytest.mark.parametrize("cp", [2, 4, 8])
def test_no_context_axis_is_faster_than_its_floor(heads: int, key_heads: int, cp: int) -> None:
    """Whether the keys are gathered, or positions exchanged for heads."""
    planner = planner_of(decoder(key_heads, 256, heads, 8192), cluster(8, per_node=2), 8)
    for tp in (1, 2):
        if cp * tp > 8:
            continue
        p = Parallelism(cp=cp, tp=tp, dp_shard=8 // (cp * tp), num_microbatches=cp * tp)
        floor_s = planner.floors.tensor_s(1, tp, 1) / cp + planner.floors.context_s(1, tp, cp)
        assert floor_s <= planner.layer.table(planner.programs.program(p)).microbatch_s * (1 + ROUNDING)


def repriced(plan: Plan, model: Capture, machine: Cluster) -> Evaluated:
    """The price of what a plan's file says: its strategies by name, its first ops, what its blocks keep."""
    p = plan.parallelism
    local = Localized.of(model.at(p.microbatch_size * (p.dp if "dp" in plan.strategies else 1)))
    if "dp" in plan.strategies:
        local = localize(local, data_parallel(local.graph, p.dp))
    for axis, size in (("cp", p.cp), ("tp", p.tp)):
        if size > 1:
            free = replace(local.graph, ops=tuple(map(without_order, local.graph.ops)))
            graph = free if axis == "cp" else local.graph
            local = localize(local, chosen(graph, axis, size, plan.strategies[axis]))
    widest = machine.num_devices // (p.tp * p.cp)
    groups = {"tp": Group(p.tp, 1), "cp": Group(p.cp, p.tp), "ep": Group(p.ep, p.tp * p.cp)}
    pricer = Pricer(machine, groups | {"dp": Group(widest, p.tp * p.cp)})
    chain = build_chain(model.at(p.microbatch_size), local, pricer.kernels)
    if p.ep > 1:
        chain = deal_out_experts(chain, local.graph, p.ep)
    chain = chain.priced(pricer)
    first_ops = [unit.first_op for unit in chain.units]
    cuts = [first_ops.index(stage.first_op) for stage in plan.stages]
    evaluator = Evaluator(machine, training_policy(model.graph))
    return evaluator.evaluate(chain, p, cuts, [*kept(plan, chain.units)])


def kept(plan: Plan, units: Sequence[Unit]) -> Iterator[str]:
    """What each unit does, by the names that the chain has for it."""
    said = {path: (each, each.blocks[0]) for each in plan.recomputation for path in each.blocks}
    by_path = {unit.modules[0]: unit for unit in units if unit.is_block}
    for unit in units:
        if not unit.is_block or unit.modules[0] not in said:
            yield "none"
            continue
        each, first = said[unit.modules[0]]
        if each.mode != "kept":
            yield each.mode
            continue
        places = [n for n, result in enumerate(by_path[first].results) if result.name in each.kept]
        names = {unit.results[place].name for place in places}
        yield next(name for name, results in unit.kept.items() if set(results) == names)


@pytest.mark.parametrize("seed", range(12))
def test_the_plan_costs_what_its_certificate_says(seed: int) -> None:
    """Read back from its file and priced on a graph that was captured anew."""
    rng = random.Random(seed)
    shape = rng.choice(KINDS), rng.choice([64, 256]), rng.choice([2, 3]), rng.choice([64, 256])
    model, num_devices = tiny(*shape), rng.choice([2, 4, 8])
    memory_bytes = rng.choice([4.0, 1.0, 0.6]) * STATE_BYTES * model.graph.num_parameters
    machine = cluster(num_devices, memory_bytes, num_devices)
    pins = {rng.choice(["tp", "pp", "microbatch_size"]): 2}
    try:
        plan = api.plan(model, machine, global_batch=2 * num_devices, space="whole", pins=pins)
    except InfeasibleError:
        return
    again = repriced(Plan.model_validate_json(plan.to_json()), tiny.__wrapped__(*shape), machine)
    assert again.step_s == pytest.approx(plan.certificate.objective_s, rel=1e-9)
    # Two replicas stand for any number: a mean over all samples keeps a byte more or less.
    assert again.peak_memory_bytes == pytest.approx(plan.prediction.peak_memory_bytes, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_less_memory_never_makes_a_faster_plan(seed: int) -> None:
    """Beyond what the search leaves open: the bound with more memory holds for every plan with less."""
    rng = random.Random(seed)
    model = tiny(rng.choice(KINDS), 256, 3, 256)
    pins = {"tp": 1, "pp": rng.choice([1, 2])}
    results = []
    for share in (3.0, 1.2, 0.8, 0.6, 0.5, 0.4, 0.3):
        memory_bytes = share * STATE_BYTES * model.graph.num_parameters
        results.append(planner_of(model, cluster(4, memory_bytes), 16, **pins).search())
    found = [result for result in results if result.best is not None]
    assert len(found) > 2
    assert all(result.best is None for result in results[len(found) :])
    for more, less in pairwise(found):
        assert more.best is not None
        assert less.best is not None
        assert less.best.evaluated.step_s >= more.bound_s * (1 - ROUNDING)
        assert less.best.evaluated.step_s >= more.best.evaluated.step_s * (1 - WORST)


@pytest.mark.parametrize(("depth", "pp", "microbatch_size"), [(16, 4, 2), (12, 4, 1), (16, 8, 1)])
def test_cuts_are_no_worse_for_a_little_less_memory(depth: int, pp: int, microbatch_size: int) -> None:
    """Stages that shed layers because memory is short may turn out faster than those that need not."""
    pins = {"tp": 1, "pp": pp, "schedule": "1F1B", "microbatch_size": microbatch_size}
    fastest_s = 0.0
    for memory_bytes in (600e6, 500e6, 450e6, 400e6, 350e6, 300e6):
        machine = cluster(pp, memory_bytes)
        result = planner_of(tower(depth=depth, sequence=1024), machine, 16, **pins).search()
        assert result.best is not None
        step_s = result.best.evaluated.step_s
        assert step_s >= fastest_s * (1 - TOLERANCE)
        fastest_s = max(fastest_s, step_s)
