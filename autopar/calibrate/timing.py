"""How long a call takes, on operands that no cache remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from math import ceil

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

STABLE_SPREAD = 0.03
"""Samples are taken until their interquartile range is below this share of the median, or time is up."""
CPU_CACHE_BYTES = 64 * 2**20
"""What operands on a CPU have to outgrow: more last-level cache than a process of a few cores has."""
MAX_COPIES = 64
"""Operands so small that they would need more are bound by their launch, not by a cache."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median of the samples, and their interquartile range as a share of it."""

    seconds: float
    spread: float


def time_call(call: Callable[[], object], limit_s: float) -> Timing:
    """The time of `call` among others of its kind.

    torch's own Timer warms up, synchronises with the accelerator around each sample, and repeats the call in
    it until the clock's overhead vanishes. Sampling stops after about `limit_s`.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    measured = timer.adaptive_autorange(threshold=STABLE_SPREAD, max_run_time=limit_s)
    return Timing(measured.median, measured.iqr / measured.median)


def on_fresh_operands(call: Callable[..., object], *operands: Tensor) -> Callable[[], object]:
    """`call` on copies of `operands` in turn, so many that caches have forgotten a copy when its turn comes.

    That is how a training step meets its weights and activations.
    """
    num_bytes = sum(tensor.nbytes for tensor in operands)
    num_copies = min(MAX_COPIES, ceil(2 * _cache_bytes(operands[0].device) / num_bytes))
    copies = [tuple(tensor.clone() for tensor in operands) for _ in range(num_copies)]
    turns = cycle([operands, *copies])
    return lambda: call(*next(turns))


def _cache_bytes(device: torch.device) -> int:
    """The last cache before the memory of `device`."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return CPU_CACHE_BYTES
