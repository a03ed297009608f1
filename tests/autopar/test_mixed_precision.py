"""Programs train in the precision that their plan was priced with: against one process that does the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import RewriteError
from autopar.plan import Parallelism
from autopar.rewrite.parity import reference
from autopar.rewrite.precision import precision_of
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.optimizers import MasterAdamW
from costmodel import optimizer_policy
from graphs import capture
from tests.autopar.programs_on_ranks import run
from tests.models import case

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FP32_GRADIENTS = "adamw-mixed-fp32-gradients"
OFFLOADED: dict[str, object] = {"offload": "optimizer"}
SPLIT_BACKWARD: dict[str, object] = {"schedule": "InterleavedZeroBubble", "num_virtual_stages": 2}

TRIALS: tuple[tuple[str, torch.dtype, str | None, dict[str, object]], ...] = (
    ("mlp", BF16, None, {"dp_replicate": 2, "num_microbatches": 2}),
    ("llama", BF16, None, {"dp_shard": 2, "zero_stage": 3, "num_microbatches": 2}),
    ("gpt2", BF16, FP32_GRADIENTS, {"dp_shard": 2, "zero_stage": 2, "num_microbatches": 2}),
    ("gpt2", BF16, FP32_GRADIENTS, {"dp_replicate": 2, "num_microbatches": 2}),
    ("bert", BF16, None, {"tp": 2}),
    ("gpt2", BF16, None, {"pp": 2, "num_microbatches": 2}),
    ("gpt2", BF16, None, {"dp_shard": 2, "zero_stage": 1, "num_microbatches": 2} | OFFLOADED),
    ("gpt2", BF16, None, {"dp_shard": 2, "zero_stage": 2, "num_microbatches": 2} | OFFLOADED),
    ("llama", BF16, None, {"dp_shard": 2, "zero_stage": 3, "num_microbatches": 2} | OFFLOADED),
    ("gpt2", BF16, FP32_GRADIENTS, {"dp_replicate": 2, "num_microbatches": 2} | OFFLOADED),
    ("llama", BF16, "adamw-bf16", {"dp_shard": 2, "zero_stage": 3}),
    ("gpt2", FP16, None, {"dp_replicate": 2, "num_microbatches": 2}),
    ("gpt2", FP16, None, {"pp": 2, "num_microbatches": 2}),
    ("llama", FP16, None, {"dp_shard": 2, "zero_stage": 3}),
    ("odd", BF16, None, {"dp_shard": 2, "zero_stage": 3, "num_microbatches": 2}),
    ("odd", BF16, None, {"dp_replicate": 2, "num_microbatches": 2}),
    (
        "gpt2",
        BF16,
        FP32_GRADIENTS,
        {"pp": 2, "num_virtual_stages": 2, "num_microbatches": 4} | SPLIT_BACKWARD,
    ),
)


class Odd(nn.Module):
    """A model with a parameter in single precision, and a scalar, among others: neither can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(16))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) * self.temperature
        return (x.float() * self.scale).square().mean()


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int], Mapping[str, object]]]:
    if name != "odd":
        return case(name).build().to(dtype), case(name).inputs
    model = Odd().to(dtype)
    model.scale.data = model.scale.data.float()
    return model, lambda batch: {"x": torch.randn(batch, 16, generator=torch.Generator().manual_seed(1))}


@pytest.mark.slow
@pytest.mark.distributed
def test_programs_equal_one_process_of_the_same_precision(tmp_path: Path) -> None:
    directories = [prepared(tmp_path / str(index), *trial) for index, trial in enumerate(TRIALS)]
    verdicts = run(directories, 2)
    assert [verdicts.get(str(each)) for each in directories] == ["equal"] * len(TRIALS)


def prepared(
    directory: Path, name: str, dtype: torch.dtype, policy: str | None, degrees: dict[str, object]
) -> Path:
    torch.manual_seed(0)
    model, inputs_of = built(name, dtype)

    def inputs(batch: int) -> dict[str, Any]:
        return {
            key: each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
            for key, each in inputs_of(batch).items()
        }

    parallelism = Parallelism.model_validate({"microbatch_size": 2, **degrees})
    captured = capture(model, inputs, name=name)
    on_device = parallelism.model_copy(update={"offload": "none"})  # a CPU has no price for another
    plan = autopar.evaluate(captured, "local-cpu*2", parallelism=on_device, policy=policy)
    plan = plan.model_copy(update={"parallelism": parallelism})
    program = autopar.compile(captured, plan)
    program.save(directory)
    autopar.save_reference(program, model, inputs, directory)
    return directory


def test_a_model_whose_own_gradients_overflow_is_no_reference() -> None:
    model = nn.Linear(4, 1, bias=False).to(FP16)
    precision = precision_of(optimizer_policy("adamw-mixed"), FP16)

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.inner, self.factor = model, factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.inner(x) * self.factor).mean()

    before = model.weight.detach().clone()
    batch = {"x": torch.ones(2, 4, dtype=FP16)}
    found = reference(Scaled(0.5), batch, 1, "output", precision=precision)["gradients"]
    assert isinstance(found, dict)
    assert found["inner.weight"].tolist() == [[0.5] * 4]
    with pytest.raises(RewriteError, match=r"overflow in float16 \(inner.weight, 1 of 1 .* loss scale 32768"):
        reference(Scaled(4.0), batch, 1, "output", precision=precision)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_wide_gradients_of_offloaded_shards_are_refused(tmp_path: Path, zero_stage: int) -> None:
    """`fully_shard` would round them to the dtype of the shards."""
    degrees = {"dp_shard": 2, "zero_stage": zero_stage, **OFFLOADED}
    with pytest.raises(RewriteError, match=rf"float32, but under ZeRO-{zero_stage} .* plan with adamw-mixed"):
        prepared(tmp_path, "gpt2", BF16, FP32_GRADIENTS, degrees)


@pytest.mark.parametrize(
    ("policy", "compute", "master", "gradient"),
    [
        ("adamw-mixed", BF16, FP32, BF16),
        ("adamw-mixed", FP16, FP32, FP16),
        (FP32_GRADIENTS, BF16, FP32, FP32),
        ("adamw-sharded-fp32", BF16, FP32, FP32),
        ("adamw-tpu", BF16, FP32, BF16),
        ("adamw-bf16", BF16, BF16, BF16),
        ("adamw-fp32", FP32, FP32, FP32),
        ("adamw-mixed", FP64, FP64, FP64),
    ],
)
def test_a_policy_says_what_is_kept_in_which_precision(
    policy: str, compute: torch.dtype, master: torch.dtype, gradient: torch.dtype
) -> None:
    found = precision_of(optimizer_policy(policy), compute)
    assert (found.compute, found.master, found.gradient) == (compute, master, gradient)


def test_masters_keep_what_narrow_parameters_round_away() -> None:
    """Of 200 steps of 1e-4 a bfloat16 near 1, whose neighbours are 4e-3 apart, takes none by itself."""
    narrow = nn.Parameter(torch.ones(8, dtype=BF16))
    optimizer = MasterAdamW([narrow], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        narrow.grad = torch.ones_like(narrow)
        optimizer.step()
    torch.testing.assert_close(optimizer.masters[narrow], torch.full((8,), 0.98), atol=1e-5, rtol=0)
    assert torch.equal(narrow.detach(), optimizer.masters[narrow].to(BF16))


def test_masters_of_wide_parameters_are_the_parameters() -> None:
    wide = nn.Parameter(torch.ones(8))
    optimizer = MasterAdamW([wide], lr=1e-4)
    assert optimizer.masters[wide].data_ptr() == wide.data_ptr()
    twin = nn.Parameter(torch.ones(8))
    own = torch.optim.AdamW([twin], lr=1e-4)
    for _ in range(3):
        wide.grad, twin.grad = torch.full((8,), 0.5), torch.full((8,), 0.5)
        optimizer.step()
        own.step()
    assert torch.equal(wide, twin)


def test_a_scaled_loss_saves_gradients_that_fp16_has_no_number_for() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=FP16))
    factor = 1e-9  # below the smallest fp16, 6e-8
    (weight * factor).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    weight.grad = None
    scale = LossScale()
    scale.scale((weight * factor).float().sum()).backward()
    scale.unscale([weight])
    assert weight.grad is not None
    assert weight.grad.dtype == FP32
    torch.testing.assert_close(weight.grad, torch.full((4,), factor), rtol=1e-2, atol=0)


def test_gradients_that_are_wide_stay_so() -> None:
    """In the step after the first one was unscaled, too."""
    weight = nn.Parameter(torch.ones(4, dtype=FP16))
    weight.grad_dtype = FP32
    for _ in range(2):
        weight.grad = None
        weight.sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype == FP32
        LossScale().unscale([weight])


def test_an_overflow_leaves_a_step_out_and_halves_the_scale() -> None:
    scale = LossScale(value=8.0, patience=2)
    assert not scale.is_good(float("inf"))
    assert scale.value == 4.0
    assert [scale.is_good(1.0) for _ in range(3)] == [True] * 3
    assert scale.value == 8.0
