"""Run one step of a program with dropout, and compare what its two ranks draw.

torchrun --nproc-per-node 2 draws_on_ranks.py DIRECTORY AXIS [SHAPE ...]

Exits with 1 where the ranks along AXIS drop out different numbers of a tensor that both hold whole, which are
those of each SHAPE (`2x16x64`), or the same of different parts, samples or layers, and tells which.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from itertools import combinations
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.autopar.rank_script import end


def drawn(directory: str) -> list[tuple[tuple[int, ...], Tensor]]:
    """Shape and mask of every dropout of this rank, and, in place of those of attention, some numbers."""
    sys.path[0] = directory
    runtime, train = importlib.import_module("autopar_runtime"), importlib.import_module("train")
    reference = torch.load(f"{directory}/reference.pt", weights_only=True)
    device = runtime.start()
    rank = train.build(device, reference["weights"])
    batch = runtime.replica_part(reference["batch"], rank.mesh, device)
    found: list[tuple[tuple[int, ...], Tensor]] = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def recorded(x: Tensor, p: float = 0.5, *rest: Any, **more: Any) -> Tensor:
        kept = dropout(torch.ones_like(x), p) != 0
        found.append((tuple(x.shape), kept.flatten()[:512]))
        return x * kept

    def recorded_attention(q: Tensor, *rest: Any, dropout_p: float = 0.0, **more: Any) -> Tensor:
        found.append((tuple(q.shape), torch.rand(64)))
        return attention(q, *rest, **more)

    with (
        patch.object(F, "dropout", recorded),
        patch.object(F, "scaled_dot_product_attention", recorded_attention),
    ):
        runtime.seed_step(3, rank.mesh, argparse.Namespace(seed=0, steps=10))
        train.forward_backward(rank, batch)
    return found


def run(directory: str, over: str, *whole: str) -> str | None:
    """None where the ranks, which lie along the axis `over`, draw as they should, else what is wrong."""
    shapes = {tuple(map(int, each.split("x"))) for each in whole}
    mine = drawn(directory)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if not mine or any(torch.equal(one, other) for (_, one), (_, other) in combinations(mine, 2)):
        return "a rank draws nothing, or the same twice"
    if over == "pp":
        same = [shape for shape, one in ranks[0] for _, other in ranks[1] if torch.equal(one, other)]
        return f"both ranks draw the same for {same}" if same else None
    for number, ((shape, one), (_, other)) in enumerate(zip(*ranks, strict=True)):
        if torch.equal(one, other) != (shape in shapes):
            return f"draw {number}, for {shape}: {'not ' if shape in shapes else ''}the same on both ranks"
    return None


if __name__ == "__main__":
    end(run(*sys.argv[1:]))
