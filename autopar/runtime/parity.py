"""A program held against what the original model did: loss, gradients, and parameters after AdamW."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.gathering import gather
from autopar.runtime.layout import Placements

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative, by the least precise dtype of the parameters.

In half precision both sides are off: the original's own gradients by up to 1.7 % (a norm's bias of dinov2 in
fp16, against double), so that two of them differ by more than that.
"""

PARAMETERS_FACTOR = 10
"""How much more parameters may differ where the original computes anything in single precision or less, as
many models do inside: sums in another order differ then, and AdamW divides small gradients by themselves."""


class Parity:
    """The largest differences from `reference`, what the original model did, gathered while a program runs.

    `parameters` are this rank's by name, on `mesh`, and lie as `placements` say.
    """

    def __init__(
        self,
        reference: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        mesh: DeviceMesh,
        placements: Placements,
    ) -> None:
        self.reference, self.parameters, self.mesh, self.placements = reference, parameters, mesh, placements
        dtypes = {each.dtype for each in reference["weights"].values()}
        self.dtype = max(dtypes, key=lambda each: TOLERANCE.get(each, 0.0))
        self.is_half = self.dtype.itemsize == 2
        # Rounding to half precision turns signs of single elements, and a ReLU or AdamW goes by the sign.
        self.order = 2.0 if self.is_half else math.inf
        largest = max(float(each.abs().max()) for each in reference["gradients"].values())
        # Of gradients that should be zero.
        self.rounding = largest * (torch.finfo(self.dtype).eps if self.is_half else 1e-4)
        self.worst: dict[str, tuple[float, str]] = {"loss": (0.0, "")}

    def after_backward(self, step: int, loss: Tensor) -> None:
        """Compare the loss of a step, counted from 0, and the gradients of the first one."""
        wanted = self.reference["losses"][step]
        found = loss.cpu().double()
        off = difference(found, torch.tensor(wanted, dtype=torch.float64), 1e-12, math.inf)
        self.worst["loss"] = max(self.worst["loss"], (off, f"step {step + 1}"))
        if dist.get_rank() == 0:
            print(f"step {step + 1}  loss {found.item():.8f}  original {wanted:.8f}", flush=True)
        if step == 0:
            self._compare_gradients()

    def _compare_gradients(self) -> None:
        wanted, tied = self.reference["gradients"], self.reference["tied"]
        mine = {name: each.grad for name, each in self.parameters.items() if each.grad is not None}
        found = gather(mine, self.mesh, self.placements)
        self.worst["gradients"] = compare(found, wanted, self.rounding, self.order)
        missing = untied(wanted, tied) - untied(found, tied)
        if missing:
            self.worst["gradients"] = (math.inf, f"no gradient for {', '.join(sorted(missing))}")

    def after_training(self, parameters: Mapping[str, Tensor], stages: Iterable[nn.Module]) -> None:
        """Compare the parameters that the last step left, and running statistics in `stages`."""
        weights, wanted = self.reference["weights"], self.reference["parameters"]
        found = gather(parameters, self.mesh, self.placements, self.parameters)
        # How far AdamW moves any parameter.
        farthest = self.reference["optimizer"]["lr"] * len(self.reference["losses"])
        if any(each.dtype != weights[name].dtype for name, each in wanted.items()):
            # Master copies: they tell more exactly how far AdamW went.
            found, wanted = moved(found, weights), moved(wanted, weights)
            farthest /= 10
        if self.is_half:  # AdamW takes full steps also by gradients that should be zero
            gradients = self.reference["gradients"]
            felt = {name: each.abs() > self.rounding for name, each in gradients.items()}
            found = {name: each.cpu() * felt[name] for name, each in found.items() if name in felt}
            wanted = {name: wanted[name] * felt[name] for name in found}
        self.worst["parameters"] = compare(found, wanted, farthest, self.order)
        buffers = {name: each for stage in stages for name, each in stage.named_buffers()}
        known = {name: each for name, each in buffers.items() if name in self.reference["buffers"]}
        if statistics := gather(known, self.mesh, self.placements):
            self.worst["buffers"] = compare(statistics, self.reference["buffers"], 1e-3)

    def is_equal(self) -> bool:
        """Whether all differences are within their limits, which the first rank prints."""
        limits = dict.fromkeys(self.worst, TOLERANCE[self.dtype])
        if self.reference["narrowest"] != torch.float64:
            limits["parameters"] *= PARAMETERS_FACTOR
        equal = all(value <= limits[what] for what, (value, _) in self.worst.items())
        if dist.get_rank() == 0:
            for what, (value, where) in self.worst.items():
                allowed = f"{limits[what]:.0e} allowed"
                print(f"{what}: largest relative difference {value:.2e} of {allowed} ({where})")
            print(f"{'equal' if equal else 'NOT EQUAL'} to the original", flush=True)
        return equal


def difference(found: Tensor, wanted: Tensor, floor: float, order: float) -> float:
    """The norm of the difference, relative to the one of `wanted` with elements of at least `floor`; infinite
    where something is not a number."""
    largest: float = max(float(wanted.norm(order)), floor * wanted.numel() ** (1 / order), sys.float_info.min)
    relative = float((found - wanted).norm(order)) / largest
    return relative if math.isfinite(relative) else math.inf


def compare(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], floor: float, order: float = math.inf
) -> tuple[float, str]:
    """The largest difference and where it is. What the program does not use, it does not hold."""
    wide = {name: each.cpu().double() for name, each in found.items()}
    return max((difference(each, wanted[name].double(), floor, order), name) for name, each in wide.items())


def moved(found: Mapping[str, Tensor], began: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far parameters are from where they began."""
    return {name: each.cpu().double() - began[name].double() for name, each in found.items()}


def untied(tensors: Iterable[str], tied: Mapping[str, str]) -> set[str]:
    """The names of tensors, a tied parameter under its first one: a stage holds the paths that it uses."""
    return {tied.get(name, name) for name in tensors}
