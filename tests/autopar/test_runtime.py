"""The runtime: collectives on real ranks against their definition, and what needs no rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.experts import grouped_mm
from autopar.runtime.gradients import matching
from autopar.runtime.initial import initialize
from autopar.runtime.layout import Split, placements_of
from autopar.runtime.modules import Parameters
from autopar.runtime.weights import allocate, load
from autopar.strategies import conversion
from tests.autopar.conversions_on_ranks import STATES

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_conversions_are_what_they_are_defined_to_be(num_ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    command += ["tests.autopar.conversions_on_ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"right: (\d+)", done.stdout)
    assert found is not None, done.stderr[-4000:]
    pairs = [(a, b) for a in STATES for b in STATES if a != b and conversion(a, b, requires_grad=True)]
    assert int(found[1]) == len(pairs) + 13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_mm_multiplies_each_row_by_the_matrix_of_its_expert(dtype: torch.dtype) -> None:
    """With torch's kernel and without, an expert without rows included."""
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 16, 8, dtype=dtype, requires_grad=True)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    made = grouped_mm(x, weight.transpose(1, 2), ends)
    wanted = torch.cat([x[:2] @ weight[0].T, x[2:5] @ weight[2].T, x[5:] @ weight[3].T])
    torch.testing.assert_close(made, wanted)
    found = torch.autograd.grad(made.sum(), (x, weight))
    for mine, its in zip(found, torch.autograd.grad(wanted.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_pattern_stands_for_every_number_and_nothing_else() -> None:
    placements = {"layers.*.weight": {"tp": Split(0)}}
    assert placements_of("layers.17.weight", placements) == {"tp": Split(0)}
    assert placements_of("layers.17.mlp.weight", placements) == {}
    assert placements_of("layersX17.weight", placements) == {}
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), "head": nn.Linear(2, 2)}
    )
    assert len(matching(model, ["layers.*.weight"])) == 3


class Tied(nn.Module):
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Parameters(weight=(4, 2), bias=(4,))
        self.twin = Parameters(weight=(4, 2))
        self.twin.weight = self.inner.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0], device="cpu"), persistent=False)


def built_on_meta() -> Tied:
    with torch.device("meta"):
        return Tied()


NO_MESH = cast(DeviceMesh, None)
"""Without placements no mesh is asked."""


def test_allocating_keeps_ties_and_the_values_of_buffers() -> None:
    model = built_on_meta()
    assert model.get_parameter("inner.weight").is_meta
    allocate(model, torch.device("cpu"))
    assert model.inner.weight.device.type == "cpu"
    assert model.inner.weight is model.twin.weight
    assert model.scale.tolist() == [1.0, 2.0]


def test_fresh_parameters_differ_by_name_and_are_the_same_again() -> None:
    models = [nn.ModuleDict({"a12": Tied(), "a21": Tied()}) for _ in range(2)]
    for model in models:
        initialize(model, NO_MESH, {})
    first, again = (dict(model.named_parameters()) for model in models)
    torch.testing.assert_close(first, again)
    assert not torch.equal(first["a12.inner.weight"], first["a21.inner.weight"]), "an anagram is another name"
    assert first["a12.inner.bias"].tolist() == [0.0] * 4
    assert 0.002 < first["a12.inner.weight"].std().item() < 0.2


def test_weights_of_another_model_are_refused_by_name() -> None:
    model = built_on_meta()
    allocate(model, torch.device("cpu"))
    right = {"inner.weight": torch.ones(4, 2), "inner.bias": torch.ones(4), "twin.weight": torch.ones(4, 2)}
    load(model, right, NO_MESH, {})
    assert model.get_parameter("inner.weight").sum() == 8
    with pytest.raises(ValueError, match=r"no 'inner.bias'; the nearest is 'inner.bia'.*state_dict"):
        load(model, {"inner.weight": torch.ones(4, 2), "inner.bia": torch.ones(4)}, NO_MESH, {})
    with pytest.raises(ValueError, match=r"inner.weight.*\(2, 2\).*\(4, 2\)"):
        load(model, {**right, "inner.weight": torch.ones(2, 2)}, NO_MESH, {})
