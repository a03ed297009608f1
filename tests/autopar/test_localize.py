"""The local graphs of all ranks together do what the whole graph does, whatever strategies the ops take."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphs
from autopar import api, models
from autopar.data_parallel import data_parallel
from autopar.localize import Assignment, Localized, localize, localize_op
from autopar.model_scaling import small
from autopar.placements import RP, RR, Partial, Shard, sharded
from autopar.rewrite.local import chosen, local_program
from autopar.strategies import REPLICATE, Strategy, natural_sections, settle, strategies
from graphs import Capture, OpGraph
from graphs.blocks import canonical_form, find_blocks
from tests.autopar.double_captures import captured
from tests.autopar.graph_builder import GraphBuilder
from tests.autopar.random_plans import random_strategies
from tests.autopar.simulated_ranks import deal, run, whole_of
from tests.graphs.rule_cases import CASES
from tests.graphs.rule_harness import Case, record

SIZE = 2


def whole_gradients(
    graph: OpGraph, values: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of all parameters that have one."""
    leaves = {name: values[name].detach().requires_grad_() for name in graph.parameter_tensors}
    loss = graphs.run(graph, {**values, **leaves})[graph.loss or ""]
    loss.backward()
    return loss, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama", "bert", "vit", "dlrm", "resnet"])
def test_random_strategies_give_loss_and_gradients_of_the_whole(name: str, seed: int) -> None:
    capture, weights, batch = captured(name)
    graph = capture.at(4)
    values = {**weights, **batch}
    loss, gradients = whole_gradients(graph, values)
    assignment = chosen(graph, "tp", SIZE, random_strategies(graph, SIZE, seed))
    local = localize(Localized.of(graph), assignment)
    ranks = run(local, "tp", SIZE, values)
    losses = ranks[graph.loss or ""]
    torch.testing.assert_close(whole_of(losses, local.states[graph.loss or ""]["tp"].value), loss)
    torch.autograd.backward(losses, [torch.ones_like(each) for each in losses])
    for name_, wanted in gradients.items():
        state = local.states[name_]["tp"]
        parts = [torch.zeros_like(part) if part.grad is None else part.grad for part in ranks[name_]]
        made = whole_of(parts, state.grad)
        torch.testing.assert_close(made, wanted, msg=f"the gradient of {name_}")


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b"])
def test_blocks_of_a_class_still_do_the_same_on_a_rank(name: str) -> None:
    spec = small(models.load(name), num_layers=4, seq_len=64)
    graph = graphs.capture(spec.build_without_memory(), spec.inputs).at(SIZE)
    alike = data_parallel(graph, SIZE)
    local = localize(Localized.of(graph), alike).graph
    assert _classes(local) == [[block.path for block in graph.blocks]]
    assert {block.path for block in find_blocks(local)} == {block.path for block in graph.blocks}

    odd = graph.blocks[2]
    for index in range(odd.start, odd.stop):  # every op of it once in a way of its own
        choice = list(alike.choice)
        offered = strategies(graph.ops[index], graph, SIZE, natural_sections(graph, SIZE))
        choice[index] = next(each for each in offered if each.key == REPLICATE)
        if choice[index].key != alike.choice[index].key:
            local = localize(Localized.of(graph), replace(alike, choice=tuple(choice))).graph
            assert [odd.path] in _classes(local)


class FedLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.tanh(self.up(x + state)))
        return result


class Fed(nn.Module):
    """Layers that each read a constant made outside, of these values in turn."""

    def __init__(self, width: int, *fill: float) -> None:
        super().__init__()
        self.width, self.fill = width, fill
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(FedLayer(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        fed = [torch.full((len(x), self.width), value) for value in 4 // len(self.fill) * self.fill]
        x = self.first(x)
        for layer, state in zip(self.layers, fed, strict=True):
            x = layer(x, state)
        return x.square().mean()


def _fed(width: int, *fill: float) -> Capture:
    return graphs.capture(Fed(width, *fill), lambda batch: {"x": torch.randn(batch, width)})


def test_constants_made_anew_tell_blocks_apart_by_their_values() -> None:
    width = 8

    def local_classes(*fill: float) -> list[list[str]]:
        graph = _fed(width, *fill).at(SIZE)
        return _classes(localize(Localized.of(graph), data_parallel(graph, SIZE)).graph)

    assert local_classes(0.5) == [[f"layers.{index}" for index in range(4)]]
    assert local_classes(0.0, 1.0) == [["layers.0", "layers.2"], ["layers.1", "layers.3"]]


def test_a_plan_with_constants_from_outside_of_blocks_is_rewritten() -> None:
    capture = _fed(512, 0.5)
    plan = api.plan(capture, "dgx-h100*1", global_batch=32, dp=4, tp=2)
    local = local_program(capture, plan)
    assert {"dp", "tp"} <= local.states[capture.graph.parameters[0].tensor].keys()


def _classes(graph: OpGraph) -> list[list[str]]:
    """The paths of the blocks of each class, which do the same."""
    classes: dict[int, list[str]] = {}
    forms: dict[int, set[Hashable]] = {}
    for block in graph.blocks:
        classes.setdefault(block.block_class, []).append(block.path)
        form = canonical_form(graph, block.path, (block.start, block.stop))
        forms.setdefault(block.block_class, set()).add(form)
    assert all(len(alike) == 1 for alike in forms.values())
    return list(classes.values())


@pytest.mark.parametrize("op_case", CASES, ids=str)
def test_an_op_alone_is_localized_as_in_a_graph(op_case: Case) -> None:
    torch.manual_seed(0)
    call = record(op_case)
    for strategy in strategies(call.op, call.graph, SIZE, natural_sections(call.graph, SIZE)):
        sources = dict(zip(call.op.inputs, strategy.operands, strict=True))
        one = replace(call.graph, ops=(call.op,))
        whole = localize(Localized.of(one), Assignment("tp", SIZE, (strategy,), sources)).graph
        alone = localize_op(call.op, strategy, call.graph, "tp", SIZE)
        assert alone.ops == whole.ops
        assert all(whole.tensors[name] == tensor for name, tensor in alone.tensors.items())


@pytest.mark.parametrize("op_case", CASES, ids=str)
def test_every_split_of_every_op_runs_on_local_shards(op_case: Case) -> None:
    """What the rules offer, `localize` can write: sizes and groups in the arguments become local."""
    torch.manual_seed(0)
    call = record(op_case)
    for strategy in strategies(call.op, call.graph, SIZE, natural_sections(call.graph, SIZE)):
        if strategy.factor is None or _is_random(call.op.target):
            continue
        local = localize(Localized.of(call.graph), _alone(call.graph, strategy))
        wholes = dict(zip(call.op.inputs, call.operands, strict=True))
        ranks = run(local, "tp", SIZE, wholes)
        for name, wanted in zip(call.op.outputs, call.results, strict=True):
            state = local.states[name]["tp"]
            made = whole_of(ranks[name], state.value)
            low = wanted.dtype == torch.bfloat16
            torch.testing.assert_close(
                made, wanted, atol=0.1 if low else None, rtol=0.05 if low else None,
                equal_nan=True, msg=strategy.key,
            )  # fmt: skip


def _is_random(target: str) -> bool:
    return target.split(".")[1] in {"empty", "rand", "randn", "new_empty"}


def _alone(graph: OpGraph, strategy: Strategy) -> Assignment:
    """The assignment of a graph with one op, whose operands come as it wants them."""
    sources = dict(zip(graph.ops[0].inputs, strategy.operands, strict=True))
    return Assignment("tp", SIZE, (strategy,), sources)


def test_a_column_and_a_row_split_need_one_collective_each_way() -> None:
    """Megatron's feed-forward network: the input is copied, the output reduced, nothing in between moves."""
    make = GraphBuilder()
    x = make.linear(make.input(4, 8), 8)
    up = make.linear(x, 16)
    down = make.linear(make.relu(up), 8)
    graph = make.graph(make.sum(down))
    keys = {op.name: "replicate" for op in graph.ops}
    column, relu, row = (op.name for op in graph.ops[1:4])
    keys |= {column: "o", relu: "d1", row: "h"}
    local = localize(Localized.of(graph), chosen(graph, "tp", SIZE, keys))
    ours = [op for op in local.graph.ops if op.target.startswith("autopar.")]
    assert [op.target for op in ours] == ["autopar.copy", "autopar.all_reduce"]
    assert local.graph.tensors[up].shape == (4, 8)
    assert local.graph.tensors["weight1"].shape == (8, 8)
    assert local.graph.tensors["weight2"].shape == (8, 8)
    assert local.states["weight1"]["tp"] == sharded(0)
    assert local.states["weight2"]["tp"] == sharded(1)
    whole = {op.name: op for op in graph.ops}
    split = {op.name: op for op in local.graph.ops}
    assert split[column].flops == whole[column].flops // SIZE
    assert split[graph.ops[0].name].flops == whole[graph.ops[0].name].flops
    copied = ours[0].output
    assert copied in split[column].saved
    assert x not in split[column].saved, "what autograd keeps is what the op reads: the copy"


def test_a_view_of_a_gathered_tensor_lives_in_the_gathered_memory() -> None:
    capture, _, _ = captured("gpt2")
    graph = capture.at(4)
    local = localize(Localized.of(graph), chosen(graph, "tp", SIZE, random_strategies(graph, SIZE, 1))).graph
    for op in local.ops:
        for name in op.outputs:
            storage = local.tensors[name].storage
            if storage != name and op.inputs:
                assert storage in {local.tensors[read].storage for read in op.inputs}


def test_pieces_of_sections_are_cut_from_every_section() -> None:
    whole = torch.arange(12.0)
    parts = deal(whole, Shard(0, (4, 8)), SIZE)
    assert parts[0].tolist() == [0, 1, 4, 5, 6, 7]
    assert torch.equal(whole_of(parts, Shard(0, (4, 8))), whole)


def test_constants_have_no_gradient_to_be_partial() -> None:
    assert settle(RP, requires_grad=False) == RR
    assert settle(RP, requires_grad=True) == RP
    assert isinstance(RP.grad, Partial)
