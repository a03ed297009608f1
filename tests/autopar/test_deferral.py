"""Products leave the gradients of their weights, and what is left computes exactly these."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.rewrite.deferral import defer_weights
from autopar.rewrite.stages import cut
from autopar.runtime.deferral import (
    deferred_convolution,
    deferred_grouped_mm,
    deferred_linear,
    deferred_matmul,
    leave_weights,
)
from graphs import capture
from graphs.ir import Op, Ref
from tests.autopar.graph_builder import GraphBuilder
from tests.models import case


class Twice(nn.Module):
    """A row-wise norm between two products, as it stands or with those of the runtime."""

    def __init__(self, deferred: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 4))
        self.scale = nn.Parameter(torch.ones(8))
        self.deferred = deferred

    def forward(self, x: Tensor) -> Tensor:
        x = deferred_linear(x, self.first) if self.deferred else F.linear(x, self.first)
        x = torch.tanh(x) * self.scale
        return deferred_matmul(x, self.second) if self.deferred else x @ self.second


class Convolved(nn.Module):
    """A convolution with a bias and one without, as they stand or those of the runtime."""

    def __init__(self, deferred: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 3, 2)), nn.Parameter(torch.randn(6, 2, 3))
        self.scale = nn.Parameter(torch.ones(4))
        self.convolve = deferred_convolution if deferred else F.conv1d

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.convolve(x[:, :3], self.first, self.scale, stride=1, padding=1))
        return self.convolve(x, self.second, padding=(1,), dilation=[2], groups=2)


class Grouped(nn.Module):
    """Rows times the matrices of their groups, one of which has no rows."""

    def __init__(self, deferred: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 8, 4))
        self.scale = nn.Parameter(torch.ones(8))
        self.deferred = deferred

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([7, 7, 15], dtype=torch.int32)
        product = deferred_grouped_mm if self.deferred else plain_grouped_mm
        x = torch.tanh(product(x.flatten(0, 1), self.first, ends, transposed=True)) * self.scale
        return product(x, self.second, ends)


def plain_grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    matrices = weight.transpose(1, 2) if transposed else weight
    return torch.cat([x[:7] @ matrices[0], x[7:] @ matrices[2]])


class Again(Twice):
    """The same, computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return again


@pytest.mark.parametrize("kind", [Twice, Again, Convolved, Grouped])
def test_a_backward_in_two_parts_is_a_backward(kind: type[Twice | Convolved | Grouped]) -> None:
    plain, split = kind(deferred=False), kind(deferred=True)
    split.load_state_dict(plain.state_dict())
    take = leave_weights(split)
    given = [torch.randn(3, 5, 6) for _ in range(2)]
    finish = []
    for x in given:  # two microbatches, whose second parts come late
        for model in (plain, split):
            mine = x.clone().requires_grad_()
            model(mine).square().sum().backward()
            assert mine.grad is not None
        finish.append(take())
    assert split.first.grad is None, "the first part makes gradients of products' weights"
    assert split.second.grad is None
    torch.testing.assert_close(split.scale.grad, plain.scale.grad)
    for each in reversed(finish):
        each()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(split.get_parameter(name).grad, parameter.grad)


def test_what_comes_late_is_added_up_in_the_precision_of_gradients() -> None:
    """As 64 microbatches have one gradient, its bits all survive: in bfloat16 the sum would lose some."""
    stage = Twice(deferred=True).bfloat16()
    with torch.no_grad():
        stage.first.zero_()
    take = leave_weights(stage, torch.float32)
    finish = []
    for _ in range(64):
        hidden = torch.ones(1, 6, dtype=torch.bfloat16, requires_grad=True)
        loss = stage(hidden)
        loss.backward(torch.ones_like(loss))
        finish.append(take())
    for each in finish:
        each()
    assert stage.first.grad is not None
    assert stage.first.grad.dtype == torch.float32
    once = (torch.ones(4, dtype=torch.bfloat16) @ stage.second.T).float()
    torch.testing.assert_close(stage.first.grad[:, 0], 64 * once, rtol=1e-5, atol=0)


def test_outside_of_a_pipeline_nothing_is_left() -> None:
    plain, alone = Twice(deferred=False), Twice(deferred=True)
    alone.load_state_dict(plain.state_dict())
    x = torch.randn(3, 6)
    for model in (plain, alone):
        model(x).sum().backward()
    torch.testing.assert_close(alone.first.grad, plain.first.grad)
    torch.testing.assert_close(alone.second.grad, plain.second.grad)


def test_a_matrix_that_is_read_otherwise_too_gets_its_gradient_at_once() -> None:
    make = GraphBuilder()
    x = make.linear(make.input(4, 8), 8)
    y = make.linear(x, 8)
    shared = make.ops[1].inputs[1]
    graph = make.graph(make.sum(make.add(y, shared)))
    (stage,) = cut(graph, [graph.ops[0].name], (graph.loss or "",))
    targets = [op.target for op in defer_weights(stage, graph).ops]
    assert targets[:2] == ["deferred.linear", "aten.linear.default"]


def test_products_of_experts_leave_the_gradients_of_all_their_matrices() -> None:
    mixtral = case("mixtral")
    captured = capture(mixtral.build(), mixtral.inputs, name="mixtral")
    graph = captured.graph
    (stage,) = cut(graph, [graph.ops[0].name], (graph.loss or "",))
    deferred = [op for op in defer_weights(stage, graph).ops if op.target == "deferred.grouped_mm"]
    read = {op.inputs[1] for op in deferred}
    assert read == {each.tensor for each in graph.parameters if "experts" in each.name}


@pytest.mark.parametrize("further", [{"bias": Ref("input0")}, {"out_dtype": torch.float32}, {"bias": None}])
def test_grouped_products_that_do_more_are_left_as_they_are(further: dict[str, object]) -> None:
    make = GraphBuilder()
    rows, ends = make.input(6, 8), make.input(3)
    weight = make.parameter(3, 8, 4)
    make.tensors["product"] = replace(make.tensors[rows], name="product", requires_grad=True)
    args = (Ref(rows), Ref(weight))
    make.ops.append(
        Op("product", "aten._grouped_mm.default", args, {"offs": Ref(ends), **further}, ("product",), "")
    )
    graph = make.graph(make.sum("product"))
    (stage,) = cut(graph, ["product"], (graph.loss or "",))
    (product, _) = defer_weights(stage, graph).ops
    is_deferred = further == {"bias": None}
    assert product.target == ("deferred.grouped_mm" if is_deferred else "aten._grouped_mm.default")
    assert is_deferred or product.kwargs == {"offs": Ref(ends), **further}
