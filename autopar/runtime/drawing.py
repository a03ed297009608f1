"""Random numbers that differ between ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.runtime.compiling import uncompiled


@uncompiled
def drawn_apart(group: ProcessGroup, draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` makes with random numbers of its own on every rank of `group`, each of which has another
    part of a tensor; what the ranks draw together afterwards is the same on all of them again.

    Its seed is drawn on the host, whose numbers are those of all ranks of `group`, so recomputation, which
    restores these, makes the same once more.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + group.rank())
        return draw()
