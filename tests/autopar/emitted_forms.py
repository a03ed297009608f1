"""Programs of every form that is emitted, as text, for tests that read them."""

from __future__ import annotations

from functools import cache

import torch

from autopar.plan import Parallelism
from autopar.rewrite.program import Program, rewrite
from graphs import Capture, capture
from tests.autopar.random_plans import random_plan, with_mixed_recomputation
from tests.models import case

FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "dp2": ("llama", {"dp_replicate": 2}),
    "tp2": ("llama", {"tp": 2}),
    "dp2 tp2 zero3": (
        "llama",
        {"dp_shard": 2, "tp": 2, "zero_stage": 3, "num_microbatches": 2},
    ),
    "pp2": ("gpt2", {"pp": 2, "num_microbatches": 2, "recompute": "full"}),
    "pp2 dp2 tp2": (
        "llama",
        {
            "dp_replicate": 2,
            "tp": 2,
            "pp": 2,
            "num_microbatches": 4,
            "schedule": "ZBVZeroBubble",
            "num_virtual_stages": 2,
            "recompute": "selective",
        },
    ),
    "cp2": ("llama", {"cp": 2}),
    "ep2": ("mixtral", {"dp_shard": 2, "ep": 2}),
    "ep2 zero3": ("mixtral", {"dp_shard": 2, "ep": 2, "zero_stage": 3}),
    "offload": ("bert", {"dp_shard": 2, "zero_stage": 1, "offload": "optimizer"}),
    "two stacks": ("t5", {"tp": 2}),
    "batch norm": ("resnet", {"dp_replicate": 2}),
}
"""Model and degrees by the name of a form; where a plan leaves a choice, it is made at random."""


@cache
def captured(model: str) -> Capture:
    """A small model of the list, with weights of a fixed seed."""
    torch.manual_seed(0)
    return capture(case(model).build(), case(model).inputs, name=model)


@cache
def program(form: str) -> Program:
    """The program of a form."""
    model, degrees = FORMS[form]
    parallelism = Parallelism.model_validate({"microbatch_size": 2} | degrees)
    plan = random_plan(captured(model), parallelism, seed=1)
    if form == "dp2 tp2 zero3":
        plan = with_mixed_recomputation(captured(model), plan, seed=1)
    return rewrite(captured(model), plan)
