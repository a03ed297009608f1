"""Prices of ops and of fused chains, against the cost model's own functions."""

from __future__ import annotations

from dataclasses import replace
from math import isclose

import pytest
import torch

import hardware_db
from autopar.kernels import NOTHING, Kernels, Move
from autopar.localize import Assignment, Localized, localize
from autopar.placements import PR, RP, RR, sharded
from autopar.pricing import DEFAULT_SOFTWARE, OpCost, Pricer, total
from autopar.strategies import strategies
from costmodel import Collective, CollectiveKind, Group, Roofline, Work, collective_time_s, software
from graphs.ir import OpGraph
from tests.autopar.graph_builder import GraphBuilder

CLUSTER = hardware_db.cluster("dgx-h100*2")
GROUPS = {"tp": Group(8, 1), "dp": Group(2, 8)}
ERA = software(DEFAULT_SOFTWARE)
PRICER = Pricer(CLUSTER, GROUPS)
ROOFLINE = Roofline(CLUSTER.device, ERA)


def priced(graph: OpGraph) -> dict[str, OpCost]:
    return dict(zip((op.name for op in graph.ops), PRICER.graph(graph), strict=True))


def collective_s(kind: CollectiveKind, num_bytes: float, axis: str = "tp") -> float:
    """What the links need, and what a training step leaves of their rate."""
    return collective_time_s(Collective(kind, num_bytes, GROUPS[axis]), CLUSTER) / ERA.collective_share


# --- kernels ------------------------------------------------------------------------------------------------


def test_kernels_cost_their_roofline_and_their_launches() -> None:
    forward = Work(2e12, 1e9, "bf16", "matmul", (1, 1000, 1000, 1000))
    backward, weight = Work(0, 3e9, "bf16", "memory"), Work(1e12, 1e9, num_launches=4)
    cost = PRICER.priced(Kernels(forward=(forward, backward), backward=(backward,), weight=(weight,)))
    assert cost.forward_s == ROOFLINE.time_s(forward) + ROOFLINE.time_s(backward)
    assert cost.weight_s == ROOFLINE.time_s(weight)
    assert cost.backward_s == ROOFLINE.time_s(backward) + cost.weight_s
    assert cost.forward_host_s == pytest.approx(2 * ERA.host_s_per_launch)
    assert cost.backward_host_s == pytest.approx(5 * ERA.host_s_per_launch)
    assert cost.forward_communication_s == cost.backward_communication_s == 0
    assert PRICER.priced(NOTHING) == OpCost()


def test_a_product_costs_its_roofline_and_its_backward_one_per_gradient() -> None:
    builder = GraphBuilder(torch.bfloat16)
    first = builder.linear(builder.input(4096, 4096), 8192)
    second = builder.linear(first, 4096)
    costs = priced(builder.graph(builder.sum(second)))
    flops = 2 * 4096 * 4096 * 8192
    num_bytes = 2 * (4096 * 4096 + 4096 * 8192 + 4096 * 8192)

    def seconds(*shape: int) -> float:
        return ROOFLINE.time_s(Work(flops, num_bytes, "bf16", "matmul", shape))

    assert costs[first].forward_s == seconds(1, 4096, 8192, 4096)
    assert (
        costs[first].backward_s == costs[first].weight_s == seconds(1, 4096, 8192, 4096)
    )  # input: no gradient
    assert costs[second].forward_s == seconds(1, 4096, 4096, 8192)
    assert costs[second].weight_s == seconds(1, 8192, 4096, 4096)
    assert costs[second].backward_s == seconds(1, 4096, 8192, 4096) + seconds(1, 8192, 4096, 4096)


def test_a_chain_of_elementwise_ops_costs_what_its_ends_move() -> None:
    builder = GraphBuilder()
    x = builder.linear(builder.input(4096, 4096), 4096)
    chain = builder.add(builder.add(builder.add(x, x), x), x)
    graph = builder.graph(builder.sum(builder.linear(chain, 4096)))
    costs = priced(graph)
    size = 4 * 4096 * 4096

    def seconds(num_bytes: float, num_launches: int) -> float:
        return ROOFLINE.time_s(Work(0, num_bytes, "fp32", "memory", (), num_launches))

    first, second, last = (op.name for op in graph.ops if op.target == "aten.add.Tensor")
    assert costs[first].forward_s == seconds(size, 0)  # reads x, its result stays in registers
    assert costs[second].forward_s == seconds(size, 0)
    assert costs[last].forward_s == seconds(2 * size, 1)  # reads x and writes for the product
    assert costs[first].forward_host_s == 0
    assert costs[last].forward_host_s == ERA.host_s_per_launch


# --- the host -----------------------------------------------------------------------------------------------


def test_a_host_that_works_ahead_slows_down_sums_only() -> None:
    """Large kernels give the host the time to launch small ones: what is compared is a whole unit."""
    large, small = OpCost(forward_s=10, forward_host_s=1), OpCost(forward_s=1, forward_host_s=4)
    assert small.paced.forward_s == 4
    assert PRICER.unit([large, small]).forward_s == 11 < large.paced.forward_s + small.paced.forward_s
    assert PRICER.unit([small] * 5).forward_s == 20


def test_while_the_device_communicates_the_host_works_on() -> None:
    cost = OpCost(1, 2, 3, 4, forward_host_s=6, backward_host_s=5, weight_s=1)
    assert cost.paced == cost._replace(forward_s=3)
    assert cost.paced.forward_total_s == 6
    assert cost.paced.backward_s + cost.paced.backward_communication_s == 6  # above the host's 5


def test_collectives_are_launched_too() -> None:
    moves = (Move("all_reduce", 1e6, "tp"),) * 3
    cost = PRICER.priced(Kernels(forward_moves=moves, backward_moves=moves[:1]))
    assert cost.forward_host_s == pytest.approx(3 * ERA.host_s_per_collective)
    assert cost.backward_host_s == pytest.approx(ERA.host_s_per_collective)
    assert cost.forward_communication_s == pytest.approx(3 * collective_s("all_reduce", 1e6))


def test_a_slow_host_makes_a_small_model_slow() -> None:
    builder = GraphBuilder()
    x = builder.input(8, 8)
    for _ in range(20):
        x = builder.relu(builder.linear(x, 8))
    graph = builder.graph(builder.sum(x))
    slow = Pricer(CLUSTER, GROUPS, replace(ERA, host_s_per_launch=1e-3))
    assert slow.unit(slow.graph(graph)).forward_s == pytest.approx(
        40e-3
    )  # the sum is in the last rectifier's kernel


def test_costs_add_up_field_by_field() -> None:
    assert total([OpCost(1, 2, 3, 4, 5, 6, 7), OpCost(1, 1, 1, 1, 1, 1, 1)]) == OpCost(2, 3, 4, 5, 6, 7, 8)
    assert total([]) == OpCost()
    assert OpCost(1, 2, 3, 4, 50, 60, 2).total_s == 10  # the weight part is part of the backward


# --- communication ------------------------------------------------------------------------------------------


def conversion(name: str, num_bytes: float, *, backward: bool = True) -> tuple[float, float]:
    cost = PRICER.conversion(name, num_bytes, "tp", backward=backward)
    assert cost.forward_s == cost.backward_s == 0
    return cost.forward_communication_s, cost.backward_communication_s


def test_a_conversion_costs_its_collective_and_the_conjugate_one() -> None:
    size = 2.0**26
    gather, scatter = collective_s("all_gather", size), collective_s("reduce_scatter", size)
    assert conversion("all_gather", size) == (gather, scatter)
    assert conversion("reduce_scatter", size) == (scatter, gather)
    assert conversion("copy", size) == (0.0, collective_s("all_reduce", size))
    assert conversion("shard_partial", size) == (0.0, 0.0)
    assert conversion("all_gather", size, backward=False) == (gather, 0.0)
    assert conversion("all_to_all", size) == (collective_s("all_to_all", size / 8),) * 2


def test_nothing_to_move_takes_no_time() -> None:
    assert PRICER.collective_s("all_reduce", 0, GROUPS["tp"]) == 0
    assert PRICER.collective_s("all_reduce", 1e6, Group(1)) == 0


def test_pricers_that_share_prices_agree_with_those_that_do_not() -> None:
    """A search makes one for each mesh; what they share does not depend on it."""
    groups = {"tp": Group(2, 1), "dp": Group(8, 2)}
    sharing, alone = Pricer(CLUSTER, groups, like=PRICER), Pricer(CLUSTER, groups)
    assert sharing.era == PRICER.era
    for axis, group in groups.items():
        assert sharing.collective_s("all_gather", 1e6, group) == alone.collective_s(
            "all_gather", 1e6, group
        ), axis
    moved = Kernels(forward=(Work(1e12, 1e9),), forward_moves=(Move("all_gather", 1e7, "tp"),))
    assert sharing.priced(moved) == alone.priced(moved) != PRICER.priced(moved)


def test_conversions_in_a_local_graph_are_priced_on_their_axis() -> None:
    builder = GraphBuilder()
    x = builder.input(64, 1024)
    hidden = builder.linear(x, 4096)
    graph = builder.graph(builder.sum(builder.relu(hidden)))
    for axis in ("tp", "dp"):
        size = PRICER.groups[axis].size
        offered = [strategies(op, graph, size, {}) for op in graph.ops]
        column = next(s for s in offered[0] if s.results[0] == sharded(1))
        choice = (column, offered[1][0], offered[2][0])
        local = localize(
            Localized.of(graph), Assignment(axis, size, choice, {"weight0": sharded(0), x: RR})
        ).graph
        (moved,) = (op for op in local.ops if op.target.startswith("autopar."))
        cost = priced(local)[moved.name]
        assert moved.target == "autopar.all_gather_replicated"
        assert cost.forward_communication_s == collective_s("all_gather", 64 * 4096 * 4, axis)


def test_bucketed_time_is_linear_and_never_above_a_single_collective() -> None:
    group = PRICER.groups["tp"]
    size = 2.0**20
    assert isclose(
        PRICER.bucketed_s("all_reduce", 2 * size, group), 2 * PRICER.bucketed_s("all_reduce", size, group)
    )
    assert PRICER.bucketed_s("all_reduce", size, group) <= collective_s("all_reduce", size)


def test_splitting_an_op_divides_its_time() -> None:
    builder = GraphBuilder(torch.bfloat16)
    x = builder.linear(builder.input(16384, 4096), 4096)
    graph = builder.graph(builder.sum(builder.linear(x, 16384)))
    op = graph.ops[1]
    (column,) = (s for s in strategies(op, graph, 8, {}) if s.results[0] == sharded(1))
    assert column.operands == (RP, sharded(0))
    (row,) = (s for s in strategies(op, graph, 8, {}) if s.results[0] == PR and s.factor)
    for strategy in (column, row):
        sources = dict(zip(op.inputs, strategy.operands, strict=True))
        alone = replace(graph, ops=(op,), inputs=op.inputs, outputs=op.outputs, parameters=())
        local = localize(Localized.of(alone), Assignment("tp", 8, (strategy,), sources)).graph
        ratio = priced(alone)[op.name].total_s / priced(local)[op.name].total_s
        assert 6 < ratio <= 8.001
