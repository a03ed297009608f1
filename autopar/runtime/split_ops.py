"""Ops that know that an operand is split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right


def embedding(indices: Tensor, weight: Tensor, vocab: ProcessGroup, padding_idx: int = -1) -> Tensor:
    """A lookup in a table whose rows are split over `vocab`. Returns a partial sum: zero for rows of other
    ranks."""
    start = vocab.rank() * weight.shape[0]
    local = indices - start
    mine = (local >= 0) & (local < weight.shape[0])
    padding = padding_idx - start if 0 <= padding_idx - start < weight.shape[0] else None
    found = F.embedding(local.where(mine, 0), weight, padding_idx=padding)
    return found * mine.unsqueeze(-1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: ProcessGroup,
    *,
    zigzag: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of queries `[..., s/n, d]`, split over the n ranks of `rows`, to all keys up to their own
    positions.

    Each slice of queries is multiplied with the keys that it may see and with no others.
    """
    slices = query.chunk(2, -2) if zigzag else (query,)
    places = (rows.rank(), 2 * rows.size() - 1 - rows.rank())
    attended = []
    for mine, place in zip(slices, places, strict=False):
        length = mine.shape[-2]
        seen = min((place + 1) * length, key.shape[-2])
        attended.append(
            F.scaled_dot_product_attention(
                mine,
                key[..., :seen, :],
                value[..., :seen, :],
                attn_mask=_causal_mask(length, seen, place * length, query.device),
                dropout_p=dropout_p,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(attended, -2) if zigzag else attended[0]


def _causal_mask(num_queries: int, num_keys: int, first: int, device: torch.device) -> Tensor:
    """The mask of queries that stand at `first` and after; where there is a kernel for it, without memory."""
    if device.type == "cuda" and num_keys == first + num_queries:
        bias: Tensor = causal_lower_right(num_queries, num_keys)
        return bias
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(first)
