"""Random numbers that differ between ranks, or do not, otherwise than `seed_step` lets them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.runtime.compiling import uncompiled


@uncompiled
def drawn_apart(group: ProcessGroup, draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` makes with random numbers of its own on every rank of `group`, each of which has another
    part of a tensor; what the ranks draw together afterwards is the same on all of them again."""
    return _drawn_from(int(_seed()) + group.rank(), draw)


@uncompiled
def drawn_together(group: ProcessGroup, draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` makes with the same random numbers on every rank of `group`, all of which have the same
    tensor; afterwards they draw numbers of their own again. A message of eight bytes tells them which."""
    seed = _seed().to("cuda" if torch.cuda.is_available() else "cpu")
    dist.broadcast(seed, group=group, group_src=0)
    return _drawn_from(int(seed), draw)


def _seed() -> Tensor:
    """Drawn on the host, from numbers that recomputation restores: it makes the same once more."""
    return torch.randint(2**62, (), device="cpu")


def _drawn_from(seed: int, draw: Callable[[], Tensor]) -> Tensor:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return draw()
