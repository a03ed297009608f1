"""`autopar verify`: run a program against the original model on this machine.

What is too large for it is replaced by a sibling: the same architecture, narrow and shallow, in single
precision, with every degree of parallelism cut to 2. It takes the same way through evaluation and rewriter.
"""

from __future__ import annotations

import argparse
import tempfile
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
from autopar.plan import Parallelism, Plan

MAX_LOCAL_PARAMETERS = 50_000_000


def verify_program(options: argparse.Namespace) -> bool:
    """Whether the program in the directory `target`, or of the model that it names, equals the original."""
    directory = Path(options.target)
    if (directory / "plan.json").is_file():
        plan = read_plan(directory / "plan.json")
        is_small = plan.parallelism.world_size <= options.ranks
        if is_small and (directory / "reference.pt").is_file():
            return _run(directory, plan.parallelism.world_size, directory / "reference.pt")
        spec = models.load(options.model or plan.model.name, seq_len=plan.model.tokens_per_sample)
        if is_small and plan.model.num_parameters <= MAX_LOCAL_PARAMETERS:
            return _verify_itself(directory, plan, spec)
        degrees = plan.parallelism
    elif directory.is_dir():
        raise AutoparError(
            f"{directory} has no plan.json; `autopar compile MODEL PLAN.json -o DIR` writes one"
        )
    else:
        spec, degrees = models.load(options.target), _default_degrees(options.ranks)
    return _verify_sibling(spec, _reduced(degrees, options.ranks), quiet=options.quiet)


def _verify_itself(directory: Path, plan: Plan, spec: ModelSpec) -> bool:
    """Run the program as it is, against the model it was made from."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        path = save_reference(compile(spec, plan), spec.build(), spec.inputs, scratch)
        return _run(directory, plan.parallelism.world_size, path)


def _verify_sibling(spec: ModelSpec, degrees: Parallelism, *, quiet: bool) -> bool:
    sibling = small(spec)
    num_ranks = degrees.world_size
    log(f"verifying {sibling.name} on {num_ranks} local ranks: {degrees}", quiet=quiet)
    model = api.captured(sibling, None, None)
    plan = api.evaluate(model, f"local-cpu*{num_ranks}", parallelism=degrees)
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
