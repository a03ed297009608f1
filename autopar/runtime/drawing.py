"""Random numbers: which ranks draw the same, and which others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.runtime.compiling import uncompiled
from autopar.runtime.hashing import hashed

_COMMON = 2**43
"""A seed tells what is common to ranks, which is below this, and the place of one rank among them."""


def seed_ranks(common: int, place: int) -> None:
    """Let this rank draw numbers of its own, and `drawn_together` the same on all ranks with that `common`,
    which differ in their places."""
    torch.manual_seed(place * _COMMON + _mixed(common % _COMMON, place))


def _mixed(common: int, place: int) -> int:
    """Its own inverse. The generator of a host reads 32 bits of a seed: they depend on both."""
    return common ^ hashed(str(place)) % _COMMON


@uncompiled
def drawn_apart(group: ProcessGroup, draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` makes with random numbers of its own on every rank of `group`, each of which has another
    part of a tensor; what the ranks draw together afterwards is the same on all of them again."""
    return _drawn_from(_seed() + group.rank(), draw)


@uncompiled
def drawn_together(draw: Callable[[], Tensor]) -> Tensor:
    """What `draw` makes with the same random numbers on all ranks that `seed_ranks` gave the same `common`;
    afterwards they have numbers of their own again.

    The seed of a rank, which no other draw changes, tells how often they drew so: each time it is another.
    Recomputation restores it with the rest of the generator, and makes the same once more.
    """
    place, mixed = divmod(torch.initial_seed(), _COMMON)
    common = hashed(f"after {_mixed(mixed, place)}")
    made = _drawn_from(common, draw)
    seed_ranks(common, place)
    return made


def _seed() -> int:
    """Drawn on the host, from numbers that recomputation restores: it makes the same once more."""
    return int(torch.randint(2**62, (), device="cpu"))


def _drawn_from(seed: int, draw: Callable[[], Tensor]) -> Tensor:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return draw()
