"""Run one step of a program that draws noise as `Denoising` does, eagerly and through `torch.compile`.

torchrun --nproc-per-node 4 noise_on_ranks.py DIRECTORY

Exits with 1 where replicas draw other noise, or ranks of the context axis the same, and tells where.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.autopar.rank_script import end


class _Noise(TorchDispatchMode):
    """Keeps what `randn_like` draws."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.randn_like.default:
            self.found.append(made.clone())
        return made


def run(directory: str) -> str | None:
    """None where all is drawn as it should, else what is wrong."""
    sys.path[0] = directory
    runtime, train = importlib.import_module("autopar_runtime"), importlib.import_module("train")
    reference = torch.load(f"{directory}/reference.pt", weights_only=True)
    device = runtime.start()
    rank = train.build(device, reference["weights"])
    batch = runtime.replica_part(reference["batch"], rank.mesh, device)
    for is_compiled in (False, True):
        if is_compiled:
            runtime.compile_stages(rank.stages.values(), backend="aot_eager")
        runtime.seed_step(3, rank.mesh, argparse.Namespace(seed=0, steps=10))
        with _Noise() as noise:
            train.forward_backward(rank, batch)
        drawn: list[Any] = [None] * dist.get_world_size()
        places = rank.mesh.get_local_rank("dp_replicate"), rank.mesh.get_local_rank("cp")
        dist.all_gather_object(drawn, (places, noise.found[0] if noise.found else None))
        if wrong := _wrong(drawn):
            return f"{'compiled' if is_compiled else 'eager'}: {wrong}"
    return None


def _wrong(drawn: Sequence[tuple[tuple[int, int], Tensor | None]]) -> str | None:
    for (one, mine), (other, others) in combinations(drawn, 2):
        if mine is None or others is None:
            return "a rank draws nothing"
        if torch.equal(mine, others) != (one[1] == other[1]):
            return (
                f"ranks {one} and {other} draw {'the same' if torch.equal(mine, others) else 'other'} noise"
            )
    return None


if __name__ == "__main__":
    end(run(*sys.argv[1:]))
