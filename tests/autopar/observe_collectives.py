"""Run one step of a program on the ranks of a torchrun job and count the collectives of its model.

torchrun --nproc-per-node N observe_collectives.py DIRECTORY

Rank 0 prints a line of JSON: by kind, how many a rank runs and how many bytes all ranks
together put in. Bytes are those of the whole tensor for what gathers, scatters or reduces, and of what a rank
has for an exchange, as `costmodel.Collective` counts them. Sums of gradients after the backward are not
functional collectives, and not in here.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


class Observer(TorchDispatchMode):
    """Counts functional collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        kind = KINDS.get(op.name().partition("::")[2]) if op.name().startswith("_c10d_functional") else None
        if kind is not None:
            moved: Tensor = made if kind == "all_gather" else args[0]
            self.counts[kind] += 1
            self.num_bytes[kind] += moved.nbytes
        return made


def observe(directory: str) -> dict[str, tuple[int, int]]:
    """Kind -> number and bytes, of one forward and backward of a program with fresh weights."""
    sys.path[0] = directory
    reference = torch.load(f"{directory}/reference.pt", weights_only=True)
    train, runtime = import_module("train"), import_module("autopar_runtime")
    rank = train.build(torch.device("cpu"), reference["weights"])
    batch = runtime.replica_part(reference["batch"], rank.mesh, torch.device("cpu"))
    with Observer() as observer:
        train.forward_backward(rank, batch)
    found: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, dict(observer.num_bytes))
    return {
        kind: (count, sum(each.get(kind, 0) for each in found)) for kind, count in observer.counts.items()
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    observed = observe(sys.argv[1])
    if dist.get_rank() == 0:
        print(json.dumps(observed))
    dist.destroy_process_group()
