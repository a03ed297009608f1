"""Moves of data between the ranks of a group; autograd sees none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.runtime.dealing import Sections, deal, join


def gathered(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    """Everybody's slice of `dim`, joined."""
    whole: Tensor = funcol.wait_tensor(funcol.all_gather_single(x.contiguous(), dim, group))
    if sections is None and not zigzag:
        return whole
    return join(whole.chunk(group.size(), dim), dim, sections, zigzag)


def sliced(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    """This rank's slice of `dim`."""
    pieces = deal(x, group.size(), dim, sections, zigzag)[group.rank()]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].contiguous()


def padded(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    """The inverse of `sliced` with zeros where other ranks have their slices."""
    ranks = [torch.zeros_like(x)] * group.size()
    ranks[group.rank()] = x
    return join(ranks, dim, sections, zigzag)


def summed(x: Tensor, group: ProcessGroup, *_: Any) -> Tensor:
    """The sum over all ranks, on each of them."""
    reduced: Tensor = funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))
    return reduced


def scattered(
    x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None, zigzag: bool = False
) -> Tensor:
    """This rank's slice of the sum over all ranks."""
    if sections is not None or zigzag:
        dealt = deal(x, group.size(), dim, sections, zigzag)
        x = torch.cat([piece for pieces in dealt for piece in pieces], dim)
    mine: Tensor = funcol.wait_tensor(funcol.reduce_scatter_single(x.contiguous(), "sum", dim, group))
    return mine


def exchanged(x: Tensor, group: ProcessGroup, source: int, target: int, zigzag: Sequence[int] = ()) -> Tensor:
    """From a slice of dimension `source` to a slice of dimension `target`; `zigzag` are those of the two that
    are dealt out so."""
    dealt = deal(x, group.size(), target, None, target in zigzag)
    pieces = torch.stack([torch.cat(mine, target) for mine in dealt])
    received = funcol.wait_tensor(funcol.all_to_all_single(pieces, None, None, group))
    return join(received.unbind(0), source, None, source in zigzag)


def exchanged_back(
    x: Tensor, group: ProcessGroup, source: int, target: int, **order: Sequence[int]
) -> Tensor:
    """What `exchanged` had."""
    return exchanged(x, group, target, source, **order)


def untouched(x: Tensor, *_: Any) -> Tensor:
    """The same numbers, without a move."""
    return x.view_as(x)


def on_first_rank(x: Tensor, group: ProcessGroup, *_: Any) -> Tensor:
    """Zero but on the first rank."""
    return x.clone() if group.rank() == 0 else torch.zeros_like(x)
