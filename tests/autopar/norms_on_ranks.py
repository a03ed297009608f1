"""Clip the gradients of several programs, and compare with the norm in one process.

torchrun --nproc-per-node N norms_on_ranks.py DIRECTORY...

Rank 0 prints a line for every program: its directory, and `equal` or what is not.
"""

from __future__ import annotations

import importlib
import sys

import torch
import torch.distributed as dist

from tests.autopar.run_programs import PROGRAM_MODULES, keep_the_process_group

LARGEST_NORM = 0.01


def run(directory: str) -> str:
    """Whether the norm before clipping is that of the whole model, and all gradients shrink by one factor."""
    for module in PROGRAM_MODULES:
        sys.modules.pop(module, None)
    sys.path[0] = directory
    runtime, model, train = (importlib.import_module(name) for name in PROGRAM_MODULES)
    reference = torch.load(f"{directory}/reference.pt", weights_only=True)
    whole = {name: g for name, g in reference["gradients"].items() if name not in reference["tied"]}
    wanted = torch.stack([gradient.double().norm() for gradient in whole.values()]).norm()
    device = runtime.start()
    rank = train.build(device, reference["weights"])
    train.forward_backward(rank, runtime.replica_part(reference["batch"], rank.mesh, device))
    tied = getattr(rank, "tied", ())
    found = [
        runtime.clip_gradients(tuple(rank.stages.values()), LARGEST_NORM, rank.mesh, model.PLACEMENTS, tied)
        for _ in range(2)
    ]
    expected = [wanted, torch.tensor(LARGEST_NORM, dtype=torch.float64)]
    if torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-4):
        return "equal"
    return f"norms {[float(each) for each in found]}, not {[float(each) for each in expected]}"


if __name__ == "__main__":
    keep_the_process_group()
    for directory in sys.argv[1:]:
        print(f"\n[rank {dist.get_rank()}] {directory}: {run(directory)}", flush=True)
