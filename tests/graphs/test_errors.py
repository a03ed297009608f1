"""What cannot be captured is refused with the op, the module and what to do, not with torch's traceback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import graphs
from graphs import CaptureError, DataDependentError, GraphError, UnsupportedOpError

INPUTS = {"x": torch.randn(4, 8)}


class Inner(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def model(function) -> nn.Module:
    return nn.ModuleDict({"inner": Inner(function)})


class Outer(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.inner = Inner(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sum()


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def selects(x: Tensor) -> Tensor:
    return x[x > 0]


def loops(x: Tensor) -> Tensor:
    for _ in range(int(x.sum().item())):
        x = x + 1
    return x


def fails(x: Tensor) -> Tensor:
    return x.reshape(7, 7)


def casts(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.mT


def strided(x: Tensor) -> Tensor:
    x = x * 1.5
    x.as_strided((4, 4), (8, 1)).add_(1)
    return x


class Reversed(Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Cubed(Function):
    """An honest backward, with saved tensors and an argument that is no tensor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * x**2 * gradient, None


class SeparateContext(Function):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize("function", [branches, selects, loops])
def test_dependence_on_values(function):
    with pytest.raises(DataDependentError, match="depends on the values") as caught:
        graphs.capture(Outer(function), INPUTS)
    assert caught.value.module == "inner"
    assert caught.value.source is not None
    assert "test_errors.py" in caught.value.source
    assert "what to do" in str(caught.value)


def test_a_model_that_does_not_run():
    with pytest.raises(CaptureError, match="shape") as caught:
        graphs.capture(Outer(fails), INPUTS)
    assert caught.value.module == "inner"
    assert "x.reshape(7, 7)" in str(caught.value)


def test_a_missing_argument():
    with pytest.raises(CaptureError, match="missing"):
        graphs.capture(Outer(torch.relu), {"y": INPUTS["x"]})


def test_autocast_inside_forward():
    with pytest.raises(UnsupportedOpError, match="autocast") as caught:
        graphs.capture(Outer(casts), INPUTS)
    assert "bfloat16" in str(caught.value)


def test_a_write_through_a_view_that_cannot_be_undone():
    with pytest.raises(UnsupportedOpError, match="as_strided") as caught:
        graphs.capture(Outer(strided), INPUTS)
    assert caught.value.module == "inner"


def test_a_custom_function_with_a_backward_of_its_own_is_refused():
    with pytest.raises(UnsupportedOpError, match=r"Reversed.*not the derivative") as caught:
        graphs.capture(Outer(Reversed.apply), INPUTS)
    assert caught.value.module == "inner"
    assert "custom_op" in str(caught.value)


@pytest.mark.parametrize("function", [lambda x: Cubed.apply(x, 0.5), SeparateContext.apply])
def test_a_custom_function_with_an_honest_backward_is_captured(function):
    module = Outer(function)
    graph = graphs.capture(module, INPUTS).graph
    values = {item.tensor: module.get_parameter(item.name) for item in graph.parameters}
    torch.testing.assert_close(
        graphs.run(graph, {**values, "x": INPUTS["x"][:2]})[graph.outputs[0]], module(INPUTS["x"][:2])
    )


def test_one_tree_of_errors():
    assert issubclass(DataDependentError, CaptureError)
    assert issubclass(UnsupportedOpError, CaptureError)
    assert issubclass(CaptureError, GraphError)
    assert issubclass(GraphError, ValueError)


def test_inputs_without_a_batch():
    with pytest.raises(CaptureError, match="batch"):
        graphs.capture(Outer(torch.relu), {"x": torch.tensor(1.0)})


def test_batches_below_one():
    captured = graphs.capture(Outer(torch.relu), INPUTS)
    with pytest.raises(CaptureError, match="at least 1, got 0"):
        captured.at(0)
