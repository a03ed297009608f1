"""Repeated blocks are found by what they do, at the outermost level that repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs import OpGraph, Ref
from graphs.ir import map_refs
from tests.models import BERT, GPT2, LLAMA, case, hugging_face, language


def classes(graph: OpGraph) -> list[tuple[str, int]]:
    return [(block.path, block.block_class) for block in graph.blocks]


@pytest.mark.parametrize(
    ("item", "container"),
    [(GPT2, "transformer.h"), (LLAMA, "model.layers"), (BERT, "bert.encoder.layer")],
    ids=str,
)
def test_layers_of_a_transformer(item, container):
    graph = graphs.capture(item.build(), item.inputs).graph
    assert classes(graph) == [(f"{container}.0", 0), (f"{container}.1", 0)]
    first, second = graph.blocks
    assert first.stop == second.start
    for block in graph.blocks:
        inside = [op.module.startswith(block.path) for op in graph.ops[block.start : block.stop]]
        assert all(inside)
    others = [*graph.ops[: first.start], *graph.ops[second.stop :]]
    assert not any(op.module.startswith(container) for op in others)


def test_layers_that_differ_in_their_mask_alone_are_one_class():
    # Sliding and full attention read masks made outside; what they do with them is the same.
    settings = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    gemma = hugging_face(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        language,
        **settings,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    graph = graphs.capture(gemma.build(), gemma.inputs).graph
    assert classes(graph) == [(f"model.layers.{index}", 0) for index in range(4)]


class TwoKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU() if index % 2 else nn.Tanh()) for index in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in self.layers:
            x = layer(x)
        return x.sum()


class Branches(nn.Module):
    """Query, key and value do the same, side by side: no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) * self.key(x) * self.value(x)).sum()


class Chain(nn.Module):
    """Named modules, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.head(x))).sum()


def test_a_constant_apart_is_another_class():
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(8, 8), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    model = nn.Sequential(nn.Linear(8, 8), *(Scaled(scale) for scale in (0.5, 0.25, 0.5, 0.25)))
    graph = graphs.capture(model, {"input": torch.randn(4, 8)}).graph
    assert classes(graph) == [("1", 0), ("2", 1), ("3", 0), ("4", 1)]


def test_two_kinds_of_layers_named_chains_and_branches():
    inputs = {"x": torch.randn(4, 8)}
    graph = graphs.capture(TwoKinds(), inputs).graph
    found = classes(graph)
    assert {path for path, number in found if number == found[-1][1]} == {"layers.1", "layers.3", "layers.5"}
    assert classes(graphs.capture(Branches(), inputs).graph) == []
    assert classes(graphs.capture(Chain(), inputs).graph) == [("first", 0), ("second", 0)]


def test_instances_correspond_op_by_op():
    graph = graphs.capture(LLAMA.build(), LLAMA.inputs).graph
    first, second = graph.blocks
    for offset in range(first.stop - first.start):
        index = graph.representative[second.start + offset]
        assert index == first.start + offset
        assert graph.ops[index].target == graph.ops[second.start + offset].target


def test_rewritten_graphs_have_blocks_too():
    """It reads nothing but the graph: names may change, and an op may be added to every instance."""
    graph = graphs.capture(case("mlp").build(), case("mlp").inputs).graph
    ops = []
    for op in graph.ops:
        args = map_refs(op.args, lambda name: Ref(name + "'") if name in graph.producer else Ref(name))
        op = replace(op, args=args, outputs=tuple(name + "'" for name in op.outputs))
        if op.target == "aten.linear.default":
            op = replace(op, target="autopar.linear")
        ops.append(op)
    tensors = {
        (name + "'" if name in graph.producer else name): tensor for name, tensor in graph.tensors.items()
    }
    again = graphs.find_blocks(replace(graph, ops=tuple(ops), tensors=tensors, blocks=()))
    assert again == graph.blocks
