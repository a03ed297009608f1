"""Run a program eagerly and through `torch.compile`, and compare.

torchrun --nproc-per-node N compiled_on_ranks.py DIRECTORY BACKEND

Exits with 1 where losses or gradients differ, the graph breaks other than on purpose, or what is computed
again is not compiled, and tells where.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from tests.autopar.rank_script import end

BROKEN_ON_PURPOSE = ("deferred_", "drawn_")
"""Of the runtime, what compiled code calls as it is."""

GATHERING = "function `disable` in file"
"""In torch's words, where `fully_shard` gathers the parameters of a module inside of a compiled one."""


def local_part(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Recording:
    """A backend of `torch.compile` that remembers the names of what its graphs call."""

    def __init__(self, backend: str) -> None:
        self.backend = lookup_backend(backend)
        self.called: set[str] = set()

    def __call__(self, module: GraphModule, inputs: list[Tensor]) -> Any:
        self.called |= {str(node.target) for node in module.graph.nodes}
        return self.backend(module, inputs)


def steps(
    runtime: ModuleType,
    train: ModuleType,
    reference: dict[str, object],
    batch: dict[str, Tensor],
    backend: Recording | None,
) -> list[Tensor]:
    """Loss and gradients of two steps of this rank, which start from the same parameters."""
    rank = train.build(torch.device("cpu"), reference["weights"])
    if backend is not None:
        runtime.compile_stages(rank.stages.values(), backend=backend)
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
    recording = Recording(backend)
    eager, compiled = (steps(runtime, train, reference, batch, each) for each in (None, recording))
    breaks = [each for each in torch._dynamo.utils.counters["graph_break"] if GATHERING not in each]
    source = Path(directory, "model.py").read_text()
    if breaks and not any(name in source for name in BROKEN_ON_PURPOSE):
        return f"breaks: {breaks}"
    if not recording.called:
        return "nothing was compiled"
    if "keep=" in source and not any("activation_checkpoint" in name for name in recording.called):
        return "recomputed blocks run eagerly"
    tolerance = {torch.bfloat16: 5e-2}.get(eager[-1].dtype, 1e-5)
    for number, (mine, other) in enumerate(zip(eager, compiled, strict=True)):
        difference = float((mine - other).double().norm() / mine.double().norm().clamp(min=1e-6))
        if difference > tolerance:
            return f"tensor {number} of {len(eager)} differs by {difference:.1e}"
    return None


if __name__ == "__main__":
    end(run(*sys.argv[1:]))
