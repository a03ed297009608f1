"""Indexing by the numbers of all rows keeps the rows apart, and picks what it picked before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs.rules import rule_for

X = torch.arange(2 * 6 * 4, dtype=torch.float64).reshape(2, 6, 4) / 7
PLACES = torch.tensor([4, -2])
SEVERAL = torch.tensor([[0, 3, 3], [5, -1, 1]])


class Lookup(nn.Module):
    """A lookup in a product with a weight, so that there is a gradient to compare."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.function(x * self.weight, places)


def captured(function, places: Tensor) -> graphs.OpGraph:
    """The graph of a lookup, after checking value and gradient against the module."""
    module = Lookup(function)
    graph = graphs.capture(module, {"x": X, "places": places}).graph
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    result = graphs.run(graph, {"x": X, "places": places, "weight": weight})[graph.outputs[0]]
    expected = module(X, places)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result.square().sum(), weight)
    (true,) = torch.autograd.grad(expected.square().sum(), module.weight)
    torch.testing.assert_close(gradient, true)
    return graph


def rows_are_apart(graph: graphs.OpGraph) -> bool:
    """Whether every op from the first product on has a factor for the rows that may be split."""
    for op in graph.ops:
        if graph.tensors[op.output].shape[:1] == (2,):
            rule = rule_for(op, graph)
            if not rule.results[0][0] or rule.results[0][0][0] in rule.unsplittable:
                return False
    return True


@pytest.mark.parametrize(
    ("function", "places"),
    [
        (lambda x, i: x[torch.arange(2), i], PLACES),
        (lambda x, i: x[torch.arange(2), i.int()], PLACES),
        (lambda x, i: x[torch.arange(2)[:, None], i], SEVERAL),
        (lambda x, i: x[..., 0][torch.arange(2), i], PLACES),
        (lambda x, i: x[torch.arange(2), x[..., 0].argmax(1)], PLACES),
    ],
)
def test_an_element_of_each_row_is_a_gather(function, places):
    graph = captured(function, places)
    targets = {op.target for op in graph.ops}
    assert "aten.gather.default" in targets
    assert "aten.index.Tensor" not in targets


def test_a_gather_can_be_split_along_the_rows():
    graph = captured(lambda x, i: x[torch.arange(2), i], PLACES)
    assert rows_are_apart(graph)


def test_all_elements_are_a_reshape():
    graph = captured(lambda x, i: x[torch.arange(2)[:, None, None], torch.arange(6)], PLACES)
    assert [op.target for op in graph.ops if op.module == ""][-1] == "aten.reshape.default"
    assert "aten.index.Tensor" not in {op.target for op in graph.ops}
    assert rows_are_apart(graph)


@pytest.mark.parametrize(
    ("function", "places"),
    [
        (lambda x, i: x[torch.arange(2) * 0, i], PLACES),
        (lambda x, i: x[torch.arange(1, -1, -1), i], PLACES),
        (lambda x, i: x[:, i], PLACES),
        (lambda x, i: x[torch.arange(2)[:, None], i], PLACES),
        (lambda x, i: x[i], PLACES % 2),
        (lambda x, i: x[torch.arange(2), :, i], PLACES - 1),
        (lambda x, i: x[torch.arange(6)[:, None] % 2, torch.arange(6)], PLACES),
    ],
)
def test_other_indexing_stays(function, places):
    assert "aten.index.Tensor" in {op.target for op in captured(function, places).ops}
