"""A dimension dealt out over the ranks of a group.

A dimension of several sections, such as the columns of joint queries, keys and values, gives every rank a
slice of each. One of positions may be dealt out in zigzag: cut into two slices for every rank, of which
rank i gets the i-th from the front and the i-th from the back. Under a causal mask later positions attend
to more, and so all ranks have as much to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Sections = tuple[int, ...] | None
"""Sizes of the parts of a dimension each of which is dealt out; None: it is one."""


def section_sizes(size: int, sections: Sections) -> Sequence[int]:
    """The sizes of the parts of a dimension of `size`."""
    return (size,) if sections is None else sections


def deal(x: Tensor, size: int, dim: int, sections: Sections, zigzag: bool) -> list[list[Tensor]]:
    """The slices of each of `size` ranks: one of every section, or two in zigzag."""
    parts = x.split(list(section_sizes(x.shape[dim], sections)), dim)
    if not zigzag:
        return [list(ranks) for ranks in zip(*(part.chunk(size, dim) for part in parts), strict=True)]
    slices = [part.chunk(2 * size, dim) for part in parts]
    return [[piece for each in slices for piece in (each[i], each[-1 - i])] for i in range(size)]


def join(ranks: Sequence[Tensor], dim: int, sections: Sections, zigzag: bool) -> Tensor:
    """The whole of what was dealt out."""
    count = 2 if zigzag else 1
    wholes = section_sizes(ranks[0].shape[dim] * len(ranks), sections)
    local = [part // (len(ranks) * count) for part in wholes for _ in range(count)]
    dealt = zip(*(rank.split(local, dim) for rank in ranks), strict=True)
    ordered = (pieces[::-1] if zigzag and index % 2 else pieces for index, pieces in enumerate(dealt))
    return torch.cat([piece for pieces in ordered for piece in pieces], dim)
