"""The emitted program does what the original model does: loss, every gradient, parameters after three AdamW
steps.

On 2, 4 and 8 real ranks with gloo, for the strategies on the tensor axis that a person would pin, and for
random ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import autopar
from autopar.plan import Parallelism
from autopar.rewrite.program import Program, rewrite
from graphs import Capture, capture
from tests.autopar.random_plans import random_plan, with_mixed_recomputation
from tests.models import case

pytestmark = pytest.mark.distributed

SINGLE_PRECISION = {"mixtral"}
"""torch's grouped matrix product has no kernel for doubles."""

DRIVER = Path(__file__).with_name("run_programs.py")


@dataclass(frozen=True)
class Trial:
    """A model and a plan for it; with a seed, the strategies on the tensor axis are random instead of
    pinned, and with mixed recomputation the results that blocks keep are."""

    model: str
    parallelism: Parallelism
    seed: int | None = None
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        random = "" if self.seed is None else f" random {self.seed}"
        return f"{self.model} {self.parallelism}{random} {self.dtype}"


def _trial(
    model: str, seed: int | None = None, dtype: torch.dtype = torch.float64, **degrees: object
) -> Trial:
    return Trial(model, Parallelism.model_validate({"microbatch_size": 2, **degrees}), seed, dtype)


TP_OUTERMOST = ("tp", "dp_replicate", "dp_shard", "cp", "pp")
TRIALS = {
    2: (
        _trial("mlp", dp_replicate=2, num_microbatches=2),
        _trial("mlp", tp=2),
        _trial("gpt2", tp=2, num_microbatches=2),
        _trial("gpt2", dp_shard=2, zero_stage=1, num_microbatches=2),
        _trial("llama", dp_shard=2, zero_stage=2, num_microbatches=2),
        _trial("llama", pp=2, num_microbatches=4),
        _trial("bert", tp=2, recompute="selective"),
        _trial("bert", pp=2, schedule="GPipe", num_microbatches=2),
        _trial("llama", tp=2, recompute="mixed", num_microbatches=2),
        _trial("bert", 1, tp=2, recompute="mixed", sequence_parallel=False),
        _trial("gpt2", 2, pp=2, recompute="mixed", num_microbatches=4),
        _trial("t5", tp=2),
        _trial("llama", dtype=torch.bfloat16, dp_shard=2, zero_stage=3, num_microbatches=2),
        _trial("bert", dtype=torch.bfloat16, tp=2),
        _trial("gpt2", dtype=torch.bfloat16, pp=2, num_microbatches=2),
        _trial("mixtral", tp=2),
        _trial("gpt2", 0, dp_shard=2, zero_stage=2, num_microbatches=2, offload="optimizer"),
        _trial("mlp", 2, tp=2, offload="optimizer"),
        *(_trial(model, seed, tp=2) for model in ("mlp", "gpt2", "llama", "bert") for seed in range(2)),
    ),
    4: (
        _trial("llama", dp_replicate=2, tp=2, recompute="full"),
        _trial("llama", dp_shard=2, tp=2, zero_stage=3, num_microbatches=2),
        _trial("gpt2", tp=2, pp=2, num_microbatches=2),
        _trial("gpt2", dp_replicate=2, dp_shard=2, zero_stage=3),
        _trial("bert", dp_shard=2, tp=2, zero_stage=3, recompute="full"),
        _trial("llama", 3, dp_shard=2, tp=2, zero_stage=3, recompute="mixed", num_microbatches=2),
        _trial("bert", dp_shard=2, pp=2, zero_stage=2, num_microbatches=2),
        _trial("mlp", tp=4),
        _trial("llama", 5, dp_replicate=2, tp=2),
        _trial("gpt2", 3, tp=2, pp=2, num_microbatches=2, axis_order=TP_OUTERMOST),
        _trial("gpt2", 2, dp_shard=2, pp=2, zero_stage=1, num_microbatches=2, offload="optimizer"),
    ),
    8: (
        _trial("llama", dp_replicate=2, tp=2, pp=2, num_microbatches=2),
        _trial("gpt2", dp_shard=2, tp=2, pp=2, zero_stage=3, num_microbatches=2, recompute="full"),
        _trial("gpt2", 7, dp_replicate=2, tp=2, pp=2, num_microbatches=2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", TRIALS)
def test_programs_equal_their_originals(num_ranks: int, tmp_path: Path) -> None:
    directories = [_prepare(trial, tmp_path / str(index)) for index, trial in enumerate(TRIALS[num_ranks])]
    verdicts = _run(directories, num_ranks)
    wrong = {
        str(trial): verdicts.get(str(directory), "did not finish")
        for trial, directory in zip(TRIALS[num_ranks], directories, strict=True)
        if verdicts.get(str(directory)) != "equal"
    }
    assert not wrong


def test_parity_notices_a_wrong_program(tmp_path: Path) -> None:
    """A gradient that is not summed over the data axis, as when a rewrite forgets one collective."""
    directory = _prepare(_trial("mlp", dp_replicate=2), tmp_path / "wrong")
    source = (directory / "train.py").read_text()
    broken = source.replace("sum_gradients(stage.parameters()", "sum_gradients([]")
    assert broken != source
    (directory / "train.py").write_text(broken)
    assert _run([directory], 2) == {str(directory): "NOT EQUAL"}


def _prepare(trial: Trial, directory: Path) -> Path:
    """Write the program of a trial, and what the original does, in double precision where it can."""
    model_case = case(trial.model)
    torch.manual_seed(0)
    dtype = torch.float32 if trial.model in SINGLE_PRECISION else trial.dtype
    model = model_case.build().to(dtype)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        tensors = model_case.inputs(batch)
        return {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}

    program = _program(capture(model, inputs, name=trial.model), trial)
    program.save(directory)
    autopar.save_reference(program, model, inputs, directory)
    return directory


def _program(model: Capture, trial: Trial) -> Program:
    degrees = trial.parallelism
    if degrees.recompute == "mixed":
        keeping_all = degrees.model_copy(update={"recompute": "none"})
        plan = autopar.evaluate(model, f"local-cpu*{degrees.world_size}", parallelism=keeping_all)
        return autopar.compile(model, with_mixed_recomputation(model, plan, trial.seed or 0))
    if trial.seed is not None:
        return rewrite(model, random_plan(model, degrees, trial.seed))
    plan = autopar.evaluate(model, f"local-cpu*{degrees.world_size}", parallelism=degrees)
    assert plan.parallelism == degrees
    program = autopar.compile(model, plan)
    assert degrees.tp == 1 or 'mesh.get_group("tp")' in program.source, "nothing is split over tp"
    return program


def _run(directories: Sequence[Path], num_ranks: int) -> dict[str, str]:
    """The verdict on every program, by its directory."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(DRIVER),
        *map(str, directories),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    verdicts = dict(re.findall(r"^\[rank 0\] (.*): (equal|NOT EQUAL)$", done.stdout, re.MULTILINE))
    if len(verdicts) < len(directories):
        verdicts["output"] = (done.stdout + done.stderr)[-6000:]
        print(verdicts["output"])
    return verdicts
