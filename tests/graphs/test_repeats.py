"""Capturing a few instances of what repeats gives the very graph of the whole model, or is not done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs import Capture
from graphs.repeats import find_runs
from tests.models import SPECIAL, TEXT, Case, case, hugging_face, language

DEEP = {**TEXT, "num_hidden_layers": 6}


def whole(model: nn.Module, item: Case, monkeypatch) -> Capture:
    with monkeypatch.context() as patch:
        patch.setattr("graphs.periods.MIN_INSTANCES", 1000)
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


def by_turns(model: str, config: str, kinds: list[str], **settings) -> Case:
    """Layers with and without a window."""
    return hugging_face(
        f"{model}ForCausalLM",
        config,
        language,
        **{**TEXT, **SPECIAL, "num_hidden_layers": len(kinds)},
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4,
        layer_types=[f"{kind}_attention" for kind in kinds],
        attn_implementation="eager",
        **settings,
    )


@pytest.mark.parametrize(
    ("item", "period", "num_layers"),
    [
        (by_turns("GptOss", "GptOssConfig", ["sliding", "full"] * 5, num_local_experts=4), 2, 10),
        (by_turns("Gemma2", "Gemma2Config", ["sliding", "full"] * 5 + ["sliding"]), 2, 11),
        (by_turns("Gemma3", "Gemma3TextConfig", ["sliding", "sliding", "full"] * 5 + ["sliding"] * 2), 3, 17),
    ],
    ids=str,
)
def test_kinds_of_layers_by_turns_equal_the_whole_export(
    item: Case, period: int, num_layers: int, monkeypatch
):
    model = item.build()
    (run,) = find_runs(model)
    assert (run.period, run.length) == (period, 5)
    short = graphs.capture(model, item.inputs)
    assert [block.path for block in short.graph.blocks] == [f"model.layers.{i}" for i in range(num_layers)]
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


class ByTurns(Stack):
    """Two kinds of layers, and one left over."""

    def __init__(self, depth: int = 13) -> None:
        super().__init__(depth, scales=[1.5, 2.5] * (depth // 2) + [1.5])


class ListedByTurns(Stack):
    """Layers are identical; a list in the parent says which one reads what, by the position of the layer."""

    def __init__(self) -> None:
        super().__init__(depth=13)
        self.kinds = ["shared", "own"] * 6 + ["shared"]
        self.numbers = list(range(13))

    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        own = torch.sin(shared)
        for index, layer in enumerate(self.layers):
            x = layer(x, shared if self.kinds[index] == "shared" else own)
        return self.head(x).sum()


class ListedInHalves(ListedByTurns):
    """Layers left out of the first half would let the second read the entries of the first."""

    def __init__(self) -> None:
        Stack.__init__(self, depth=20, scales=[1.0] * 10 + [2.0] * 10)
        self.kinds = ["shared"] * 10 + ["own"] * 10


class ReachingBack(ByTurns):
    """Every layer also reads the one of its kind before."""

    def forward(self, x: Tensor) -> Tensor:
        x = before = shared = self.embed(x)
        for layer in self.layers:
            before, x = x, layer(x, shared) * before
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


KINDS = [
    Stack,
    Collecting,
    Indexed,
    Counting,
    Listed,
    Jumping,
    ByTurns,
    ListedByTurns,
    ListedInHalves,
    ReachingBack,
]


@pytest.mark.parametrize("kind", KINDS)
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


def test_the_period_of_a_run_is_the_one_that_leaves_most_out():
    def runs(model: nn.Module):
        return [(run.children[0], run.period, run.length) for run in find_runs(model)]

    def stack(pattern: str):
        return Stack(depth=len(pattern), scales=[float(ord(letter)) for letter in pattern])

    assert runs(stack("a" * 24)) == [("0", 1, 24)]
    assert runs(stack("ab" * 12)) == [("0", 2, 12)]
    assert runs(stack("d" + "aaab" * 6 + "aa")) == [("1", 4, 6)]
    assert runs(stack("aaaaab" * 6)) == [("0", 6, 6)]  # not the five in each
    assert runs(stack("aaaaaaaaab" * 3)) == [(first, 1, 9) for first in ("0", "10", "20")]
    assert runs(stack("aaaab" * 4)) == []  # too few
    assert runs(stack("abaabbaababb")) == []
    assert runs(ListedByTurns()) == [("0", 2, 6)]
    assert runs(ListedInHalves()) == [("10", 1, 10)]


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


class NothingBetween(ByTurns):
    def forward(self, x: Tensor) -> Tensor:
        x = shared = self.embed(x)
        for layer in self.layers:
            x = layer(x, shared)
        return self.head(x).sum()


@pytest.mark.parametrize(
    ("kind", "depth", "num_forwards"),
    [(NothingBetween, 9, 18), (NothingBetween, 13, 12), (NothingBetween, 41, 12), (ByTurns, 41, 21)],
)
def test_exported_layers_do_not_grow_with_depth(kind, depth: int, num_forwards: int, monkeypatch):
    """Three and two instances of two layers, four more where something is between them, and the one left over
    each time."""
    forward, calls = Layer.forward, []

    def counted(self: Layer, x: Tensor, shared: Tensor) -> Tensor:
        calls.append(self.index)
        return forward(self, x, shared)

    monkeypatch.setattr(Layer, "forward", counted)
    captured = graphs.capture(kind(depth), {"x": torch.ones(2, 8)})
    assert sum(op.target == "aten.tanh.default" for op in captured.graph.ops) == depth
    assert len(calls) == num_forwards
