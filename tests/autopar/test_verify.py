"""`autopar verify` where the program itself is too large for this machine."""

from __future__ import annotations

import torch

from autopar import models
from autopar.cli.verify import siblings
from autopar.plan import Plan


def test_a_plan_in_half_precision_is_verified_in_single_precision_and_in_its_own(plan: Plan) -> None:
    spec = models.load("llama3-8b")
    single, half = siblings(spec, plan)
    assert dtypes(single[0]) == {torch.float32}
    assert single[1] is None
    assert dtypes(half[0]) == {torch.bfloat16}
    assert half[1] == plan.policy


def test_a_plan_in_single_precision_is_verified_once(plan: Plan) -> None:
    wide = plan.model_copy(update={"model": plan.model.model_copy(update={"dtype": "fp32"})})
    ((spec, policy),) = siblings(models.load("llama3-8b"), wide)
    assert dtypes(spec) == {torch.float32}
    assert policy == plan.policy


def dtypes(spec: models.ModelSpec) -> set[torch.dtype]:
    return {each.dtype for each in spec.build_without_memory().parameters()}
