"""Capturing a few instances of what repeats gives the very graph of the whole model, or is not done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs import Capture
from graphs.repeats import find_runs
from tests.models import TEXT, Case, case, hugging_face, language

DEEP = {**TEXT, "num_hidden_layers": 6}


def whole(model: nn.Module, item: Case, monkeypatch) -> Capture:
    with monkeypatch.context() as patch:
        patch.setattr("graphs.repeats.MIN_RUN", 1000)
        assert find_runs(model) == ()
        return graphs.capture(model, item.inputs)


DEEP_MODELS = [
    hugging_face(
        "LlamaForCausalLM", "LlamaConfig", language, **DEEP, intermediate_size=128, num_key_value_heads=2
    ),
    hugging_face(
        "GPT2LMHeadModel",
        "GPT2Config",
        language,
        n_embd=64,
        n_layer=7,
        n_head=4,
        vocab_size=128,
        bos_token_id=0,
        eos_token_id=1,
    ),
    hugging_face("BertForMaskedLM", "BertConfig", language, **DEEP, intermediate_size=128),
]


@pytest.mark.parametrize("item", DEEP_MODELS, ids=str)
def test_equals_the_whole_export(item: Case, monkeypatch):
    model = item.build()
    assert len(find_runs(model)) == 1
    short = graphs.capture(model, item.inputs)
    assert len(short.graph.blocks) == len(find_runs(model)[0].children)
    assert short == whole(model, item, monkeypatch)


class Layer(nn.Module):
    def __init__(self, index: int, scale: float = 1.0) -> None:
        super().__init__()
        self.index = index
        self.scale = scale
        self.linear = nn.Linear(8, 8)
        self.offset: Tensor
        self.register_buffer("offset", torch.full((8,), float(index)))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * self.scale * shared + self.offset * torch.tensor([2.0])


class Stack(nn.Module):
    """Layers with buffers and constants of their own, something shared, and something between layers."""

    def __init__(self, depth: int = 8, scales=None) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            Layer(index, 1.5 if scales is None else scales[index]) for index in range(depth)
        )
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        for layer in self.layers:
            x = layer(x, shared) + shared
        return self.head(x).sum()


class Collecting(Stack):
    def forward(self, x: Tensor) -> Tensor:
        shared = self.embed(x)
        total = shared
        for layer in self.layers:
            x = layer(x, shared)
            total = total + x
        return total.sum()


class Indexed(Stack):
    """The index of a layer is in its constants, though its module does not show it."""

    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = layer(x, shared) * (1.0 / (layer.index + 1))
        return x.sum()


class Counting(Stack):
    """The number of layers is in a constant."""

    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        for layer in self.layers:
            x = layer(x, shared) * (1.0 / len(self.layers))
        return x.sum()


class Listed(Stack):
    """A list in the parent says what each layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        for layer, factor in zip(self.layers, self.factors, strict=False):
            x = layer(x, shared) * factor
        return x.sum()


class Jumping(Stack):
    """The head reads a layer in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        kept = x
        for layer in self.layers:
            x = layer(x, shared)
            if layer.index == 1:
                kept = x
        return (self.head(x) * kept).sum()


@pytest.mark.parametrize("kind", [Stack, Collecting, Indexed, Counting, Listed, Jumping])
def test_whatever_tells_layers_apart_is_seen(kind, monkeypatch):
    model = kind()
    item = Case("stack", kind, lambda batch: {"x": torch.ones(batch, 8)})
    captured, true = graphs.capture(model, item.inputs), whole(model, item, monkeypatch)
    assert captured == true
    for buffer, other in zip(captured.graph.buffers, true.graph.buffers, strict=True):
        torch.testing.assert_close(buffer.value, other.value)


def test_runs_are_of_identical_modules():
    def runs(model: nn.Module):
        return [(run.container, run.children) for run in find_runs(model)]

    assert runs(Stack()) == [("layers", tuple("01234567"))]
    assert runs(Stack(scales=[1.0] * 3 + [2.0] * 5)) == [("layers", tuple("34567"))]
    assert runs(Stack(depth=4)) == []
    assert runs(Listed()) == []
    tied = Stack()
    tied.layers[6].linear = tied.layers[5].linear
    assert runs(tied) == [("layers", tuple("01234"))]


def test_the_model_gets_its_layers_back_also_after_an_error():
    class Failing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = Failing()
    layers = list(model.layers)
    with pytest.raises(graphs.CaptureError, match="no"):
        graphs.capture(model, {"x": torch.ones(2, 8)})
    assert list(model.layers) == layers
    assert list(model.layers._modules) == list("01234567")


def test_depth_costs_little():
    """A hundred layers are captured from a few: op count grows, export does not."""
    deep = case("mlp").build().__class__(width=16, depth=100)
    captured = graphs.capture(deep, {"x": torch.ones(2, 16), "target": torch.ones(2, 16)})
    assert sum(op.target == "aten.linear.default" for op in captured.graph.ops) == 100
    assert len(captured.graph.parameters) == 200
    assert captured.graph.parameters[-1].name == "layers.99.bias"
