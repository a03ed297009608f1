"""Training programs at random: one of the models, a form of parallelism, and everything else drawn.

A case follows from a model, a form and a seed alone, so those three are the recipe for it. Within the form
are drawn: the degrees of replicas and shards, the ZeRO stage, the strategy of every op on the tensor and the
context axis (`tests.autopar.random_plans`), the pipeline's schedule and the ops at which stages begin,
microbatches, what every block computes again, the order of the mesh axes, where the optimizer's states live,
and the precision.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autopar.errors import InvalidParallelismError
from autopar.plan import MESH_AXES, Parallelism, Plan, Recomputation, has_program
from autopar.request import policy_of
from autopar.rewrite.local import local_program
from autopar.search.validate import check_schedule
from costmodel import SCHEDULES
from costmodel.orders import V_SCHEDULES
from graphs import Capture
from tests.autopar.random_plans import random_plan, with_random_cuts

FORMS: Mapping[str, tuple[str, ...]] = {
    "dp": ("dp",),
    "zero": ("zero",),
    "tp": ("tp",),
    "cp": ("cp",),
    "ep": ("ep",),
    "pp": ("pp",),
    "dp tp": ("dp", "tp"),
    "zero tp": ("zero", "tp"),
    "dp cp": ("dp", "cp"),
    "zero cp": ("zero", "cp"),
    "cp tp": ("cp", "tp"),
    "zero pp": ("zero", "pp"),
    "tp pp": ("tp", "pp"),
    "cp pp": ("cp", "pp"),
    "hybrid zero": ("dp", "zero"),
    "ep tp": ("ep", "tp"),
    "ep pp": ("ep", "pp"),
    "ep zero": ("ep", "zero"),
    "zero tp pp": ("zero", "tp", "pp"),
}
"""The axes of each form, of two ranks each; `ep` is a data axis that also divides the experts."""

EXPERTS = frozenset({"mixtral", "qwen3moe", "deepseekv3"})
"""Models with a mixture of experts, in single precision: torch's grouped product has no kernel for doubles.
"""
KINKED = frozenset({"mlp", "resnet", "dlrm", "opt", "t5"})
"""Models with ReLUs, whose gradients in half precision are off by a tenth already in one process."""
WITHOUT_SEQUENCE = frozenset({"resnet", "vit", "dinov2"})
"""Models of which no input has positions that a context axis could split, so that planning refuses one."""
HALF_PRECISION_SHARE = 0.15
WITH_MASTER = ("adamw-mixed", "adamw-mixed-fp32-gradients")
POLICIES = {torch.bfloat16: (*WITH_MASTER, "adamw-bf16"), torch.float16: WITH_MASTER}


@dataclass(frozen=True)
class RandomCase:
    """A model and how it is trained; `policy` is what the optimizer keeps (None: all as the model)."""

    model: str
    form: str
    seed: int
    parallelism: Parallelism
    dtype: torch.dtype
    policy: str | None
    keeps_at_random: bool
    cuts_anywhere: bool

    def __str__(self) -> str:
        policy = f" {self.policy}" if self.policy else ""
        return f"{self.model} {self.parallelism}{policy} {str(self.dtype).removeprefix('torch.')}"

    @property
    def recipe(self) -> str:
        """The command that runs this case alone."""
        return f"python -m benchmarks.fuzz --models {self.model} --forms '{self.form}' --only {self.seed}"


def forms_of(model: str) -> tuple[str, ...]:
    """The forms in which a model can be trained."""
    impossible = {"ep"} if model not in EXPERTS else set()
    impossible |= {"cp"} if model in WITHOUT_SEQUENCE else set()
    return tuple(form for form, axes in FORMS.items() if impossible.isdisjoint(axes))


def random_case(model: str, form: str, seed: int) -> RandomCase:
    """The case of a recipe."""
    rng = random.Random(f"{model} {form} {seed}")
    dtype, policy = torch.float32 if model in EXPERTS else torch.float64, None
    if rng.random() < HALF_PRECISION_SHARE and model not in KINKED:
        dtype = rng.choice(tuple(POLICIES))
        policy = rng.choice(POLICIES[dtype])
    recompute = rng.choice(("none", "none", "full", "selective", "kept"))
    while True:
        settings = {
            **_degrees(FORMS[form], rng),
            **_pipeline(FORMS[form], rng),
            "microbatch_size": rng.choice((1, 2, 2)),
            "recompute": "mixed" if recompute == "kept" else recompute,
            "axis_order": tuple(rng.sample(MESH_AXES, len(MESH_AXES))) if rng.random() < 0.2 else MESH_AXES,
        }
        parallelism = Parallelism.model_validate(settings)
        if _is_legal(parallelism):
            break
    return RandomCase(
        model, form, seed, parallelism, dtype, policy, recompute == "kept", cuts_anywhere=rng.random() < 0.7
    )


def _degrees(axes: tuple[str, ...], rng: random.Random) -> dict[str, object]:
    degrees: dict[str, object] = {axis: 2 for axis in axes if axis in {"tp", "cp", "pp"}}
    data = [axis for axis in axes if axis not in degrees]
    if "ep" in axes:
        degrees["ep"] = 2
    if data in (["ep"], ["ep", "zero"]) and rng.random() < 0.7:
        data = ["zero"] * len(data)  # experts are shared by the ranks of the axis that ZeRO shards over
    if "dp" in data or "ep" in data:
        degrees["dp_replicate"] = 2
    if "zero" in data:
        degrees |= {"dp_shard": 2 ** data.count("zero"), "zero_stage": rng.choice((1, 2, 3, 3))}
    if data and rng.random() < 0.1:
        degrees["offload"] = "optimizer"
    return degrees


def _pipeline(axes: tuple[str, ...], rng: random.Random) -> dict[str, object]:
    if "pp" not in axes:
        return {"num_microbatches": rng.choice((1, 2, 3))}
    schedule = rng.choice(SCHEDULES)
    virtual = 1 if schedule in {"GPipe", "1F1B"} else 2 if schedule in V_SCHEDULES else rng.choice((2, 3))
    return {
        "schedule": schedule,
        "num_virtual_stages": virtual,
        "num_microbatches": rng.choice((2, 3, 4)),
    }


def _is_legal(p: Parallelism) -> bool:
    try:
        check_schedule(p)
    except InvalidParallelismError:
        return False
    order = p.axis_order
    return (
        has_program(p.schedule, p.pp, p.num_microbatches)
        and not (p.offload == "optimizer" and p.zero_stage == 0 and p.dp_replicate == 1)
        and (order.index("dp_replicate") < order.index("dp_shard"))
    )


def plan_for(case: RandomCase, capture: Capture) -> Plan:
    """The plan of a case, for a capture of its model in its dtype."""
    rng = random.Random(f"plan {case.seed}")
    # Modes by block are put in afterwards.
    degrees = case.parallelism
    if case.keeps_at_random:
        degrees = degrees.model_copy(update={"recompute": "none"})
    plan = random_plan(capture, degrees, rng.randrange(1 << 30))
    if case.cuts_anywhere:
        plan = with_random_cuts(plan, capture.graph, rng.randrange(1 << 30))
    if case.keeps_at_random:
        plan = _keeping_at_random(plan, capture, rng)
    if case.policy is not None:
        plan = plan.model_copy(update={"policy": policy_of(case.policy, capture.graph)})
    return plan


def _keeping_at_random(plan: Plan, capture: Capture, rng: random.Random) -> Plan:
    """Every block keeps everything, nothing, its products, or any of its results."""
    local = local_program(capture, plan).graph
    found = []
    for block in capture.graph.blocks:
        inside = [op.name for op in local.ops if f"{op.module}.".startswith(f"{block.path}.")]
        mode = rng.choice(("none", "full", "selective", "kept", "kept"))
        if mode == "none" or not inside:
            continue
        kept = [name for name in inside if rng.random() < 0.5] if mode == "kept" else []
        entry = {"blocks": (block.path,), "mode": mode, "kept": kept, "labels": kept}
        found.append(Recomputation.model_validate(entry))
    parallelism = plan.parallelism.model_copy(update={"recompute": "mixed"})
    return plan.model_copy(update={"recomputation": tuple(found), "parallelism": parallelism})
