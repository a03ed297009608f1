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
from typing import Any

from costmodel.errors import CostModelError


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes on one device at its fullest, by purpose; ledgers add.

    Attributes:
        parameters_bytes, gradients_bytes, optimizer_bytes: model states.
        activations_bytes: what is kept from forwards to their backwards.
        logits_bytes: what the loss works on beside that, where the peak is there: logits, their softmax and
            their gradient.
        buffers_bytes: the same for any other op: operands, results and gradients at the peak.
        gathered_bytes: parameters gathered to compute with, and gradients not yet scattered.
        fragmentation_bytes: what the allocator holds and cannot use.
        reserved_bytes: the framework's own: context, libraries, communication.
        moment: when the device is fullest, such as `backward of layers.7`.
    """

    parameters_bytes: float = 0.0
    gradients_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    activations_bytes: float = 0.0
    logits_bytes: float = 0.0
    buffers_bytes: float = 0.0
    gathered_bytes: float = 0.0
    fragmentation_bytes: float = 0.0
    reserved_bytes: float = 0.0
    moment: str = ""

    @property
    def entries(self) -> Mapping[str, float]:
        """Bytes by short name: `parameters`, `gradients`, ..."""
        return {name.removesuffix("_bytes"): getattr(self, name) for name in _ENTRIES}

    @property
    def allocated_bytes(self) -> float:
        """What tensors take: `torch.cuda.max_memory_allocated`."""
        return self.cached_bytes - self.fragmentation_bytes

    @property
    def cached_bytes(self) -> float:
        """What the allocator holds: `torch.cuda.max_memory_reserved`."""
        return self.total_bytes - self.reserved_bytes

    @property
    def total_bytes(self) -> float:
        """The sum of all entries."""
        return (
            self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
            + self.logits_bytes + self.buffers_bytes + self.gathered_bytes + self.fragmentation_bytes
            + self.reserved_bytes
        )  # fmt: skip

    def __add__(self, other: Ledger) -> Ledger:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _ENTRIES}
        return Ledger(**sums, moment=self.moment or other.moment)


_ENTRIES = tuple(field.name for field in fields(Ledger) if field.name.endswith("_bytes"))


@dataclass(frozen=True, slots=True)
class OptimizerPolicy:
    """Bytes that training keeps per parameter: itself, its gradient, and the optimizer's named states.

    `gathered_bytes` is what a parameter takes in the form that products read and that ZeRO gathers: as much
    as the parameter unless that is a master copy. A gradient is made in that form.
    """

    name: str
    parameter_bytes: float
    gradient_bytes: float
    state_bytes: tuple[tuple[str, float], ...]
    gathered_bytes: float

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


@dataclass(frozen=True, slots=True)
class _Usage:
    """A rule of thumb: the policy of runs for which all conditions hold; one that is left out always does."""

    policy: str
    software: str | None = None
    precisions: tuple[str, ...] | None = None
    fsdp: bool | None = None
    sharded: bool | None = None

    def holds(self, software: str, precision: str, fsdp: bool, sharded: bool) -> bool:
        return (
            self.software in (None, software)
            and (self.precisions is None or precision in self.precisions)
            and self.fsdp in (None, fsdp)
            and self.sharded in (None, sharded)
        )


def usual_policy(
    software: str, precision: str, zero_stage: int = 0, *, fsdp: bool = False
) -> OptimizerPolicy:
    """What AdamW usually keeps under an era of software (`costmodel.software`), at the precision of the
    products ("fp16", "bf16", "fp8", "mxfp8", "nvfp4", "fp32"), sharded at `zero_stage`, by `fsdp` or not.

    The rules stand in `data/optimizer_policies.json`; the first that holds counts.
    """
    usages = (
        _Usage(**{**usage, "precisions": _tuple(usage.get("precisions"))}) for usage in _data()["usual"]
    )
    conditions = software, precision, fsdp, zero_stage > 0
    return optimizer_policy(next(usage.policy for usage in usages if usage.holds(*conditions)))


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def model_state_ledger(
    num_parameters: float, policy: OptimizerPolicy | str, zero_stage: int = 0, shard_degree: int = 1
) -> Ledger:
    """What one device keeps of `num_parameters`, those of its pipeline stage and tensor shard, when ZeRO
    `zero_stage` shards them over `shard_degree` devices.

    A parameter that is a master copy is sharded in every stage above 0, and up to stage 2 the copy that
    products read stays gathered (`fully_shard` with `reshard_after_forward=False`). What stage 3 gathers for
    a moment is no state: the caller adds it.
    Raises CostModelError for a stage other than 0, 1, 2, 3 or a degree below 1.
    """
    if zero_stage not in range(4):
        raise CostModelError(f"ZeRO has stages 0, 1, 2 and 3; got {zero_stage}")
    if shard_degree < 1:
        raise CostModelError(f"a shard degree is at least 1; got {shard_degree}")
    policy = optimizer_policy(policy) if isinstance(policy, str) else policy
    shard = num_parameters / shard_degree
    parameters_bytes = policy.parameter_bytes * (shard if zero_stage >= 3 else num_parameters)
    if policy.gathered_bytes != policy.parameter_bytes and zero_stage in (1, 2) and shard_degree > 1:
        parameters_bytes = policy.parameter_bytes * shard + policy.gathered_bytes * num_parameters
    return Ledger(
        parameters_bytes=parameters_bytes,
        gradients_bytes=policy.gradient_bytes * (shard if zero_stage >= 2 else num_parameters),
        optimizer_bytes=policy.optimizer_bytes * (shard if zero_stage >= 1 else num_parameters),
    )


@cache
def _policies() -> Mapping[str, OptimizerPolicy]:
    return {
        name: OptimizerPolicy(
            name,
            entry["parameter_bytes"],
            entry["gradient_bytes"],
            tuple(entry["state_bytes"].items()),
            entry.get("gathered_bytes", entry["parameter_bytes"]),
        )
        for name, entry in _data()["policies"].items()
    }


@cache
def _data() -> Mapping[str, Any]:
    text = files("costmodel").joinpath("data/optimizer_policies.json").read_text(encoding="utf-8")
    data: Mapping[str, Any] = json.loads(text)
    return data
