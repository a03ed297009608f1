"""What people have found out about parallel training, the search finds by itself.

Each problem leaves an idea as the best answer; at most the degrees are pinned, never the idea.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from autopar import api
from autopar.plan import Plan
from graphs import Capture
from hardware_db import Cluster
from tests.autopar.small_models import cluster, tower

ATTENTION = "scaled_dot_product_attention"
ROWS, HEADS = "s", "h"
"""Factors of attention, see `graphs.rules.attention`."""


class Attention(nn.Module):
    """Causal attention with a residual; every key head serves `heads / key_heads` query heads."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        head_dim = width // heads
        self.heads, self.key_heads = heads, key_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_heads * head_dim, bias=False)
        self.value = nn.Linear(width, key_heads * head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        query = self.query(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            project(y).unflatten(-1, (self.key_heads, -1)).transpose(1, 2)
            for project in (self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.key_heads < self.heads
        )
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """An embedding, two attentions, and a head with its loss."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, width)
        self.layers = nn.ModuleList(Attention(width, heads, key_heads) for _ in range(2))
        self.head = nn.Linear(width, 512, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


@cache
def decoder(key_heads: int, width: int = 512, heads: int = 16, sequence: int = 4096) -> Capture:
    with torch.device("meta"):
        model = Decoder(width, heads, key_heads)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(batch, sequence, dtype=torch.long) for name in ("tokens", "labels")}

    return graphs.capture(model, inputs, name="decoder")


def planned(model: Capture, machine: Cluster, global_batch: int, **pins: Any) -> Plan:
    return api.plan(model, machine, global_batch=global_batch, **pins)


@cache
def one_sample_on_four_devices() -> Plan:
    """One sample cannot be shared, and there are no stages: what is left is the tensor axis."""
    return planned(tower(), cluster(4), 1, pp=1)


def test_columns_then_rows() -> None:
    """Megatron-LM, arXiv:1909.08053, section 3: the first product of a pair by columns, the second by rows,
    and what is between them without communication. A weight is [out, in]."""
    plan = one_sample_on_four_devices()
    assert plan.parallelism.tp == 4
    assert plan.placements["layers.*.up.weight"] == "tp S(0)"
    assert plan.placements["layers.*.down.weight"] == "tp S(1)"
    assert plan.strategies["tp"]["relu"] == "d2"


def test_the_sequence_is_split_between_the_products() -> None:
    """Sequence parallelism, arXiv:2205.05198, section 4.2.2: norms and residuals lie [batch, sequence, width]
    and are split by the sequence."""
    strategies = one_sample_on_four_devices().strategies["tp"]
    assert strategies["layer_norm"] == strategies["add_1"] == "d1"


def test_many_heads_and_slow_links_go_from_sequence_to_heads() -> None:
    """Ulysses, arXiv:2309.14509, section 3: of N ranks each sends 4/N of a tensor and receives as much, where
    gathering keys and values receives almost two whole ones."""
    plan = planned(decoder(key_heads=16), cluster(4, per_node=1), 1, cp=4, tp=1, pp=1, space="whole")
    assert plan.strategies["cp"][ATTENTION] == HEADS


def test_few_key_heads_are_gathered() -> None:
    """Llama 3, arXiv:2407.21783, section 3.3.2: keys and values are small beside queries, gathering them is
    cheap."""
    plan = planned(decoder(key_heads=4), cluster(4, per_node=1), 1, cp=4, tp=1, pp=1, space="whole")
    assert plan.strategies["cp"][ATTENTION] == ROWS


@pytest.mark.parametrize(("memory_bytes", "stages"), [(16e9, {0, 1, 2}), (120e6, {3})])
def test_parameters_are_sharded_only_when_memory_binds(memory_bytes: float, stages: set[int]) -> None:
    """ZeRO, arXiv:1910.02054, section 5: its third stage moves half as much again as the others."""
    plan = planned(tower(), cluster(4, memory_bytes), 16, tp=1, pp=1)
    assert plan.parallelism.zero_stage in stages
    assert plan.prediction.peak_memory_bytes <= memory_bytes


def test_a_large_bubble_is_interleaved() -> None:
    """arXiv:2104.04473, section 2.2: v stages on each rank make the bubble v times smaller. With as many
    microbatches as stages it is nearly half of the step."""
    microbatches = {"tp": 1, "pp": 4, "microbatch_size": 1}
    plan = planned(tower(depth=16), cluster(4), 4, **microbatches)
    plain = planned(tower(depth=16), cluster(4), 4, **microbatches, schedule="1F1B")
    assert plan.parallelism.num_virtual_stages > 1
    assert plan.prediction.step_s < plain.prediction.step_s


def test_early_stages_compute_more_again() -> None:
    """arXiv:2205.05198, section 5: in 1F1B stage i of p holds the activations of p - i microbatches, so the
    first is short of memory, and the last has it to spare."""
    memory_bytes = 400e6
    plan = planned(
        tower(depth=16, sequence=1024), cluster(4, memory_bytes), 16, tp=1, pp=4, microbatch_size=2,
        schedule="1F1B",
    )  # fmt: skip
    stage_of = {path: stage.index for stage in plan.stages for path in layers(stage.modules)}
    again = [stage_of[path] for each in plan.recomputation for path in each.blocks]
    shares = [again.count(stage) / list(stage_of.values()).count(stage) for stage in range(4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    assert plan.prediction.peak_memory_bytes <= memory_bytes


def layers(modules: tuple[str, ...]) -> list[str]:
    """Paths of the layers that a stage names in ranges, such as `layers.4-7`."""
    ranges = [path.removeprefix("layers.").split("-") for path in modules if path.startswith("layers.")]
    return [
        f"layers.{index}"
        for first, *last in ranges
        for index in range(int(first), int((last or [first])[0]) + 1)
    ]
