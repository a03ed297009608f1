"""Prices of single ops and of fused chains, against the cost model's own functions."""

from __future__ import annotations

from dataclasses import replace
from math import isclose

import torch

import hardware_db
from autopar.localize import Assignment, Localized, localize
from autopar.placements import PR, RP, RR, sharded
from autopar.pricing import OpCost, Pricer, Traffic, kind_of, total
from autopar.strategies import strategies
from costmodel import Collective, CollectiveKind, Group, Work, collective_time_s, work_time_s
from graphs.ir import Op, OpGraph, Ref
from tests.autopar.graph_builder import GraphBuilder

CLUSTER = hardware_db.cluster("dgx-h100*2")
PRICER = Pricer(CLUSTER, {"tp": Group(8, 1), "dp": Group(2, 8)})


def priced(graph: OpGraph) -> dict[str, OpCost]:
    return dict(zip((op.name for op in graph.ops), PRICER.graph(graph), strict=True))


def test_a_product_costs_its_roofline_and_its_backward_one_per_gradient() -> None:
    builder = GraphBuilder(torch.bfloat16)
    first = builder.linear(builder.input(4096, 4096), 8192)
    second = builder.linear(first, 4096)
    costs = priced(builder.graph(builder.sum(second)))
    flops = 2 * 4096 * 4096 * 8192
    num_bytes = 2 * (4096 * 4096 + 4096 * 8192 + 4096 * 8192)
    forward_s = work_time_s(Work(flops, num_bytes, "bf16", "matmul"), CLUSTER.device)
    assert costs[first] == OpCost(forward_s, forward_s)  # the input has no gradient, the weight has
    assert costs[second] == OpCost(forward_s, 2 * forward_s)


def test_attention_has_the_backward_of_flash_attention_and_half_the_work_where_causal() -> None:
    builder = GraphBuilder(torch.bfloat16)
    q, k, v = (builder.parameter(1, 32, 8192, 128) for _ in range(3))
    name = builder.add(q, k)
    builder.ops.clear()
    flops = 4 * 32 * 8192 * 8192 * 128
    args = (Ref(q), Ref(k), Ref(v), None, 0.0, True)
    op = Op(name, "aten.scaled_dot_product_attention.default", args, {}, (name,), "", flops)
    cost = PRICER.op(op, builder.tensors, Traffic.of(builder.graph(name)))
    work = Work(flops / 2, 4 * 32 * 8192 * 128 * 2, "bf16", "attention")
    assert isclose(cost.forward_s, work_time_s(work, CLUSTER.device))
    assert isclose(cost.backward_s, 2.5 * cost.forward_s, rel_tol=1e-9)
    whole = PRICER.op(replace(op, args=args[:5]), builder.tensors, Traffic.of(builder.graph(name)))
    assert isclose(whole.forward_s, 2 * cost.forward_s)


def test_a_chain_of_elementwise_ops_touches_memory_at_its_ends_only() -> None:
    builder = GraphBuilder()
    x = builder.linear(builder.input(4096, 4096), 4096)
    chain = builder.add(builder.add(builder.add(x, x), x), x)
    graph = builder.graph(builder.sum(builder.linear(chain, 4096)))
    costs = priced(graph)
    size = 4 * 4096 * 4096

    def seconds(num_bytes: float) -> float:
        return work_time_s(Work(0, num_bytes, "fp32", "memory"), CLUSTER.device)

    first, second, last = (op.name for op in graph.ops if op.target == "aten.add.Tensor")
    assert isclose(costs[first].forward_s, seconds(size))  # reads x, its result stays in registers
    assert isclose(costs[second].forward_s, seconds(size))
    assert isclose(costs[last].forward_s, seconds(2 * size))  # reads x and writes for the product


def test_a_value_with_two_readers_is_written_and_read() -> None:
    builder = GraphBuilder()
    x = builder.linear(builder.input(1024, 1024), 1024)
    shared = builder.add(x, x)
    traffic = Traffic.of(builder.graph(builder.sum(builder.mul(builder.relu(shared), shared))))
    assert traffic.is_read(shared)
    assert traffic.is_written(shared)


def test_a_saved_value_is_written_though_nobody_reads_it_back() -> None:
    builder = GraphBuilder()
    rectified = builder.relu(builder.linear(builder.input(1024, 1024), 1024))
    traffic = Traffic.of(builder.graph(builder.sum(builder.add(rectified, rectified))))
    assert not traffic.is_read(rectified)
    assert traffic.is_written(rectified)


def test_a_view_is_free() -> None:
    builder = GraphBuilder()
    x = builder.relu(builder.linear(builder.input(64, 64), 64))
    builder.tensors["view"] = replace(builder.tensors[x], name="view", shape=(4096,))
    op = Op("view", "aten.reshape.default", (Ref(x), [4096]), {}, ("view",), "")
    assert kind_of(op, builder.tensors) == "view"
    assert PRICER.op(op, builder.tensors, Traffic(frozenset(), frozenset(), {})) == OpCost()


def conversion(name: str, num_bytes: float, *, backward: bool = True) -> OpCost:
    return PRICER.conversion(name, num_bytes, "tp", backward=backward)


def collective_s(kind: CollectiveKind, num_bytes: float, axis: str = "tp") -> float:
    return collective_time_s(Collective(kind, num_bytes, PRICER.groups[axis]), CLUSTER)


def test_a_conversion_costs_its_collective_and_the_conjugate_one() -> None:
    size = 2.0**26
    gather, scatter = collective_s("all_gather", size), collective_s("reduce_scatter", size)
    assert conversion("all_gather", size)[2:] == (gather, scatter)
    assert conversion("reduce_scatter", size)[2:] == (scatter, gather)
    assert conversion("copy", size)[2:] == (0.0, collective_s("all_reduce", size))
    assert conversion("shard_partial", size)[2:] == (0.0, 0.0)
    assert conversion("all_gather", size, backward=False)[2:] == (gather, 0.0)
    assert conversion("all_to_all", size)[2:] == (collective_s("all_to_all", size / 8),) * 2


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


def test_costs_add_up_field_by_field() -> None:
    assert total([OpCost(1, 2, 3, 4), OpCost(1, 1, 1, 1)]) == OpCost(2, 3, 4, 5)
    assert total([]) == OpCost()


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
        assert 7 < ratio <= 8.001
