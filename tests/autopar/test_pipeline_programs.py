"""Programs of pipelines as text, and the stages that they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import RewriteError
from autopar.plan import Parallelism
from autopar.rewrite.program import Program, rewrite
from costmodel import ScheduleName
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES
from graphs import Capture, capture
from tests.autopar.random_plans import random_plan, with_random_cuts


class Shared(nn.Module):
    """One linear layer that is applied over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = torch.tanh(self.layer(x))
        return x.square().mean()


class Chain(nn.Module):
    """Linear layers, then a long tail without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for _ in range(4):
            x = torch.tanh(x)
        return x.square().mean()


def captured(model: nn.Module) -> Capture:
    return capture(model, lambda batch: {"x": torch.randn(batch, 8)})


def program(model: nn.Module, schedule: ScheduleName, num_virtual_stages: int, starts: list[int]) -> Program:
    """The program whose stages begin at the ops with these numbers."""
    whole = captured(model)
    parallelism = Parallelism(
        pp=2, num_microbatches=4, schedule=schedule, num_virtual_stages=num_virtual_stages
    )
    plan = with_random_cuts(random_plan(whole, parallelism, 0), whole.graph, 0)
    stages = [
        stage.model_copy(update={"first_op": whole.graph.ops[start].name})
        for stage, start in zip(plan.stages, starts, strict=True)
    ]
    return rewrite(whole, plan.model_copy(update={"stages": tuple(stages)}))


@pytest.mark.parametrize(
    ("schedule", "ranks"), [("LoopedBFS", [0, 1, 0, 1]), ("ZBVZeroBubble", [0, 1, 1, 0])]
)
def test_a_v_gives_its_first_rank_both_ends(schedule: ScheduleName, ranks: list[int]) -> None:
    train = program(Chain(), schedule, 2, [0, 3, 6, 9]).files["train.py"]
    assert f"RANKS_OF_STAGES = {ranks}" in train


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", *sorted(SPLIT_BACKWARD_SCHEDULES)])
def test_only_schedules_that_split_backwards_leave_weights(schedule: ScheduleName) -> None:
    made = program(Chain(), schedule, 2, [0, 3, 6, 9])
    splits = schedule in SPLIT_BACKWARD_SCHEDULES
    assert made.source.count("deferred_linear(x, ") == (4 if splits else 0)
    for file in ("train.py", "autopar_runtime.py"):
        assert ("leave_weights" in made.files[file]) == splits


def test_a_rank_without_parameters_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"rank 1 would train nothing: stages 2 of 2 hold no parameters"):
        program(Chain(), "GPipe", 1, [0, 13])


def test_two_copies_under_one_name_on_a_rank_are_refused() -> None:
    program(Shared(), "GPipe", 1, [0, 6])
    with pytest.raises(RewriteError, match=r"rank 0 would hold layer.weight twice: .* \(1, 3 of 4\)"):
        program(Shared(), "LoopedBFS", 2, [0, 6, 12, 18])
