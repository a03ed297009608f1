"""Write the program of a plan and run its `train.py` on real ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

import autopar
from autopar.plan import Parallelism
from graphs import Capture


def write(captured: Capture, directory: Path, policy: str | None = None, **degrees: object) -> Path:
    """The program of a model under a plan with these degrees."""
    parallelism = Parallelism.model_validate(degrees)
    cluster = f"local-cpu*{parallelism.world_size}"
    plan = autopar.evaluate(captured, cluster, parallelism=parallelism, policy=policy)
    return autopar.compile(captured, plan).save(directory)


def train(program: Path, num_ranks: int, *options: object) -> list[str]:
    """The losses that `train.py` prints, one for each step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(program / "train.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return re.findall(r"^step \d+  loss (\S+)", done.stdout, re.MULTILINE)


def loaded(model: nn.Module, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The `state_dict` of the original model, filled by torch from a checkpoint."""
    state = {"model": {name: torch.zeros_like(each) for name, each in model.state_dict().items()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(state, checkpoint_id=checkpoint, no_dist=True)
    return state["model"]
