"""The whole way: plan a full-size model for a real cluster, then train a small sibling of it on this machine.

    make demo

Writes build/demo/full (a program for 64 GPUs and its launch files) and build/demo/small (a program for four
local processes, which is run). Exit code 1 when its losses are not those of the original model.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import autopar
from autopar import models
from autopar.api import captured
from autopar.cli.output import progress, short_warnings
from autopar.model_scaling import small
from autopar.models import ModelSpec
from autopar.report.table import table
from autopar.runtime.sampling import shuffled

MODEL, CLUSTER, GLOBAL_BATCH, TOKENS = "llama3-70b", "dgx-h100*8", 512, 1e12
LOCAL_DP, LOCAL_TP, LOCAL_BATCH = 2, 2, 8
STEPS = 4
LEARNING_RATE = 1e-3
BETAS = 0.9, 0.95
WEIGHT_DECAY = 0.1
SEED = 0
TOLERANCE = 1e-4
BUILD = Path(__file__).parents[1] / "build" / "demo"


def main() -> int:
    shutil.rmtree(BUILD, ignore_errors=True)
    with short_warnings(quiet=False):
        plan_full_size()
        return train_small()


def plan_full_size() -> None:
    """Plan, explain, and write the program and its launch files."""
    with heading(f"1. Plan {MODEL} for {CLUSTER}"), progress(quiet=False) as on_progress:
        model = captured(models.load(MODEL), None, None)
        plan = autopar.plan(model, CLUSTER, global_batch=GLOBAL_BATCH, progress=on_progress)
    print(plan.explain(TOKENS))
    with heading("2. Write its program and launch files"):
        directory = BUILD / "full"
        autopar.compile(model, plan).save(directory)
        for target in ("torchrun", "slurm"):
            autopar.launch(plan, target).save(directory)
        list_files(directory)


def train_small() -> int:
    """Train a sibling with the emitted program and by itself; 0 when the losses agree."""
    sibling = small(models.load(MODEL))
    num_ranks = LOCAL_DP * LOCAL_TP
    with heading(f"3. Compile {sibling.name} for {num_ranks} local processes, dp{LOCAL_DP} x tp{LOCAL_TP}"):
        model = captured(sibling, None, None)
        plan = autopar.evaluate(
            model,
            f"local-cpu*{num_ranks}",
            global_batch=LOCAL_BATCH,
            dp=LOCAL_DP,
            tp=LOCAL_TP,
            microbatch_size=2,
        )
        directory = BUILD / "small"
        autopar.compile(model, plan).save(directory)
        autopar.launch(plan, "torchrun").save(directory)
        list_files(directory)
    with heading(f"4. Train {STEPS} steps, with torchrun and in a single process"):
        original = train_original(sibling, directory)
        parallel = train_program(directory)
    rows: list[Sequence[str]] = [("step", "single process", f"{num_ranks} ranks", "difference")]
    gaps = [abs(one - many) for one, many in zip(original, parallel, strict=True)]
    for step, losses in enumerate(zip(original, parallel, gaps, strict=True), 1):
        rows.append((str(step), *(f"{loss:.6f}" for loss in losses)))
    print("\n".join(table(rows)))
    equal = max(gaps) <= TOLERANCE
    verdict = "equal" if equal else "NOT EQUAL"
    print(f"\n{verdict}: the losses differ by at most {max(gaps):.1e} (tolerance {TOLERANCE:.0e})")
    return 0 if equal else 1


def train_original(sibling: ModelSpec, directory: Path) -> list[float]:
    """Losses of the original in this process; leaves its first weights and the data beside the program."""
    torch.manual_seed(0)
    model = sibling.build().train()
    data = sibling.inputs(STEPS * LOCAL_BATCH)
    torch.save(model.state_dict(), directory / "weights.pt")
    torch.save(dict(data), directory / "data.pt")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    # The order in which the program goes through its data.
    order = [shuffled(position, STEPS * LOCAL_BATCH, SEED) for position in range(STEPS * LOCAL_BATCH)]
    losses = []
    for step in range(STEPS):
        rows = order[step * LOCAL_BATCH : (step + 1) * LOCAL_BATCH]
        loss = model(**{name: tensor[rows] for name, tensor in data.items()}).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_program(directory: Path) -> list[float]:
    """Losses that the emitted program prints, started by its own launch script."""
    command = [str(directory / "launch.sh"), "--steps", str(STEPS), "--learning-rate", str(LEARNING_RATE)]
    command += ["--betas", *map(str, BETAS), "--weight-decay", str(WEIGHT_DECAY), "--seed", str(SEED)]
    command += ["--weights", "weights.pt", "--data", "data.pt"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    losses = [float(loss) for loss in re.findall(r"loss\s+([\d.]+)", done.stdout)]
    assert len(losses) == STEPS, f"expected {STEPS} losses in the program's output:\n{done.stdout}"
    return losses


def list_files(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        print(f"  {path.relative_to(BUILD.parents[1])}  {path.stat().st_size:,} bytes")


@contextmanager
def heading(title: str) -> Iterator[None]:
    print(f"{title}\n", flush=True)
    began = time.perf_counter()
    yield
    print(f"\n  [{time.perf_counter() - began:.1f} s]\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
