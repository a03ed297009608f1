"""Dropout: other random numbers where ranks hold other parts of a tensor, the same for the same."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.plan import Parallelism
from autopar.runtime.drawing import drawn_apart
from graphs import capture
from tests.autopar.rank_pool import shared_pool
from tests.models import case

DRIVER = Path(__file__).with_name("draws_on_ranks.py")
PLANS: dict[str, dict[str, object]] = {
    "tp": {"tp": 2, "sequence_parallel": False},
    "tp-sequence": {"tp": 2, "sequence_parallel": True},
    "dp": {"dp_replicate": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2, "num_microbatches": 2},
}


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_drop_out_other_numbers_and_copies_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = case("gpt2").build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    captured = capture(model, case("gpt2").inputs, name="gpt2")
    verdicts = {}
    for name, degrees in PLANS.items():
        parallelism = Parallelism.model_validate({"microbatch_size": 2, **degrees})
        plan = autopar.evaluate(captured, "local-cpu*2", parallelism=parallelism)
        program = autopar.compile(captured, plan)
        directory = program.save(tmp_path / name)
        autopar.save_reference(program, model, case("gpt2").inputs, directory)
        has_own = "drawn_apart(self.tp, lambda: F.dropout(" in program.source
        assert has_own == (name == "tp-sequence")
        whole = ["2x16x64"] if "tp" in name else []
        outcome = shared_pool().run(DRIVER, 2, directory, name.partition("-")[0], *whole)
        verdicts[name] = f"{outcome.verdict} {outcome.output}".strip()
    assert verdicts == dict.fromkeys(PLANS, "equal")


class Tabled(nn.Module):
    """Drops out a table that all samples share, and a summary that all positions share."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 8)
        self.places = nn.Parameter(torch.randn(16, 8))
        self.score = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.tokens(tokens) + F.dropout(self.places, 0.5)
        summary = F.dropout(F.dropout(x, 0.5).tanh().mean(1), 0.5)
        return F.mse_loss(self.score(summary), target)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("axis", "whole"), [("dp_replicate", ["16x8"]), ("cp", ["16x8", "2x8"])])
def test_what_is_whole_along_data_and_context_axes_is_dropped_out_alike(
    tmp_path: Path, axis: str, whole: list[str]
) -> None:
    def inputs(batch: int) -> dict[str, Tensor]:
        return {"tokens": torch.arange(16 * batch).view(batch, 16) % 32, "target": torch.randn(batch, 8)}

    torch.manual_seed(0)
    model = Tabled()
    parallelism = Parallelism.model_validate({"microbatch_size": 2, axis: 2})
    captured = capture(model, inputs, name="tabled")
    plan = autopar.evaluate(captured, "local-cpu*2", parallelism=parallelism)
    program = autopar.compile(captured, plan)
    directory = program.save(tmp_path / axis)
    autopar.save_reference(program, model, inputs, directory)
    outcome = shared_pool().run(DRIVER, 2, directory, axis, *whole)
    assert f"{outcome.verdict} {outcome.output}".strip() == "equal", program.source


def test_ranks_draw_apart_and_then_together_again() -> None:
    def rank(number: int) -> list[torch.Tensor]:
        torch.manual_seed(1)
        group = Mock(rank=lambda: number)
        return [drawn_apart(group, lambda: torch.rand(8)) for _ in range(2)] + [torch.rand(8)]

    first, second = rank(0), rank(1)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[2], second[2])
    assert all(torch.equal(one, again) for one, again in zip(first, rank(0), strict=True))
