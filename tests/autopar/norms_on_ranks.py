"""Clip the gradients of a program, and compare with the norm in one process.

torchrun --nproc-per-node N norms_on_ranks.py DIRECTORY

Exits with 1 where the norms differ, and tells them.
"""

from __future__ import annotations

import importlib
import sys

import torch

from tests.autopar.rank_script import end

LARGEST_NORM = 0.01


def run(directory: str) -> str | None:
    """None where the norm before clipping is that of the whole model and all gradients shrink by one factor,
    else what is wrong."""
    sys.path[0] = directory
    runtime, model, train = (importlib.import_module(name) for name in ("autopar_runtime", "model", "train"))
    reference = torch.load(f"{directory}/reference.pt", weights_only=True)
    whole = {name: g for name, g in reference["gradients"].items() if name not in reference["tied"]}
    wanted = torch.stack([gradient.double().norm() for gradient in whole.values()]).norm()
    device = runtime.start()
    rank = train.build(device, reference["weights"])
    train.forward_backward(rank, runtime.replica_part(reference["batch"], rank.mesh, device))
    further = runtime.further_copies(rank.tied) if hasattr(rank, "tied") else ()
    found = [
        runtime.clip_gradients(
            tuple(rank.stages.values()), LARGEST_NORM, rank.mesh, model.PLACEMENTS, further
        )
        for _ in range(2)
    ]
    expected = [wanted, torch.tensor(LARGEST_NORM, dtype=torch.float64)]
    if torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-4):
        return None
    return f"norms {[float(each) for each in found]}, not {[float(each) for each in expected]}"


if __name__ == "__main__":
    end(run(sys.argv[1]))
