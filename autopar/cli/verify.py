"""`autopar verify`: run a program against the original model on this machine.

What is too large for it is replaced by a sibling: the same architecture, narrow and shallow, with every
degree of parallelism cut to 2. It takes the same way through evaluation and rewriter, in single precision,
which tells most, and then in the precision of the plan.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from autopar import api, models
from autopar.cli.output import log
from autopar.cli.plan_file import read_plan
from autopar.compiler import compile, save_reference
from autopar.errors import AutoparError
from autopar.launch.local import run_local
from autopar.model_scaling import small
from autopar.models import ModelSpec
from autopar.op_kinds import dtype_name
from autopar.plan import Parallelism, Plan
from costmodel import OptimizerPolicy

MAX_LOCAL_PARAMETERS = 50_000_000


def verify_program(options: argparse.Namespace) -> bool:
    """Whether the program in the directory `target`, or of the model that it names, equals the original."""
    directory = Path(options.target)
    if not directory.is_dir():
        sibling = small(models.load(options.target))
        degrees = _reduced(_default_degrees(options.ranks), options.ranks)
        return _verify_sibling(sibling, degrees, None, quiet=options.quiet)
    if not (directory / "plan.json").is_file():
        raise AutoparError(
            f"{directory} has no plan.json; `autopar compile MODEL PLAN.json -o DIR` writes one"
        )
    plan = read_plan(directory / "plan.json")
    is_small = plan.parallelism.world_size <= options.ranks
    if is_small and (directory / "reference.pt").is_file():
        return _run(directory, plan.parallelism.world_size, directory / "reference.pt")
    spec = models.load(options.model or plan.model.name, seq_len=plan.model.tokens_per_sample)
    if is_small and plan.model.num_parameters <= MAX_LOCAL_PARAMETERS:
        return _verify_itself(directory, plan, spec)
    degrees = _reduced(plan.parallelism, options.ranks)
    return all(
        _verify_sibling(sibling, degrees, policy, quiet=options.quiet)
        for sibling, policy in siblings(spec, plan)
    )


def _verify_itself(directory: Path, plan: Plan, spec: ModelSpec) -> bool:
    """Run the program as it is, against the model it was made from."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        path = save_reference(compile(spec, plan), spec.build(), spec.inputs, scratch)
        return _run(directory, plan.parallelism.world_size, path)


def siblings(spec: ModelSpec, plan: Plan) -> Iterator[tuple[ModelSpec, OptimizerPolicy | None]]:
    """The siblings to verify, with their policies (None: the usual one)."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    dtype = next(each for each in dtypes if dtype_name(each) == plan.model.dtype)
    if dtype.itemsize < torch.float32.itemsize and spec.config is not None:
        yield small(spec), None
    yield small(spec, dtype=dtype), plan.policy


def _verify_sibling(
    sibling: ModelSpec, degrees: Parallelism, policy: OptimizerPolicy | None, *, quiet: bool
) -> bool:
    num_ranks = degrees.world_size
    model = api.captured(sibling, None, None)
    plan = api.evaluate(model, f"local-cpu*{num_ranks}", parallelism=degrees, policy=policy)
    log(
        f"verifying {sibling.name} in {plan.model.dtype} ({plan.policy.name}) on {num_ranks} local ranks: "
        f"{degrees}",
        quiet=quiet,
    )
    with tempfile.TemporaryDirectory() as scratch:
        program = compile(model, plan)
        directory = program.save(scratch)
        torch.manual_seed(0)
        path = save_reference(program, sibling.build(), sibling.inputs, scratch)
        return _run(directory, num_ranks, path)


def _run(directory: Path, num_ranks: int, reference: Path) -> bool:
    return run_local(directory / "parity.py", num_ranks, ["--reference", str(reference)]) == 0


def _default_degrees(num_ranks: int) -> Parallelism:
    return Parallelism(dp_replicate=max(1, num_ranks // 2), tp=2)


def _reduced(degrees: Parallelism, num_ranks: int) -> Parallelism:
    """Every degree cut to 2, and the outermost axes to 1 where the ranks do not suffice."""
    kept: dict[str, int] = {}
    left = num_ranks
    for axis in ("tp", "cp", "pp", "dp_shard", "dp_replicate"):
        kept[axis] = min(2, getattr(degrees, axis), left)
        left //= kept[axis]
    kept["ep"] = min(2, degrees.ep, kept["dp_shard"] * kept["dp_replicate"])
    virtual = min(2, degrees.num_virtual_stages) if kept["pp"] > 1 else 1
    return Parallelism.model_validate(
        {
            **kept,
            "zero_stage": degrees.zero_stage if kept["dp_shard"] > 1 else 0,
            "sequence_parallel": degrees.sequence_parallel,
            "microbatch_size": 2,
            "num_microbatches": 2 * kept["pp"],
            "num_virtual_stages": virtual,
            "schedule": degrees.schedule if virtual > 1 or degrees.schedule != "Interleaved1F1B" else "1F1B",
            "recompute": "selective" if degrees.recompute == "mixed" else degrees.recompute,
        }
    )
