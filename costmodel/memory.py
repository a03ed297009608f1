"""Memory of one device, as a ledger, and what ZeRO leaves of the model states on it.

With Ψ parameters, p, g and K bytes a parameter for the parameter, its gradient and the optimizer's states,
and N devices to shard over, ZeRO (arXiv:1910.02054, section 5) keeps on each

    stage 0   p Ψ + g Ψ + K Ψ                 stage 2   p Ψ + (g Ψ + K Ψ) / N
    stage 1   p Ψ + g Ψ + K Ψ / N             stage 3   (p Ψ + g Ψ + K Ψ) / N

p, g and K are an optimizer policy: named data in `data/optimizer_policies.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from costmodel.errors import CostModelError


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes on one device, by purpose; ledgers add. `reserved_bytes` is the framework's own."""

    parameters_bytes: float = 0.0
    gradients_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    activations_bytes: float = 0.0
    buffers_bytes: float = 0.0
    reserved_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """The sum of all entries."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.buffers_bytes
            + self.reserved_bytes
        )

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class OptimizerPolicy:
    """Bytes that training keeps per parameter: itself, its gradient, and the optimizer's named states."""

    name: str
    parameter_bytes: float
    gradient_bytes: float
    state_bytes: tuple[tuple[str, float], ...]

    @property
    def optimizer_bytes(self) -> float:
        """All of the optimizer's states, a master copy included."""
        return sum(num_bytes for _, num_bytes in self.state_bytes)

    @property
    def update_bytes(self) -> float:
        """What one optimizer step reads and writes: it reads all, and writes the parameter and the states."""
        return 2 * (self.parameter_bytes + self.optimizer_bytes) + self.gradient_bytes


def optimizer_policies() -> tuple[str, ...]:
    """The names that `optimizer_policy` knows, sorted."""
    return tuple(sorted(_policies()))


def optimizer_policy(name: str) -> OptimizerPolicy:
    """The policy of that name; raises CostModelError, with the nearest names, for an unknown one."""
    try:
        return _policies()[name]
    except KeyError:
        nearest = get_close_matches(name, _policies(), cutoff=0.4) or optimizer_policies()
        raise CostModelError(
            f"unknown optimizer policy {name!r}; did you mean {', '.join(nearest)}?"
        ) from None


def model_state_ledger(
    num_parameters: float, policy: OptimizerPolicy | str, zero_stage: int = 0, shard_degree: int = 1
) -> Ledger:
    """What one device keeps of `num_parameters`, those of its pipeline stage and tensor shard, when ZeRO
    `zero_stage` shards them over `shard_degree` devices.

    ZeRO-3's gathered copy of the unit that computes is a buffer, not a state: the caller adds it.
    Raises CostModelError for a stage other than 0, 1, 2, 3 or a degree below 1.
    """
    if zero_stage not in range(4):
        raise CostModelError(f"ZeRO has stages 0, 1, 2 and 3; got {zero_stage}")
    if shard_degree < 1:
        raise CostModelError(f"a shard degree is at least 1; got {shard_degree}")
    policy = optimizer_policy(policy) if isinstance(policy, str) else policy
    shard = num_parameters / shard_degree
    return Ledger(
        parameters_bytes=policy.parameter_bytes * (shard if zero_stage >= 3 else num_parameters),
        gradients_bytes=policy.gradient_bytes * (shard if zero_stage >= 2 else num_parameters),
        optimizer_bytes=policy.optimizer_bytes * (shard if zero_stage >= 1 else num_parameters),
    )


@cache
def _policies() -> Mapping[str, OptimizerPolicy]:
    text = files("costmodel").joinpath("data/optimizer_policies.json").read_text(encoding="utf-8")
    return {
        name: OptimizerPolicy(
            name, entry["parameter_bytes"], entry["gradient_bytes"], tuple(entry["state_bytes"].items())
        )
        for name, entry in json.loads(text).items()
    }
