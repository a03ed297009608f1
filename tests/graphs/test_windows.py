"""Windows of attention, which show in the graph only as a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

import graphs
from graphs.ir import OpGraph

WINDOW = 16


def tokens(batch: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(batch, 64, dtype=torch.long) for name in ("input_ids", "labels")}


def windows(graph: OpGraph) -> dict[str, int | None]:
    """By the module of every fused attention; all other ops have none."""
    found = {op.module: op.window for op in graph.ops if "scaled_dot_product" in op.target}
    assert all(op.window is None for op in graph.ops if op.module not in found)
    return found


def test_every_second_attention_of_gpt_oss_has_a_window() -> None:
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 128, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
        "use_cache": False, "attn_implementation": "flex_attention",
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    config = GptOssConfig(**settings)
    with torch.device("meta"):
        model = GptOssForCausalLM(config).bfloat16()
    capture = graphs.capture(model.train(), tokens, name="gpt-oss")
    expected = {"model.layers.0.self_attn": WINDOW, "model.layers.1.self_attn": None}
    for batch in (1, 2, 4):
        assert windows(capture.at(batch)) == expected


class Attention(nn.Module):
    def __init__(self, sliding_window: object) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.project = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x)
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Model(nn.Module):
    def __init__(self, *sliding_windows: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Attention, sliding_windows))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.sum()}


def test_a_window_is_a_number_of_keys_or_it_is_none() -> None:
    model = Model(8, None, "all", 24)
    capture = graphs.capture(model, {"x": torch.zeros(2, 4, 64, 32)}, name="windows")
    assert list(windows(capture.graph).values()) == [8, None, None, 24]
