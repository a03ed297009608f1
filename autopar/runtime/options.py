"""The command line of `train.py`, and the learning rate that it asks for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from autopar.runtime.optimizers import Optimizer
from autopar.runtime.samples import SOURCES


def training_options(description: str | None) -> argparse.Namespace:
    """The command line of `train.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=10, help="optimizer steps in all, those before a restart included")
    add("--data", help=f"{SOURCES}; default: random samples")
    add("--token-dtype", default="uint16", help="of a file of tokens (default: uint16)")
    add("--shift", action="store_true", help="labels are the next tokens: for models that do not shift them")
    add("--workers", type=int, default=0, help="processes that read data")
    add("--weights", type=Path, help="of the original model: torch.save, safetensors or a checkpoint")
    add("--checkpoints", type=Path, help="directory to save to, and to resume from where it has any")
    add("--save-every", type=int, default=1000, metavar="STEPS")
    add("--learning-rate", type=float, default=1e-3, help="at its highest")
    add("--warmup", type=int, default=0, metavar="STEPS", help="of rising learning rate; then a cosine")
    add("--final-rate", type=float, default=1.0, help="share of the learning rate at the last step")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95))
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=math.inf, help="largest norm of all gradients together")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--log-every", type=int, default=1, metavar="STEPS")
    add("--tensorboard", type=Path, help="directory of its event files")
    return parser.parse_args()


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """What step `step`, counted from 0, is taken with: a linear rise, then half a cosine down to the final
    rate."""
    if step < options.warmup:
        return float(options.learning_rate * (step + 1) / options.warmup)
    gone = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    left = (1 + math.cos(math.pi * gone)) / 2
    return float(options.learning_rate * (options.final_rate + (1 - options.final_rate) * left))


def set_learning_rate(optimizer: Optimizer, step: int, options: argparse.Namespace) -> float:
    """Let the optimizer take step `step` with its learning rate, and return it."""
    rate = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
