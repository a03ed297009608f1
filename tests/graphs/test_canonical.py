"""Each operator is written in one way, functional and with plain sizes, and means the same as before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphs


class Calls(nn.Module):
    """A function of one tensor as a module; the weight makes everything differentiable."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight)


X = torch.arange(2 * 6 * 4, dtype=torch.float64).reshape(2, 6, 4) / 7


def captured(function) -> tuple[graphs.OpGraph, Calls]:
    module = Calls(function).double()
    return graphs.capture(module, {"x": X}).graph, module


def assert_same(function) -> graphs.OpGraph:
    """The graph of a function, after checking that it gives the function's value and gradient."""
    graph, module = captured(function)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    result = graphs.run(graph, {"x": X, "weight": weight})[graph.outputs[0]]
    expected = module(X)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result.square().sum(), weight)
    (true,) = torch.autograd.grad(expected.square().sum(), module.weight)
    torch.testing.assert_close(gradient, true)
    return graph


def targets(graph: graphs.OpGraph) -> list[str]:
    return [op.target.removeprefix("aten.") for op in graph.ops][1:]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(2, -1), [("reshape.default", [2, 24])]),
        (lambda x: x.flatten(1), [("reshape.default", [2, 24])]),
        (lambda x: x.unflatten(1, (2, -1)), [("reshape.default", [2, 2, 3, 4])]),
        (lambda x: x.view_as(torch.empty(2, 24)), [("reshape.default", [2, 24])]),
        (lambda x: x[..., :3], [("slice.Tensor", 2, 0, 3)]),
        (lambda x: x[:, 2:], [("slice.Tensor", 1, 2, 6)]),
        (lambda x: x.narrow(-1, 1, 2), [("slice.Tensor", 2, 1, 3)]),
        (lambda x: x[:, -1], [("select.int", 1, 5)]),
        (lambda x: x.mT, [("transpose.int", 1, 2)]),
        (lambda x: x.permute(0, 2, 1), [("transpose.int", 1, 2)]),
        (lambda x: x.movedim(0, -1), [("permute.default", [1, 2, 0])]),
        (lambda x: x.softmax(-1), [("softmax.int", 2)]),
        (
            lambda x: x[:, None].expand(-1, 3, -1, -1),
            [("unsqueeze.default", 1), ("expand.default", [2, 3, 6, 4])],
        ),
        (lambda x: x[:, None].broadcast_to(2, 3, 6, 4), None),
        (lambda x: x[:, :, :1].squeeze(), [("slice.Tensor", 2, 0, 1), ("squeeze.dim", 2)]),
        (lambda x: x[:, :1, :1].squeeze(), None),
        (lambda x: torch.broadcast_tensors(x, x[:, :1])[1], None),
        (lambda x: x.float(), [("to.dtype", torch.float32)]),
        (lambda x: torch.addmm(x[0, 0], x[0], x[0, :4]), None),
    ],
)
def test_one_form(function, expected):
    graph = assert_same(function)
    if expected is not None:
        assert [(op.target.removeprefix("aten."), *op.args[1:]) for op in graph.ops[1:]] == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.contiguous().view(2, 6, 4).expand(2, -1, 4).double().clone()[:, :],
        lambda x: torch.dropout(x, 0.0, True) * 1.0 + 0,
        lambda x: x.reshape(12, 4).reshape(2, 6, 4),
    ],
)
def test_what_changes_nothing_disappears(function):
    assert targets(assert_same(function)) == []


def test_broadcasting_is_expanding():
    graph = assert_same(lambda x: torch.add(*torch.broadcast_tensors(x, x[:, :1].broadcast_to(2, 1, 4))))
    assert targets(graph) == ["slice.Tensor", "expand.default", "add.Tensor"]


def test_operators_of_python_have_names_that_python_allows():
    graph = assert_same(lambda x: x * ((x > 1) & (x < 5) | (x > 6)))
    assert [op.name for op in graph.ops if op.target.startswith("aten.bitwise")] == [
        "bitwise_and",
        "bitwise_or",
    ]


def test_biases_are_added_apart():
    linear = nn.Linear(4, 3, dtype=torch.float64)

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    graph = graphs.capture(Biased(), {"x": X}).graph
    assert [(op.target, op.module) for op in graph.ops] == [
        ("aten.linear.default", "linear"),
        ("aten.add.Tensor", "linear"),
    ]


def test_rows_flattened_for_a_product_are_restored():
    weight = torch.randn(4, 5, dtype=torch.float64)
    graph = assert_same(lambda x: torch.addmm(weight[0, :5], x.view(-1, 4), weight).view(2, 6, 5).relu())
    assert targets(graph)[-3:] == ["matmul.default", "add.Tensor", "relu.default"]
    assert "reshape.default" not in targets(graph)


def writes_through_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] += 1
    return y * x


def writes_through_select_and_transpose(x: Tensor) -> Tensor:
    y = x * 1.5
    y.transpose(1, 2)[:, 0].mul_(3)
    return y


def reads_view_after_write(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(2, 24)
    y.mul_(2)
    y.add_(view.reshape(2, 6, 4))
    return view


def copies_before_write(x: Tensor) -> Tensor:
    y = x.clone()
    z = y * 1
    y.zero_()
    return z + y


def writes_a_part(x: Tensor) -> Tensor:
    y = torch.ones(2, 6, 4, dtype=x.dtype)
    first, second = y.split([2, 4], dim=1)
    second.copy_(torch.arange(4))
    return x * y + first.sum()


def fills(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1] = x[:, 2]
    y.masked_fill_(y > 3, 3.0)
    y[0].fill_(2.0)
    return y + x


def leaves_a_view_as_it_is(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout((x * 2).flatten(1), 0.0, inplace=True)


def integer_steps(x: Tensor) -> Tensor:
    index = torch.arange(6)
    index[2:] -= 2
    return x[:, index]


@pytest.mark.parametrize(
    "function",
    [
        writes_through_slice,
        writes_through_select_and_transpose,
        reads_view_after_write,
        copies_before_write,
        writes_a_part,
        fills,
        leaves_a_view_as_it_is,
        integer_steps,
    ],
)
def test_in_place_operators_become_functional(function):
    graph = assert_same(function)
    for op in graph.ops:
        assert not any(
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in graphs.resolve(op.target)._schema.arguments
        ), op.target


def test_a_region_without_gradients_is_detached():
    def half_frozen(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.square().sum()
        return x * scale

    graph = assert_same(half_frozen)
    assert not graph.tensors["sum"].requires_grad


def test_sizes_are_plain_and_devices_are_left_out():
    graph = assert_same(
        lambda x: x + torch.arange(4, device=x.device, dtype=x.dtype).view(1, -1).expand(6, -1)
    )
    for op in graph.ops:
        assert not {"device", "pin_memory", "layout"} & op.kwargs.keys()
