"""Random ops: other numbers where ranks hold other parts of a tensor, the same for the same."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.plan import Parallelism
from autopar.rewrite.draws import is_random
from autopar.runtime.drawing import drawn_apart, drawn_together, seed_ranks
from graphs import capture
from graphs.ir import Op, Ref
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


def test_ranks_with_numbers_of_their_own_draw_together_and_then_apart_again() -> None:
    def rank(place: int, common: int = 5) -> list[Tensor]:
        seed_ranks(common, place)
        own = torch.rand(8 + place)[:8]  # of which ranks may draw more or less
        together = [drawn_together(lambda: torch.rand(8)) for _ in range(2)]
        return [own, *together, torch.rand(8)]

    first, second = rank(0), rank(1)
    alike = [torch.equal(one, other) for one, other in zip(first, second, strict=True)]
    assert alike == [False, True, True, False]
    for draws in (first, second, [first[1], rank(0, common=6)[1]]):
        assert not any(torch.equal(one, other) for one, other in combinations(draws, 2))


def test_recomputation_draws_together_what_was_drawn() -> None:
    def block(x: Tensor) -> Tensor:
        y = x * drawn_together(lambda: torch.rand(8))
        found.append(y.detach())
        return y.exp()

    found: list[Tensor] = []
    seed_ranks(5, 1)
    x = torch.ones(8, requires_grad=True)
    for _ in range(2):
        x = checkpoint(block, x, use_reentrant=False)
    x.sum().backward()
    first, second, second_again, first_again = found
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)


@pytest.mark.parametrize(
    ("target", "args", "draws"),
    [
        ("aten.dropout.default", (0.1, True), True),
        ("aten.dropout.default", (0.0, True), False),
        ("aten.dropout.default", (0.1, False), False),
        ("aten.lstm.input", ([], [], True, 2, 0.1, True, False, True), True),
        ("aten.lstm.input", ([], [], True, 2, 0.0, True, False, True), False),
        ("aten.gru.input", (Ref("h"), [], True, 2, 0.1, False, False, True), False),
        ("aten.scaled_dot_product_attention.default", (Ref("k"), Ref("v"), None, 0.1), True),
        ("aten.scaled_dot_product_attention.default", (Ref("k"), Ref("v")), False),
        ("autopar.scaled_dot_product_attention", (Ref("k"), Ref("v"), None, 0.1), True),
        ("aten.randn_like.default", (), True),
        ("aten.relu.default", (), False),
    ],
)
def test_an_op_is_random_where_it_draws_numbers(target: str, args: tuple[object, ...], draws: bool) -> None:
    assert is_random(Op("op", target, (Ref("x"), *args), {}, ("y",), "")) == draws


class Denoising(nn.Module):
    """Its loss is free of the noise, if both that read it read the same. It is drawn for every sample, or
    once for all."""

    def __init__(self, *, is_shared: bool = False) -> None:
        super().__init__()
        self.is_shared = is_shared
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Parameter(torch.randn(8))
        self.double()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        noise = torch.randn_like(x.mean(0) if self.is_shared else x)
        return F.mse_loss((self.first(x) + noise) + self.second, target + 0.5 * noise + 0.5 * noise)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "degrees",
    [
        {"pp": 2, "num_microbatches": 2},
        {"pp": 2, "num_microbatches": 2, "recompute": "full"},
        {"tp": 2},
        {"cp": 2},
        {"dp_shard": 2, "zero_stage": 3},
    ],
    ids=str,
)
def test_noise_is_the_same_wherever_it_is_read(tmp_path: Path, degrees: dict[str, object]) -> None:
    directory, source = saved(Denoising(), degrees, tmp_path)
    assert source.count("randn_like.default(") == 1
    outcome = shared_pool().run(directory / "parity.py", 2)
    assert f"{outcome.verdict} {outcome.output}".startswith("equal"), source


def saved(model: Denoising, degrees: dict[str, object], directory: Path) -> tuple[Path, str]:
    """The program of a model and what the original does, in a directory, and its source."""

    def inputs(batch: int) -> dict[str, Tensor]:
        rows = torch.arange(8.0 * 16 * batch, dtype=torch.float64).view(batch, 16, 8)
        return {"x": rows.sin(), "target": rows.cos()}

    torch.manual_seed(0)
    parallelism = Parallelism.model_validate({"microbatch_size": 2, **degrees})
    captured = capture(model, inputs, name="denoising")
    plan = autopar.evaluate(captured, f"local-cpu*{parallelism.world_size}", parallelism=parallelism)
    program = autopar.compile(captured, plan)
    program.save(directory / "program")
    autopar.save_reference(program, model, inputs, directory / "program")
    return directory / "program", program.source


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_samples_share_and_positions_split_is_drawn_alike_and_apart(
    tmp_path: Path, recompute: str
) -> None:
    """Replicas draw the same noise, context ranks each its own part of it, compiled or not."""
    degrees: dict[str, object] = {"dp_replicate": 2, "cp": 2, "recompute": recompute}
    directory, source = saved(Denoising(is_shared=True), degrees, tmp_path)
    assert "drawn_together(lambda:drawn_apart(self.cp,lambda:" in "".join(source.split())
    outcome = shared_pool().run(directory / "parity.py", 4)
    assert f"{outcome.verdict} {outcome.output}".startswith("equal"), source
    found = shared_pool().run(DRIVER.with_name("noise_on_ranks.py"), 4, directory)
    assert (found.verdict, found.output) == ("equal", "")
