"""What the cost model is asked to price: work on one device, and collectives over a group of devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from costmodel.errors import CostModelError

WorkKind = Literal["matmul", "attention", "native_attention", "memory"]
CollectiveKind = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "scatter",
    "gather",
    "send_recv",
]


@dataclass(frozen=True, slots=True)
class Work:
    """What one device does in one kernel, or in a fused chain of kernels.

    `flops` counts a multiply-add as two; `bytes` is what is read from and written to device memory; `dtype`
    is the type the arithmetic runs in ("bf16", "fp32", ...); `kind` says which of the device's efficiencies
    applies.

    `shape` is what the efficiency depends on: `(batch, m, n, k)` of a product `[batch, m, k] @ [batch, k, n]`
    and `(heads, queries, keys, head_dim)` of an attention; `()` where nothing is known but the FLOPs.
    `num_launches` is how many kernels the host launches for it, 0 for the part of a chain that another one
    launches; several run side by side. Raises CostModelError for a negative amount.
    """

    flops: float
    bytes: float
    dtype: str = "bf16"
    kind: WorkKind = "matmul"
    shape: tuple[int, ...] = ()
    num_launches: int = 1

    def __post_init__(self) -> None:
        if self.flops < 0 or self.bytes < 0 or self.num_launches < 0:
            raise CostModelError(
                f"work cannot be negative: got {self.flops:g} FLOPs, {self.bytes:g} bytes and "
                f"{self.num_launches} launches"
            )


@dataclass(frozen=True, slots=True)
class Group:
    """`size` ranks that lie `stride` apart: r, r + stride, r + 2 * stride, ...

    Ranks number a cluster's devices contiguously and a mesh is laid out row-major, so the innermost mesh axis
    has stride 1 and each further axis the product of the sizes inside it. A group over several axes with
    others between them lies in runs: `outer` then gives, innermost first, how often all that is inside is
    repeated, and how far apart. `Group(8, 1, ((2, 16),))` are the ranks 0 to 3 and 16 to 19. All groups of an
    axis communicate at once.

    Raises CostModelError unless all numbers are at least 1 and the repetitions divide the size.
    """

    size: int
    stride: int = 1
    outer: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        repeats = prod(count for count, _ in self.outer)
        if min(self.size, self.stride, *(min(part) for part in self.outer)) < 1 or self.size % repeats:
            raise CostModelError(
                f"a group needs a size and a stride of at least 1, and runs that divide it: got {self.size}, "
                f"{self.stride}{f', {self.outer}' if self.outer else ''}"
            )

    @staticmethod
    def of(*parts: tuple[int, int]) -> Group:
        """The group over axes of these (size, stride), in any order; neighbours that nest become one."""
        return _group_over(parts)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(size, stride) of every axis that the group is over, innermost first."""
        return ((self.size // prod(count for count, _ in self.outer), self.stride), *self.outer)

    @property
    def reach(self) -> int:
        """How many devices lie between its first and last rank, both counted."""
        return 1 + sum((size - 1) * stride for size, stride in self.parts)


@lru_cache(maxsize=4096)
def _group_over(parts: tuple[tuple[int, int], ...]) -> Group:
    merged: list[tuple[int, int]] = []
    for size, stride in sorted(parts, key=lambda part: part[1]):
        if size == 1:
            continue
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        else:
            merged.append((size, stride))
    if not merged:
        return Group(1)
    return Group(prod(size for size, _ in merged), merged[0][1], tuple(merged[1:]))


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective over `group`.

    `num_bytes` is the whole payload S: for all_gather the gathered tensor, for reduce_scatter the input, for
    all_reduce, broadcast and reduce the tensor, for scatter and gather the whole tensor at the root, for
    all_to_all what one rank holds, for send_recv the message between neighbours of the group. `alone` is
    whether no other group of the axis communicates meanwhile. Raises CostModelError when it is negative.
    """

    kind: CollectiveKind
    num_bytes: float
    group: Group
    alone: bool = False

    def __post_init__(self) -> None:
        if self.num_bytes < 0:
            raise CostModelError(f"a collective cannot move a negative payload: got {self.num_bytes:g} bytes")
