"""Stages, run one after the other on what each receives, are the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import graphs
from autopar.errors import RewriteError
from autopar.rewrite.stages import Stage, cut
from graphs import OpGraph
from graphs.ir import Op, Ref, Tensor
from tests.autopar.double_captures import captured
from tests.autopar.graph_builder import GraphBuilder


def run_stages(graph: OpGraph, stages: tuple[Stage, ...], values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss, where each stage sees its batch, its parameters and what it receives, and nothing else."""
    received: dict[str, torch.Tensor] = {}
    for stage in stages:
        read = {name for op in stage.ops for name in op.inputs}
        given = {name: values[name] for name in read & values.keys() if name not in graph.inputs}
        given |= {name: values[name] for name in stage.batch} | received
        made = graphs.run(replace(graph, ops=stage.ops), given)
        received = {name: made[name] for name in stage.sends}
    return received[graph.loss or ""]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "unet"])
def test_stages_cut_at_every_block_compose_to_the_whole(name: str) -> None:
    capture, weights, batch = captured(name)
    graph = capture.at(4)
    cuts = [0, *(block.start for block in capture.graph.blocks if block.start > 0)]
    if len(cuts) < 2:
        cuts = [0, len(graph.ops) // 3, 2 * len(graph.ops) // 3]  # amid the skips of a U-Net
    stages = cut(graph, [graph.ops[start].name for start in cuts], (graph.loss or "",))
    assert len(stages) == len(cuts)
    values = {**weights, **batch}
    whole = graphs.run(graph, values)[graph.loss or ""]
    torch.testing.assert_close(run_stages(graph, stages, values), whole)


def test_a_skip_passes_through_the_stages_between() -> None:
    make = GraphBuilder()
    first = make.linear(make.input(4, 8), 8)
    second = make.relu(first)
    third = make.relu(second)
    graph = make.graph(make.sum(make.add(third, first)))
    starts = [graph.ops[index].name for index in range(3)]
    stages = cut(graph, starts, (graph.loss or "",))
    assert [stage.receives for stage in stages] == [(), (first,), (first, second)]
    assert [stage.sends for stage in stages] == [(first,), (first, second), ("sum4",)]
    assert [stage.kind for stage in stages] == ["FirstStage", "MiddleStage", "LastStage"]


def test_what_has_no_gradient_is_computed_again_and_not_sent() -> None:
    make = GraphBuilder()
    mask = make.relu(make.input(4, 8))
    first = make.mul(make.linear(make.input(4, 8), 8), mask)
    graph = make.graph(make.sum(make.mul(first, mask)))
    _, last = cut(graph, [graph.ops[0].name, graph.ops[3].name], (graph.loss or "",))
    assert last.receives == (first,)
    assert [op.output for op in last.ops] == [mask, "mul3", "sum4"]
    assert last.batch == ("input0",)


def test_random_numbers_are_drawn_in_one_stage_and_sent() -> None:
    make = GraphBuilder()
    noise = make.drop(make.input(4, 8))
    mask = make.relu(noise)
    first = make.mul(make.linear(make.input(4, 8), 8), mask)
    graph = make.graph(make.sum(make.mul(first, mask)))
    _, last = cut(graph, [graph.ops[0].name, graph.ops[4].name], (graph.loss or "",))
    assert last.receives == (mask, first)
    assert [op.output for op in last.ops] == ["mul4", "sum5"]


def test_a_value_without_gradient_that_comes_from_one_with_is_sent() -> None:
    make = GraphBuilder()
    first = make.linear(make.input(4, 8), 8)
    make.tensors["frozen"] = Tensor("frozen", (4, 8), torch.float32, False, "frozen")
    make.ops.append(Op("detach", "aten.detach.default", (Ref(first),), {}, ("frozen",), "encoder"))
    graph = make.graph(make.sum(make.mul(make.relu(first), "frozen")))
    _, last = cut(graph, [graph.ops[0].name, graph.ops[2].name], (graph.loss or "",))
    assert last.receives == (first, "frozen")
    assert "detach" not in {op.name for op in last.ops}


def test_a_stage_without_anything_to_train_is_refused() -> None:
    make = GraphBuilder()
    mask = make.relu(make.input(4, 8))
    graph = make.graph(make.sum(make.mul(make.linear(make.input(4, 8), 8), mask)))
    with pytest.raises(RewriteError, match=r"stage 1 of 2 would train nothing: no value before linear1"):
        cut(graph, [graph.ops[0].name, graph.ops[1].name], (graph.loss or "",))
