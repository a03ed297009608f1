"""Which layers are called in one loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphs
from autopar.plan import Parallelism, Recomputation
from autopar.rewrite.program import rewrite
from tests.autopar.random_plans import random_plan


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


class Stack(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Layer(width) for width in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x**2).mean()}


@pytest.mark.parametrize("widths", [[16, 16, 16, 32], [32, 16, 16, 16]])
def test_layers_that_are_no_blocks_have_no_part_in_a_loop_of_those_that_compute_again(
    widths: list[int],
) -> None:
    """From without they are alike, but they are not told what to keep."""
    capture = graphs.capture(Stack(widths), lambda batch: {"x": torch.randn(batch, 8)})
    blocks = tuple(block.path for block in capture.graph.blocks)
    assert len(blocks) == 3
    plan = random_plan(capture, Parallelism(microbatch_size=2, num_microbatches=1), 0)
    again = Recomputation(blocks=blocks, mode="full")
    source = rewrite(capture, plan.model_copy(update={"recomputation": (again,)})).files["model.py"]
    assert source.count("keep=keep_nothing") == 3
    assert source.count("@recomputable") == 1
