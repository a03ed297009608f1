"""`autopar verify`: run a program against the original model on this machine.

What is too large for it is replaced by a sibling: the same architecture, narrow and shallow, in single
precision, with every degree of parallelism cut to 2. It takes the same way through search and rewriter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from autopar import api, models
from autopar.cli.output import log
from autopar.cli.plan_file import read_plan
from autopar.errors import AutoparError
from autopar.launch.local import run_local
from autopar.model_scaling import small
from autopar.models import ModelSpec
from autopar.plan import Parallelism
from autopar.rewrite.parity import reference
from autopar.rewrite.program import rewrite
from graphs import capture

MAX_LOCAL_PARAMETERS = 50_000_000


def verify_program(options: argparse.Namespace) -> bool:
    """Whether the program in the directory `target`, or of the model that it names, equals the original."""
    directory = Path(options.target)
    if (directory / "plan.json").is_file():
        plan = read_plan(directory / "plan.json")
        degrees = plan.parallelism
        if (directory / "reference.pt").is_file() and degrees.world_size <= options.ranks:
            return _run(directory, degrees.world_size)
        spec = models.load(options.model or plan.model.name)
        if degrees.world_size <= options.ranks and plan.model.num_parameters <= MAX_LOCAL_PARAMETERS:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "reference.pt"
                save_reference(spec, degrees, path)
                return _run(directory, degrees.world_size, path)
    elif directory.is_dir():
        raise AutoparError(
            f"{directory} holds no plan.json; `autopar compile MODEL PLAN.json -o {directory}` writes one"
        )
    else:
        spec, degrees = models.load(options.target), _default_degrees(options.ranks)
    return _verify_sibling(spec, _reduced(degrees, options.ranks), quiet=options.quiet)


def save_reference(spec: ModelSpec, degrees: Parallelism, path: Path) -> None:
    """Run the original in this process on random weights and data; what it did goes to `path`."""
    torch.manual_seed(0)
    did = reference(spec.build(), spec.inputs(degrees.global_batch), degrees.num_microbatches, "loss")
    torch.save(did, path)


def _verify_sibling(spec: ModelSpec, degrees: Parallelism, *, quiet: bool) -> bool:
    sibling = small(spec)
    num_ranks = degrees.world_size
    log(f"verifying {sibling.name} on {num_ranks} local ranks: {degrees}", quiet=quiet)
    model = capture(sibling.build_without_memory(), sibling.inputs, name=sibling.name)
    plan = api.evaluate(
        model,
        f"local-cpu*{num_ranks}",
        global_batch=degrees.global_batch,
        dp=degrees.dp,
        dp_shard=degrees.dp_shard,
        tp=degrees.tp,
        pp=degrees.pp,
        zero_stage=degrees.zero_stage,
        microbatch_size=degrees.microbatch_size,
        recompute=degrees.recompute,
        schedule=degrees.schedule,
        num_virtual_stages=degrees.num_virtual_stages,
    )
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        rewrite(model, plan).save(directory)
        save_reference(sibling, plan.parallelism, directory / "reference.pt")
        return _run(directory, num_ranks)


def _run(directory: Path, num_ranks: int, reference_path: Path | None = None) -> bool:
    arguments = [] if reference_path is None else ["--reference", str(reference_path)]
    return run_local(directory / "parity.py", num_ranks, arguments) == 0


def _default_degrees(num_ranks: int) -> Parallelism:
    tp = 2 if num_ranks % 2 == 0 else 1
    return Parallelism(dp_replicate=num_ranks // tp, tp=tp, microbatch_size=2, num_microbatches=2)


def _reduced(degrees: Parallelism, num_ranks: int) -> Parallelism:
    """Every degree cut to 2, outermost axes further where the ranks do not suffice."""
    cut = {axis: min(2, getattr(degrees, axis)) for axis in ("tp", "pp", "dp_shard", "dp_replicate")}
    kept, total = {}, 1
    for axis, size in cut.items():
        kept[axis] = size if total * size <= num_ranks else 1
        total *= kept[axis]
    virtual = min(2, degrees.num_virtual_stages) if kept["pp"] > 1 else 1
    return Parallelism(
        **kept,
        zero_stage=degrees.zero_stage if kept["dp_shard"] > 1 else 0,
        microbatch_size=2,
        num_microbatches=2 * kept["pp"],
        num_virtual_stages=virtual,
        schedule=degrees.schedule if virtual > 1 or degrees.schedule != "Interleaved1F1B" else "1F1B",
        recompute=degrees.recompute,
    )
