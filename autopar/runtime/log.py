"""How training goes."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Expected:
    """What a plan says of a step: tokens of all replicas, the model's FLOPs on one device (without what is
    computed again) and its peak, and how long the step takes."""

    tokens: int
    model_flops: float
    peak_flops_per_s: float
    step_s: float

    def utilization(self, step_s: float) -> float:
        """The model FLOPs utilization (MFU, arXiv:2204.02311, appendix B) of a step that takes `step_s`."""
        return self.model_flops / step_s / self.peak_flops_per_s


class Log:
    """Tells how training goes, on rank 0: printed, and as scalars in TensorBoard."""

    def __init__(self, expected: Expected, options: argparse.Namespace) -> None:
        self.expected, self.every, self.began_s = expected, options.log_every, time.perf_counter()
        self.num_steps, self.num_asked = 0, options.steps
        self.writer: Any = None
        if options.tensorboard and dist.get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # only those who ask for it need the package

            self.writer = SummaryWriter(str(options.tensorboard))

    def step(self, step: int, **values: float | Tensor) -> None:
        """Note step `step`, counted from 1; reads the values where they are due to be told."""
        self.num_steps += 1
        if step % self.every:
            return
        numbers = {name: float(value) for name, value in values.items()}
        step_s = (time.perf_counter() - self.began_s) / self.num_steps
        expected = self.expected
        speeds = {
            "tokens/s": expected.tokens / step_s,
            "MFU": expected.utilization(step_s),
            "MFU/predicted": expected.step_s / step_s,
        }
        if dist.get_rank() == 0:
            told = "  ".join(f"{name} {value:.6g}" for name, value in (numbers | speeds).items())
            print(f"step {step}  {told}", flush=True)
            if self.writer is not None:
                for name, value in (numbers | speeds).items():
                    self.writer.add_scalar(name, value, step)
        self.num_steps, self.began_s = 0, time.perf_counter()

    def end(self, last: int) -> None:
        """Say so where the data ended with step `last`, before the steps that were asked for."""
        if last < self.num_asked and dist.get_rank() == 0:
            print(f"data ended after step {last} of {self.num_asked}", flush=True)
