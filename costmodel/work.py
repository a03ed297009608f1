"""What the cost model is asked to price: work on one device, and collectives over a group of devices."""

from __future__ import annotations

from dataclasses import dataclass
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
    has stride 1 and each further axis the product of the sizes inside it. All groups of an axis communicate
    at once. Raises CostModelError unless both are at least 1.
    """

    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise CostModelError(
                f"a group needs a size and a stride of at least 1: got {self.size}, {self.stride}"
            )


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
