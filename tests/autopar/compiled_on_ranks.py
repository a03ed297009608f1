"""Run a program eagerly and through `torch.compile`, and compare.

torchrun --nproc-per-node N compiled_on_ranks.py DIRECTORY BACKEND

Exits with 1 where losses or gradients differ, or the graph breaks other than on purpose, and tells where.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BROKEN_ON_PURPOSE = ("to_experts", "deferred_linear")
"""Of the runtime, what compiled code calls as it is."""


def local_part(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def steps(
    train: ModuleType, reference: dict[str, object], batch: dict[str, Tensor], backend: str
) -> list[Tensor]:
    """Loss and gradients of two steps of this rank, which start from the same parameters."""
    rank = train.build(torch.device("cpu"), reference["weights"])
    if backend:
        for stage in rank.stages.values():
            stage.compile(backend=backend)
    found = []
    for _ in range(2):
        found.append(train.forward_backward(rank, batch))
        for parameter in dict.fromkeys(rank.parameters().values()):
            if parameter.grad is not None:
                found.append(local_part(parameter.grad).clone())
                parameter.grad = None
    return found


def run(directory: str, backend: str) -> str | None:
    """None where all is equal, else what is wrong."""
    sys.path[0] = directory
    runtime, train = importlib.import_module("autopar_runtime"), importlib.import_module("train")
    reference = torch.load(f"{directory}/reference.pt", weights_only=True)
    device = runtime.start()
    batch = runtime.replica_part(reference["batch"], runtime.make_mesh("cpu", train.MESH), device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (steps(train, reference, batch, each) for each in ("", backend))
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    source = Path(directory, "model.py").read_text()
    if breaks and not any(name in source for name in BROKEN_ON_PURPOSE):
        return f"breaks: {breaks}"
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        return "nothing was compiled"
    tolerance = {torch.bfloat16: 5e-2}.get(eager[-1].dtype, 1e-5)
    for number, (mine, other) in enumerate(zip(eager, compiled, strict=True)):
        difference = float((mine - other).double().norm() / mine.double().norm().clamp(min=1e-6))
        if difference > tolerance:
            return f"tensor {number} of {len(eager)} differs by {difference:.1e}"
    return None


if __name__ == "__main__":
    wrong = run(*sys.argv[1:])
    dist.destroy_process_group()
    if wrong is not None:
        print(wrong)
        sys.exit(1)
