"""Cross-entropy whose rows or classes are split. Over groups of rows the result is partial: the sum of this
rank's rows, divided by the number of valid targets on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.runtime.collectives import all_reduce
from autopar.runtime.moves import summed
from autopar.runtime.tensors import widened


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    rows: Sequence[ProcessGroup] = (),
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of `logits` `[n, c]` whose rows are split over `rows`, each of these groups in turn."""
    total = F.cross_entropy(
        logits, target, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return total if reduction == "sum" else total / _num_targets(target, rows, ignore_index)


def sharded_cross_entropy(
    logits: Tensor,
    target: Tensor,
    classes: ProcessGroup,
    *,
    rows: Sequence[ProcessGroup] = (),
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of `logits` `[n, c]` whose classes are split over `classes`, and rows over `rows`, on
    every rank of `classes`. No rank has all logits of a row; what it sends is three numbers a row."""
    highest = funcol.wait_tensor(funcol.all_reduce(logits.detach().amax(-1), "max", classes))
    shifted = (logits - highest.unsqueeze(-1)).to(widened(logits.dtype))
    log_normalizer = all_reduce(shifted.exp().sum(-1), classes).log()
    local = target - classes.rank() * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    picked = shifted.gather(-1, local.where(mine, 0).unsqueeze(-1)).squeeze(-1) * mine
    loss = log_normalizer - all_reduce(picked, classes)
    if label_smoothing:
        average = all_reduce(shifted.sum(-1), classes) / (logits.shape[-1] * classes.size())
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_normalizer - average)
    total = loss.masked_fill(target == ignore_index, 0).sum().to(logits.dtype)
    return total if reduction == "sum" else total / _num_targets(target, rows, ignore_index)


def _num_targets(target: Tensor, rows: Sequence[ProcessGroup], ignore_index: int) -> Tensor:
    """How many targets count, on all ranks of `rows`."""
    count = (target != ignore_index).sum()
    for group in rows:
        count = summed(count, group)
    return count
