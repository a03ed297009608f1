"""What of a tensor lies on this rank, and in which precision it is summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(x: Tensor) -> Tensor:
    """What this rank has of a tensor: its shard under `fully_shard`, else all of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def widened(dtype: torch.dtype) -> torch.dtype:
    """Single precision, or what is wider."""
    return torch.promote_types(dtype, torch.float32)
