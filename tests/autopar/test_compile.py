"""`compile`, from a plain module to a program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autopar
from autopar.errors import RewriteError
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
