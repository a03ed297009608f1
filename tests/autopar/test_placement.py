"""Mesh axes on links: groups against the ranks of a numbered array, orders against all permutations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from math import inf, prod

import numpy as np
import pytest
from pydantic import ValidationError

import hardware_db
from autopar import api
from autopar.errors import InvalidParallelismError, RewriteError
from autopar.plan import MESH_AXES, Parallelism, Plan
from autopar.pricing import Pricer
from autopar.request import training_policy
from autopar.rewrite.program import rewrite
from autopar.search import placement
from autopar.search.alternatives import memory_excess
from autopar.search.data_axes import (
    data_groups,
    held_states,
    host_excess_bytes,
    least_update_s,
    mesh_groups,
    optimizer_s,
    updated_elements,
)
from autopar.search.evaluate import Evaluated
from autopar.search.pins import Pins
from autopar.search.planner import Planner, SearchResult
from autopar.search.stage_costs import state_bytes
from costmodel import (
    Collective,
    CostModelError,
    Group,
    collective_time_s,
    offloaded_update,
    optimizer_policy,
    spans,
)
from hardware_db import Cluster, Level
from tests.autopar.random_plans import plan_of
from tests.autopar.small_models import cluster as toys
from tests.autopar.small_models import tower

MESHES = [
    {"tp": 8, "pp": 4, "dp_shard": 4, "zero_stage": 1},
    {"tp": 2, "cp": 4, "pp": 2, "dp_shard": 4, "dp_replicate": 2, "zero_stage": 3},
    {"tp": 4, "cp": 2, "pp": 4, "dp_replicate": 4},
    {"tp": 2, "pp": 4, "dp_shard": 16, "ep": 8, "zero_stage": 2},
    {"tp": 2, "pp": 2, "cp": 2, "dp_shard": 4, "dp_replicate": 4, "ep": 8, "zero_stage": 1},
]
ORDERS = [
    MESH_AXES,
    ("dp_replicate", "dp_shard", "pp", "cp", "tp"),
    ("dp_replicate", "pp", "dp_shard", "cp", "tp"),
    ("tp", "pp", "dp_shard", "dp_replicate", "cp"),
    ("cp", "dp_replicate", "tp", "dp_shard", "pp"),
]


def mesh(sizes: dict[str, int], order: tuple[str, ...]) -> Parallelism:
    return Parallelism.model_validate({**sizes, "axis_order": order})


def lines(p: Parallelism, axes: set[str]) -> set[frozenset[int]]:
    """The sets of ranks that differ only in their coordinates on `axes`, from a numbered array."""
    ranks = np.arange(p.world_size).reshape([getattr(p, axis) for axis in p.axis_order])
    inside = [index for index, axis in enumerate(p.axis_order) if axis in axes]
    moved = np.moveaxis(ranks, inside, range(-len(inside), 0)) if inside else ranks[..., None]
    size = prod(getattr(p, axis) for axis in axes)
    return {frozenset(line) for line in moved.reshape(-1, size).tolist()}


def members(group: Group) -> frozenset[int]:
    ranks = {0}
    for count, stride in group.parts:
        ranks = {rank + index * stride for rank in ranks for index in range(count)}
    return frozenset(ranks)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", MESHES)
def test_groups_are_the_lines_of_a_numbered_mesh(sizes: dict[str, int], order: tuple[str, ...]) -> None:
    p = mesh(sizes, order)
    listed = placement.groups(p)
    assert set(listed) == {axis for axis in (*MESH_AXES, "ep") if getattr(p, axis) > 1}
    for axis in p.mesh:
        assert {frozenset(group) for group in listed[axis]} == lines(p, {axis})
        assert members(mesh_groups(p)[axis]) in lines(p, {axis})
    for groups in listed.values():  # every rank is in one group of each axis
        assert sorted(rank for group in groups for rank in group) == list(range(p.world_size))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", MESHES)
def test_data_groups_are_shards_and_their_replicas(sizes: dict[str, int], order: tuple[str, ...]) -> None:
    p = mesh(sizes, order)
    shard, replicate = data_groups(p)
    assert members(mesh_groups(p)["dp"]) in lines(p, {"dp_replicate", "dp_shard"})
    assert members(shard) in (lines(p, {"dp_shard", "cp"}) if p.zero_stage else {frozenset({0})})
    assert members(replicate) in lines(
        p, {"dp_replicate"} if p.zero_stage else {"dp_replicate", "dp_shard", "cp"}
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [sizes for sizes in MESHES if "ep" in sizes])
def test_experts_and_their_copies_fill_the_data_axes(sizes: dict[str, int], order: tuple[str, ...]) -> None:
    """Each data and context rank holds some experts: which ones, which shard and which copy of them."""
    p = mesh(sizes, order)
    experts, (shard, replicate) = mesh_groups(p)["ep"], data_groups(p, experts=True)
    assert experts.size == p.ep
    together = {a + b + c for a in members(experts) for b in members(shard) for c in members(replicate)}
    assert len(together) == experts.size * shard.size * replicate.size
    assert frozenset(together) in lines(p, {"dp_replicate", "dp_shard", "cp"})


def levels(*sides: tuple[str, int, float, str]) -> Cluster:
    """A machine of levels (name, devices, GB/s, topology)."""
    made = tuple(Level(name, size, 1e9 * rate, 1e-6, topology) for name, size, rate, topology in sides)  # type: ignore[arg-type]  # topologies are literals
    return Cluster(
        id="test",
        name="test",
        device=hardware_db.accelerator("h100-sxm"),
        num_devices=made[-1].num_devices,
        devices_per_node=made[0].num_devices,
        levels=made,
    )


RAILS = levels(("node", 8, 400, "switch"), ("rails", 64, 50, "rails"), ("spine", 256, 25, "fat_tree"))
TORUS = levels(("x", 4, 90, "torus"), ("y", 16, 90, "torus"), ("z", 128, 90, "torus"))


@pytest.mark.parametrize("cluster", [RAILS, TORUS], ids=["rails", "torus"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", MESHES)
def test_spans_count_the_ranks_that_share_each_level(
    cluster: Cluster, sizes: dict[str, int], order: tuple[str, ...]
) -> None:
    p = mesh(sizes, order)
    for group in placement.communicating_groups(p):
        ranks = members(group)
        for span in spans(group, cluster):
            sizes_of = {level.name: level.num_devices for level in cluster.levels}
            own = sizes_of[span.level_names[0]]
            below = max((size for size in sizes_of.values() if size < own), default=1)
            inside = sum(rank < below for rank in ranks)
            here = sum(rank < span.level.num_devices for rank in ranks)
            assert (span.num_inside, span.num_peers * span.num_inside) == (inside, here)


@pytest.mark.parametrize(
    ("order", "tp_links", "dp_links"),
    [
        (MESH_AXES, ["node"], ["rails"]),
        (("pp", "tp", "dp_replicate", "dp_shard", "cp"), ["rails"], ["node"]),
        (("dp_replicate", "dp_shard", "pp", "cp", "tp"), ["node"], ["rails", "spine"]),
    ],
)
def test_the_inner_axis_has_the_node_and_the_outer_one_the_rails(
    order: tuple[str, ...], tp_links: list[str], dp_links: list[str]
) -> None:
    placed = mesh_groups(mesh({"tp": 8, "dp_shard": 8, "pp": 4, "zero_stage": 1}, order))
    named = {axis: [span.level.name for span in spans(placed[axis], RAILS)] for axis in ("tp", "dp_shard")}
    assert named == {"tp": tp_links, "dp_shard": dp_links}  # stages inside push dp out to the spine


def test_on_a_torus_the_order_decides_who_has_a_whole_ring() -> None:
    """tp 4 on x alone goes around; outside of dp 8 it meets on z, where each plane's rings are its own."""
    inner = mesh({"tp": 4, "dp_shard": 32, "zero_stage": 1}, MESH_AXES)
    outer = mesh({"tp": 4, "dp_shard": 32, "zero_stage": 1}, ("tp", "pp", "dp_replicate", "dp_shard", "cp"))
    (ring,), (line,) = spans(mesh_groups(inner)["tp"], TORUS), spans(mesh_groups(outer)["tp"], TORUS)
    assert (ring.level_names, ring.bandwidth_bytes_per_s) == (("x",), 90e9)
    # Of the 8 chips along z every second one, with the groups between: all around, at half of the rate.
    assert (line.level_names, line.bandwidth_bytes_per_s) == (("z",), 45e9)


def times_s(p: Parallelism, cluster: Cluster) -> tuple[float, ...]:
    groups = placement.communicating_groups(p)
    return tuple(
        collective_time_s(Collective(kind, num_bytes, group), cluster)
        for group in groups
        for kind in ("all_reduce", "all_gather", "all_to_all", "send_recv")
        for num_bytes in (1e4, 1e9)
    )


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("cluster", [RAILS, TORUS], ids=["rails", "torus"])
def test_orders_left_out_cost_the_same_as_one_that_is_kept(cluster: Cluster, sizes: dict[str, int]) -> None:
    p = Parallelism.model_validate(sizes)
    kept = placement.orders(p, cluster)
    assert kept[0] == p.axis_order
    every = [o for o in permutations(MESH_AXES) if o.index("dp_replicate") < o.index("dp_shard")]
    assert len(kept) < len(every) / 2 or cluster is TORUS
    assert {times_s(mesh(sizes, order), cluster) for order in kept} == {
        times_s(mesh(sizes, order), cluster) for order in every
    }


@pytest.mark.parametrize(("tp_bytes", "dp_bytes", "innermost"), [(1e9, 1e9, "tp"), (1e6, 4e10, "dp_shard")])
def test_the_axis_that_moves_more_gets_the_faster_links(
    tp_bytes: float, dp_bytes: float, innermost: str
) -> None:
    def evaluate(p: Parallelism) -> float:
        placed = mesh_groups(p)
        tp = Collective("all_reduce", tp_bytes, placed["tp"])
        dp = Collective("reduce_scatter", dp_bytes, placed["dp_shard"])
        return 100 * collective_time_s(tp, RAILS) + collective_time_s(dp, RAILS)

    given = Parallelism(tp=8, dp_shard=32, zero_stage=1)
    best, cost = placement.best_order(evaluate, given, RAILS)
    assert list(best.mesh)[-1] == innermost
    assert cost == evaluate(best) <= evaluate(given)


def test_ties_keep_the_order_that_was_given() -> None:
    given = mesh({"tp": 8, "dp_shard": 32, "zero_stage": 1}, ORDERS[1])
    assert placement.best_order(lambda _: 1.0, given, RAILS) == (given, 1.0)


def test_the_groups_of_16384_ranks_are_all_there_and_small() -> None:
    cluster = hardware_db.cluster("dgx-h100*2048")
    p = Parallelism(tp=8, cp=16, pp=16, dp_shard=8, zero_stage=1)
    described = placement.rank_groups(p, cluster)
    assert sum(len(each.model_dump_json()) for each in described) < 1000
    tp = described[-1]
    assert (tp.axis, tp.size, tp.stride, tp.num_groups) == ("tp", 8, 1, 2048)
    assert str(tp) == "tp8: ranks 0-7, 8-15, ...; nvswitch 450 GB/s"
    assert placement.groups(p)["tp"][-1] == tuple(range(16376, 16384))
    assert str(described[0]).startswith(
        "pp16: ranks (0, 1024, ... 15360), (1, 1025, ... 15361), ...; network"
    )


def test_an_unusual_order_is_told_and_survives_json() -> None:
    usual = Parallelism(tp=2, pp=2, dp_replicate=2)
    unusual = usual.model_copy(update={"axis_order": ORDERS[1]})
    same = usual.model_copy(update={"axis_order": ("cp", *(axis for axis in MESH_AXES if axis != "cp"))})
    assert str(unusual) == f"{usual} mesh(dp_replicate, pp, tp)"
    assert str(same) == str(usual)  # axes of one rank lie nowhere
    assert list(unusual.mesh) == ["dp_replicate", "pp", "tp"]
    assert Parallelism.model_validate_json(unusual.model_dump_json()) == unusual
    with pytest.raises(ValidationError, match=r"names every axis once, .*; got pp, tp"):
        Parallelism(axis_order=("pp", "tp"))


def test_programs_have_the_mesh_of_the_plan_or_are_refused() -> None:
    capture = tower()
    degrees = Parallelism(dp_replicate=2, pp=2, num_microbatches=2, axis_order=ORDERS[1])
    program = rewrite(capture, plan_of(capture.graph, degrees, {}))
    assert "MESH = {'dp_replicate': 2, 'pp': 2}" in program.files["train.py"].replace('"', "'")
    inside_out = Parallelism(dp_replicate=2, dp_shard=2, zero_stage=1, axis_order=ORDERS[3])
    with pytest.raises(RewriteError, match=r"dp_replicate inside dp_shard.*put dp_replicate before dp_shard"):
        rewrite(capture, plan_of(capture.graph, inside_out, {}))


def test_a_plan_tells_who_communicates_on_which_links() -> None:
    plan = api.evaluate(tower(), toys(8), global_batch=16, tp=4, dp=2)
    assert [str(each) for each in plan.rank_groups] == [
        "dp_replicate2: ranks (0, 4), (1, 5), ...; network 10 GB/s",
        "tp4: ranks 0-3, 4-7; links 100 GB/s",
    ]
    assert "tp: 2 groups, ranks 0-3, 4-7 on links 100 GB/s" in plan.explain()


POLICY = optimizer_policy("adamw-mixed")


OFFLOADED = [
    Parallelism.model_validate(
        {"dp_replicate": 8 // shard, "dp_shard": shard, "zero_stage": zero_stage, "offload": "optimizer"}
    )
    for zero_stage, shard in ((0, 1), (1, 4), (2, 4), (3, 4))
]


@pytest.mark.parametrize("p", OFFLOADED, ids=str)
def test_offloaded_states_are_the_hosts(p: Parallelism) -> None:
    cluster, elements = hardware_db.cluster("dgx-a100"), {False: 8_000_000_000}
    here = held_states(elements, p, POLICY)
    sharded = {stage: p.dp_shard if p.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    assert here.optimizer_bytes == 0
    assert here.gradients_bytes == 2 * 8e9 / sharded[2]
    assert here.parameters_bytes == 2 * 8e9 / sharded[3]
    assert host_excess_bytes([elements], p, POLICY, cluster) == 14 * 8e9 / sharded[1] - 2e12 / 8
    kept = p.model_copy(update={"offload": "none"})
    assert host_excess_bytes([elements], kept, POLICY, cluster) == -inf


def test_the_hosts_update_is_slower_than_the_devices_and_hides_its_gradients() -> None:
    cluster, elements = hardware_db.cluster("dgx-a100"), {False: 1_000_000_000}
    p = Parallelism(dp_shard=8, zero_stage=2, offload="optimizer")
    pricer = Pricer(cluster, mesh_groups(p))
    update = offloaded_update(1e9 / 8, POLICY, cluster)
    assert optimizer_s(elements, p, POLICY, pricer, 0.0) == update.exposed_s()
    hidden_s = pricer.era.gradient_sync_overlap * 1.0
    assert optimizer_s(elements, p, POLICY, pricer, 1.0) == update.exposed_s(hidden_s)
    kept = p.model_copy(update={"offload": "none"})
    assert optimizer_s(elements, kept, POLICY, pricer, 1.0) < update.update_s


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("policy", ["adamw-mixed", "adamw-sharded-fp32"])
def test_states_and_updates_are_as_many_times_those_of_one_parameter(policy: str, offload: str) -> None:
    """Of updates, all but what launches and what gradients take on their way to the host."""
    cluster, number = hardware_db.cluster("dgx-a100"), 8_000_000_000
    for p in (each.model_copy(update={"offload": offload}) for each in OFFLOADED):
        rules, pricer = optimizer_policy(policy), Pricer(cluster, mesh_groups(p))
        held = held_states({False: number}, p, rules).total_bytes
        assert number * state_bytes(p, rules, data_groups(p)[0].size) == pytest.approx(held)
        least_s = least_update_s(p, rules, pricer) * updated_elements({False: number}, p)
        at_best_s = optimizer_s({False: number}, p, rules, pricer, backward_s=inf)
        assert at_best_s * (1 - 1e-3) <= least_s <= at_best_s
        assert least_s <= optimizer_s({False: number}, p, rules, pricer, backward_s=0.0)


def with_host(cluster: Cluster, memory_bytes: float = 1e12) -> Cluster:
    return replace(
        cluster,
        host_memory_bytes_per_device=memory_bytes,
        host_memory_bytes_per_s_per_device=10e9,
        host_link_bytes_per_s_per_device=10e9,
    )


def planner(cluster: Cluster) -> Planner:
    return Planner(tower(), cluster, training_policy(tower().graph), global_batch=16)


def priced(planner: Planner, p: Parallelism) -> Evaluated:
    return planner.as_given(p).evaluated


def test_prices_of_one_order_do_not_leak_into_another() -> None:
    usual = Parallelism(tp=2, dp_shard=4, zero_stage=3, microbatch_size=2, num_microbatches=2)
    unusual = usual.model_copy(update={"axis_order": ("tp", "pp", "dp_replicate", "dp_shard", "cp")})
    both = planner(toys(8))
    first, second = priced(both, usual), priced(both, unusual)
    assert second.step == priced(planner(toys(8)), unusual).step
    assert second.step.terms["tensor_parallel"] > first.step.terms["tensor_parallel"]
    assert second.step.terms["parameter_gather"] < first.step.terms["parameter_gather"]


def test_a_candidate_is_placed_where_it_is_fastest_with_nothing_else_changed() -> None:
    unusual = Parallelism(
        tp=4, dp_replicate=2, microbatch_size=8, axis_order=("tp", "pp", "dp_replicate", "dp_shard", "cp")
    )
    own = planner(toys(8))
    found = own.as_given(unusual)
    best = placement.placed(found, own.evaluator)
    before, after = found.evaluated, best.evaluated
    assert list(after.parallelism.mesh) == ["dp_replicate", "tp"]
    assert after.step_s < before.step_s
    assert (after.cuts, after.choices, after.ledgers) == (before.cuts, before.choices, before.ledgers)
    assert placement.placed(best, own.evaluator) is best


# --- in a search, and as given ------------------------------------------------------------------------------


def test_where_no_group_moves_no_price_does() -> None:
    """Axes of one rank lie nowhere, so putting them elsewhere must give the prices of the search again."""
    own = planner(toys(8))
    usual = Parallelism(tp=2, pp=2, dp_replicate=2, microbatch_size=2, num_microbatches=4)
    same = usual.model_copy(update={"axis_order": ("cp", "dp_shard", "pp", "dp_replicate", "tp")})
    program = own.programs.program(usual)
    again = placement.placed_chain(program, same, own.evaluator)
    assert again is not program.chain
    assert [unit.cost for unit in again.units] == [unit.cost for unit in program.chain.units]
    assert [unit.recompute_s for unit in again.units] == [
        {name: unit.recompute_s[name] for name in unit.again} for unit in program.chain.units
    ]


@cache
def slow_between_nodes() -> tuple[Planner, SearchResult]:
    """Two nodes: stages talk less than replicas, but must not wait for it."""
    capture = tower(depth=2)
    pins = Pins(tp=2, pp=2)
    cluster = hardware_db.cluster("dgx-a100*2")
    found = Planner(capture, cluster, training_policy(capture.graph), global_batch=64, pins=pins)
    return found, found.search()


def test_the_plan_and_its_runners_up_lie_where_they_cost_least() -> None:
    found, result = slow_between_nodes()
    assert result.best is not None
    assert result.best.parallelism.axis_order != MESH_AXES
    for solved in (result.best, *result.runners_up):
        reordered = solved.parallelism.model_copy(update={"axis_order": MESH_AXES})
        usual = found.evaluator.evaluate(
            solved.program.chain, reordered, solved.evaluated.cuts, solved.evaluated.choices
        )
        assert solved.evaluated.step_s <= usual.step_s
        assert placement.placed(solved, found.evaluator) is solved
    steps_s = [each.evaluated.step_s for each in (result.best, *result.runners_up)]
    assert steps_s == sorted(steps_s)


def test_a_placed_plan_says_its_order_its_groups_and_its_price() -> None:
    found, result = slow_between_nodes()
    plan = api.plan(
        tower(depth=2), found.cluster, global_batch=64, tp=2, pp=2, space="whole", price_pins=False
    )
    assert result.best is not None
    assert plan.parallelism == result.best.parallelism
    assert plan.prediction.step_s == plan.certificate.objective_s >= plan.certificate.bound_s
    assert plan.prediction.step_s == pytest.approx(result.best.evaluated.step_s, rel=1e-9)
    assert [each.axis for each in plan.rank_groups] == list(plan.parallelism.mesh)
    assert plan.rank_groups == placement.rank_groups(plan.parallelism, found.cluster)


def evaluated(**settings: object) -> Plan:
    degrees = {"tp": 2, "dp": 2, "pp": 2, "microbatch_size": 4, **settings}
    return api.evaluate(tower(), with_host(toys(8)), global_batch=16, **degrees)  # type: ignore[arg-type]  # degrees by name


def test_an_order_and_offloading_are_priced_as_asked_whichever_way_they_are_given() -> None:
    usual, unusual = evaluated(), evaluated(axis_order=("tp", "pp", "dp_replicate"))
    assert unusual.parallelism.axis_order == ("dp_shard", "cp", "tp", "pp", "dp_replicate")
    assert list(unusual.parallelism.mesh) == ["tp", "pp", "dp_replicate"]
    assert unusual.prediction.terms_s["tensor_parallel"] > usual.prediction.terms_s["tensor_parallel"]
    offloaded = evaluated(offload="optimizer")
    assert offloaded.prediction.terms_s["optimizer"] > usual.prediction.terms_s["optimizer"]
    assert offloaded.prediction.host_memory_bytes > 0 == usual.prediction.host_memory_bytes
    assert offloaded.prediction.peak_memory_bytes < usual.prediction.peak_memory_bytes
    for plan in (usual, unusual, offloaded):
        again = api.evaluate(tower(), with_host(toys(8)), parallelism=plan.parallelism)
        assert again.to_json() == plan.to_json()


def test_states_that_the_host_cannot_hold_do_not_fit() -> None:
    tight = with_host(toys(8), memory_bytes=1e6)
    plan = api.evaluate(tower(), tight, global_batch=16, dp=8, microbatch_size=2, offload="optimizer")
    assert plan.prediction.peak_memory_bytes < plan.cluster.memory_bytes
    assert not plan.fits
    assert "does not fit: offloaded states are more than the hosts' memory" in plan.explain()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis_order": ("pp", "tpp", "dp_replicate")}, r"has 'tpp', .* did you mean 'tp'\?"),
        ({"axis_order": ("pp", "tp")}, r"pp, tp lacks dp_replicate: .* \(usually pp, dp_replicate, tp\)"),
        ({"axis_order": ("pp", "tp", "dp_replicate", "pp")}, "has an axis twice"),
        ({"offload": "activations"}, "offload='activations' is unknown; choose 'none' or 'optimizer'"),
    ],
)
def test_an_order_that_is_none_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParallelismError, match=message):
        evaluated(**settings)


def test_an_offloaded_candidate_has_its_price_and_its_hosts_limit() -> None:
    p = Parallelism(dp_shard=8, zero_stage=2, microbatch_size=2, offload="optimizer")
    held_bytes = 16 * tower().graph.num_parameters / 8  # fp32: a copy, two moments and the gradient
    host = with_host(toys(8), held_bytes)
    kept = planner(host).as_given(p.model_copy(update={"offload": "none"})).evaluated
    offloaded = planner(host).as_given(p).evaluated
    assert offloaded.ledgers[0].optimizer_bytes == 0 < kept.ledgers[0].optimizer_bytes
    assert offloaded.step.terms["optimizer"] > kept.step.terms["optimizer"]
    assert offloaded.fits
    tight = replace(host, host_memory_bytes_per_device=held_bytes - 1e6)
    without_room = planner(tight).as_given(p).evaluated
    assert not without_room.fits
    assert memory_excess(without_room) == "out of the host's memory by 1.0 MB: offloaded optimizer states"
    with pytest.raises(CostModelError, match="nothing is known of host_link_bytes_per_s_per_device"):
        planner(toys(8)).as_given(p)
