"""`compile`, from a plain module to a program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autopar
from autopar.errors import RewriteError
from autopar.launch import launch
from autopar.plan import Plan
from autopar.rewrite.precision import Precision
from costmodel import optimizer_policy
from graphs import capture
from tests.models import case


@pytest.fixture
def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    return case("mlp").build()


def test_without_a_plan_the_best_one_is_searched(mlp: torch.nn.Module) -> None:
    program = autopar.compile(mlp, cluster="local-cpu*2", inputs=case("mlp").inputs, global_batch=4)
    assert program.plan.parallelism.world_size == 2
    assert program.plan.parallelism.global_batch == 4
    assert set(program.files) == {"model.py", "train.py", "parity.py", "autopar_runtime.py", "plan.json"}


def test_without_plan_and_cluster_it_says_what_is_missing(mlp: torch.nn.Module) -> None:
    with pytest.raises(RewriteError, match="cluster= and global_batch="):
        autopar.compile(mlp, inputs=case("mlp").inputs)


def test_a_model_without_loss_is_refused() -> None:
    model = torch.nn.Linear(4, 4)
    inputs = {"input": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="loss"):
        autopar.compile(model, cluster="local-cpu*2", inputs=inputs, global_batch=4)


def test_the_reference_leaves_the_model_as_it_was(mlp: torch.nn.Module, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in mlp.state_dict().items()}
    program = autopar.compile(mlp, cluster="local-cpu*2", inputs=case("mlp").inputs, global_batch=4)
    path = autopar.save_reference(program, mlp, case("mlp").inputs, tmp_path)
    saved = torch.load(path, weights_only=True)
    torch.testing.assert_close(dict(mlp.state_dict()), before)
    batch = case("mlp").inputs(4)
    assert saved["losses"][0] == pytest.approx(float(mlp(**batch).detach()), rel=1e-6)
    assert saved["losses"][2] < saved["losses"][0]
    assert set(saved["gradients"]) == set(before)


BF16_POLICY = "adamw-mixed-fp32-gradients"


def test_a_saved_plan_trains_by_the_policy_it_was_priced_with(tmp_path: Path) -> None:
    """Nothing but the file says so: in memory, through JSON, in the report and in the launch files."""
    torch.manual_seed(0)
    model, inputs = case("gpt2").build().bfloat16(), case("gpt2").inputs
    captured = capture(model, inputs, name="gpt2")
    plan = autopar.evaluate(captured, "local-cpu*2", global_batch=4, dp=2, policy=BF16_POLICY)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.policy == optimizer_policy(BF16_POLICY)
    assert again.to_json() == plan.to_json()
    program = autopar.compile(captured, again)
    assert program.precision == Precision(torch.bfloat16, torch.float32, torch.float32)
    train = program.files["train.py"]
    assert f"By the policy {BF16_POLICY} products read bfloat16 parameters, AdamW updates float32" in train
    assert "grad_dtype = torch.float32" in train
    assert f"{BF16_POLICY}: 18 bytes a parameter, 4 of them for its gradient" in again.explain()
    assert BF16_POLICY in launch(again).files["launch.sh"]
    usual = autopar.compile(captured, autopar.evaluate(captured, "local-cpu*2", global_batch=4, dp=2))
    assert usual.precision.gradient == torch.bfloat16


def test_what_a_plan_says_is_not_said_again(mlp: torch.nn.Module) -> None:
    plan = autopar.evaluate(mlp, "local-cpu*2", inputs=case("mlp").inputs, global_batch=4)
    with pytest.raises(RewriteError, match=r"its own policy=: drop it, or leave out plan="):
        autopar.compile(mlp, plan, inputs=case("mlp").inputs, policy="adamw-bf16")


def test_another_optimizer_than_adamw_is_refused_by_name(mlp: torch.nn.Module) -> None:
    inputs = case("mlp").inputs
    plan = autopar.evaluate(mlp, "local-cpu*2", inputs=inputs, global_batch=4, policy="sgd-momentum-fp32")
    with pytest.raises(RewriteError, match=r"sgd-momentum-fp32, which keeps momentum_buffer: plan with"):
        autopar.compile(mlp, plan, inputs=inputs)


def test_a_policy_for_other_parameters_than_the_model_has_is_told(mlp: torch.nn.Module) -> None:
    plan = autopar.evaluate(
        mlp, "local-cpu*2", inputs=case("mlp").inputs, global_batch=4, policy="adamw-mixed"
    )
    (warning,) = plan.warnings
    assert "has products read parameters of 2 bytes, the model is in fp32, of 4 bytes" in warning
