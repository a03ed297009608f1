"""What the commands do. Each takes the parsed options and returns the exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.cli.output import check_new, log, progress, short_warnings, write_new
from autopar.cli.pin_options import pins_of
from autopar.cli.plan_file import is_plan_file, read_plan
from autopar.errors import AutoparError
from autopar.launch import launch as launch_files
from autopar.plan import Plan
from autopar.report import explain as explain_plan

if TYPE_CHECKING:
    from autopar.models import ModelSpec

OK, NO = 0, 1
DEGREES = (
    "dp", "tp", "pp", "cp", "ep", "zero_stage", "dp_shard", "microbatch_size", "recompute", "schedule",
    "num_virtual_stages", "sequence_parallel", "offload", "axis_order",
)  # fmt: skip


def plan(options: argparse.Namespace) -> int:
    """`autopar plan`."""
    pins = pins_of(options)
    check_new(options.output, force=options.force)
    from autopar import api

    with short_warnings(quiet=options.quiet), progress(quiet=options.quiet) as on_progress:
        found = api.plan(
            _model(options),
            options.cluster,
            global_batch=options.global_batch,
            progress=on_progress,
            **_problem(options),
            time_limit_s=options.time_limit,
            pins=pins,
            space=options.space,
            price_pins=options.price_pins,
        )
    _deliver(found, options)
    return OK


def evaluate(options: argparse.Namespace) -> int:
    """`autopar evaluate`."""
    from autopar.cli.records import check_one_plan, evaluate_records

    if options.records is not None:
        evaluate_records(options)
        return OK
    check_one_plan(options)
    from autopar import api

    check_new(options.output, force=options.force)
    with short_warnings(quiet=options.quiet):
        degrees = {name: getattr(options, name) for name in DEGREES}
        found = api.evaluate(
            _model(options),
            options.cluster,
            global_batch=options.global_batch,
            **_problem(options),
            **degrees,
        )
    _deliver(found, options)
    return OK if found.fits else NO


def explain(options: argparse.Namespace) -> int:
    """`autopar explain`."""
    sys.stdout.write(explain_plan(read_plan(options.plan), options.tokens, options.format))
    return OK


def compile_program(options: argparse.Namespace) -> int:
    """`autopar compile`."""
    from autopar import api
    from autopar.compiler import compile

    check_new(options.output / "model.py", force=options.force)
    named = Path(options.plan_or_cluster)
    saved = read_plan(named) if is_plan_file(named) else None
    if saved is None and options.global_batch is None:
        raise AutoparError(f"planning for {named} needs --global-batch N; or name a saved PLAN.json")
    if saved is not None and options.global_batch not in (None, saved.parallelism.global_batch):
        raise AutoparError(
            f"{named} is for a global batch of {saved.parallelism.global_batch}; drop --global-batch"
        )
    with short_warnings(quiet=options.quiet), progress(quiet=options.quiet) as on_progress:
        model = api.captured(_model(options), None, None)
        if saved is None:
            cluster, global_batch = options.plan_or_cluster, options.global_batch
            saved = api.plan(model, cluster, global_batch=global_batch, progress=on_progress)
        program = compile(model, saved)
    program.save(options.output, force=options.force)
    for name in sorted(program.files):
        print(options.output / name)
    log(
        f"{saved.parallelism}: start train.py with torchrun, {saved.parallelism.world_size} ranks",
        quiet=options.quiet,
    )
    return OK


def launch(options: argparse.Namespace) -> int:
    """`autopar launch`."""
    overrides = {"scheduler_options": tuple(options.scheduler_option)}
    if options.time_limit is not None:
        overrides["time_limit_s"] = options.time_limit
    rendered = launch_files(read_plan(options.plan), options.target, **overrides)
    if options.output is None:
        sys.stdout.write("".join(rendered.files.values()))
    else:
        for path in rendered.save(options.output, force=options.force):
            print(path)
    return OK


def hardware(options: argparse.Namespace) -> int:
    """`autopar hardware`."""
    from autopar.cli.hardware import show

    sys.stdout.write(show(options.id, options.format))
    return OK


def calibrate(options: argparse.Namespace) -> int:
    """`autopar calibrate`."""
    from autopar.cli.calibrate import calibrate_machine

    calibrate_machine(options)
    return OK


def verify(options: argparse.Namespace) -> int:
    """`autopar verify`."""
    from autopar.cli.verify import verify_program

    with short_warnings(quiet=options.quiet):
        return OK if verify_program(options) else NO


def _model(options: argparse.Namespace) -> ModelSpec:
    from autopar import models

    return models.load(options.model, seq_len=options.seq_len)


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    """What is asked beside model, cluster and batch."""
    memory_bytes = None if options.memory_gb is None else 1e9 * options.memory_gb
    given = {name: getattr(options, name) for name in ("software", "policy", "precision")}
    return {**given, "memory_bytes": memory_bytes}


def _deliver(found: Plan, options: argparse.Namespace) -> None:
    if options.output is not None:
        write_new(options.output, found.to_json(), force=options.force)
        log(f"saved {options.output}", quiet=options.quiet)
    as_json = options.format == "json"
    sys.stdout.write(found.to_json() if as_json else explain_plan(found, options.tokens))
