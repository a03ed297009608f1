"""Shrinking finds the few splits of a plan that matter, by the answers of what it asks alone."""

from __future__ import annotations

import torch

from autopar.plan import Parallelism, Plan
from tests.autopar.case_runner import original
from tests.autopar.random_plans import random_plan
from tests.autopar.shrinking import shrunk, splits

PARALLELISM = Parallelism.model_validate({"tp": 2, "cp": 2, "microbatch_size": 2, "recompute": "full"})


def test_what_a_failure_needs_is_what_is_left() -> None:
    plan = random_plan(original("llama", torch.float64).capture, PARALLELISM, seed=3)
    wanted = {splits(plan)[number] for number in (5, -4)}
    asked: list[Plan] = []

    def fails(smaller: Plan) -> bool:
        asked.append(smaller)
        return wanted <= set(splits(smaller))

    small = shrunk(plan, fails)
    assert set(splits(small)) == wanted
    assert all(small.strategies[axis][op] == plan.strategies[axis][op] for axis, op in wanted)
    assert not small.recomputation
    assert len(asked) < len(splits(plan)) / 2
