"""Write the program of a plan, run it on real ranks against its original, and return the verdict.

`parity.py` of the program compares loss, every gradient, and parameters after three AdamW steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import autopar
from autopar.errors import RewriteError
from autopar.plan import Parallelism, Plan
from autopar.rewrite.program import Program, rewrite
from graphs import Capture, capture
from tests.autopar.random_plans import (
    exchanging_heads,
    random_plan,
    with_mixed_recomputation,
    with_random_cuts,
)
from tests.autopar.rank_pool import shared_pool
from tests.models import case

SINGLE_PRECISION = {"mixtral", "qwen3moe", "deepseekv3"}
"""torch's grouped matrix product has no kernel for doubles."""


@dataclass(frozen=True)
class Trial:
    """A model and a plan for it; with a seed, the strategies on the tensor axis are random instead of
    pinned, and with mixed recomputation the results that blocks keep are. With `cuts`, another seed, stages
    begin anywhere. With `heads` the context axis exchanges positions for heads. With `searched` only the
    degrees of axes and the batch are given, and all else is what the search finds."""

    model: str
    parallelism: Parallelism
    seed: int | None = None
    dtype: torch.dtype = torch.float64
    cuts: int | None = None
    heads: bool = False
    searched: bool = False

    def __str__(self) -> str:
        random = "" if self.seed is None else f" random {self.seed}"
        cuts = "" if self.cuts is None else f" cuts {self.cuts}"
        heads = " heads" if self.heads else ""
        searched = " searched" if self.searched else ""
        return f"{self.model} {self.parallelism}{random}{cuts}{heads}{searched} {self.dtype}"


def trial(
    model: str,
    seed: int | None = None,
    dtype: torch.dtype = torch.float64,
    cuts: int | None = None,
    heads: bool = False,
    searched: bool = False,
    **degrees: object,
) -> Trial:
    """A trial of the parallelism with these degrees."""
    parallelism = Parallelism.model_validate({"microbatch_size": 2, **degrees})
    return Trial(model, parallelism, seed, dtype, cuts, heads, searched)


def failures(
    trials: Sequence[Trial], num_ranks: int, directory: Path, script: Path | None = None
) -> dict[str, str]:
    """What went wrong, by trial; `script` as `run` takes it."""
    directories = [prepare(each, directory / str(index)) for index, each in enumerate(trials)]
    verdicts = run(directories, num_ranks, script)
    found = {str(each): verdicts[str(at)] for each, at in zip(trials, directories, strict=True)}
    return {each: verdict for each, verdict in found.items() if verdict != "equal"}


def prepare(trial: Trial, directory: Path) -> Path:
    """Write the program of a trial, and what the original does, in double precision where it can."""
    model_case = case(trial.model)
    torch.manual_seed(0)
    dtype = dtype_of(trial)
    model = model_case.build().to(dtype)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        tensors = model_case.inputs(batch)
        return {name: each.to(dtype) if _is_real(each) else each for name, each in tensors.items()}

    program = _program(capture(model, inputs, name=trial.model), trial)
    program.save(directory)
    autopar.save_reference(program, model, inputs, directory)
    return directory


def dtype_of(trial: Trial) -> torch.dtype:
    """The dtype of a trial's parameters."""
    return torch.float32 if trial.model in SINGLE_PRECISION else trial.dtype


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _program(model: Capture, trial: Trial) -> Program:
    degrees = trial.parallelism
    if degrees.recompute == "mixed":
        keeping_all = degrees.model_copy(update={"recompute": "none"})
        plan = autopar.evaluate(model, f"local-cpu*{degrees.world_size}", parallelism=keeping_all)
        return autopar.compile(model, with_mixed_recomputation(model, plan, trial.seed or 0))
    if trial.cuts is not None:
        plan = random_plan(model, degrees, trial.seed or 0)
        return _cut(model, plan, trial.cuts)
    if trial.seed is not None:
        return rewrite(model, random_plan(model, degrees, trial.seed))
    if trial.searched:
        pins = {axis: getattr(degrees, axis) for axis in ("dp", "cp", "ep", "tp", "pp")}
        machine = f"local-cpu*{degrees.world_size}"
        plan = autopar.plan(model, machine, global_batch=degrees.global_batch, price_pins=False, pins=pins)
        return autopar.compile(model, plan)
    plan = autopar.evaluate(model, f"local-cpu*{degrees.world_size}", parallelism=degrees)
    assert plan.parallelism == degrees
    plan = exchanging_heads(plan, model.graph) if trial.heads else plan
    program = autopar.compile(model, plan)
    assert degrees.tp == 1 or 'mesh.get_group("tp")' in program.source, "nothing is split over tp"
    return program


def _cut(model: Capture, plan: Plan, seed: int) -> Program:
    """The program with stages that begin anywhere, such that every rank has something to train."""
    while True:
        try:
            return rewrite(model, with_random_cuts(plan, model.graph, seed))
        except RewriteError as error:
            if "would train nothing" not in str(error):
                raise
            seed += 1000


def run(directories: Sequence[Path], num_ranks: int, script: Path | None = None) -> dict[str, str]:
    """The verdict on every program, by its directory: of its own `parity.py`, or of a script that is told
    where it is."""
    verdicts = {}
    for directory in directories:
        parity = directory / "parity.py"
        outcome = shared_pool().run(script or parity, num_ranks, *([] if script is None else [directory]))
        verdicts[str(directory)] = outcome.verdict
        if outcome.verdict != "equal":
            print(f"{directory}: {outcome.verdict}\n{outcome.output}")
    return verdicts
