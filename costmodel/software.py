"""What software makes of a device: named eras of kernels, launches and overlap, as data.

Hardware facts say what a device can do; how much of it a training step gets was another matter in 2020 than
it is today. An era states, for a generation of training software, which kernels it has and what it hides.
The eras stand in `data/software.json`, each number with where it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from costmodel.errors import CostModelError

Attention = Literal["unfused", "flash", "native"]
Fusion = Literal["none", "module", "chain"]


LEAST_EXPOSED = 1e-3
"""What is left at least of a tensor-parallel collective, whatever a software is said to hide."""


@dataclass(frozen=True, slots=True)
class Software:
    """One era of training software.

    Attributes:
        name: what it is called.
        attention: "unfused" (scores in memory), "flash" (one portable kernel), "native" (one kernel written
            for the device).
        fusion: which elementwise ops share a kernel: "none", those of one module, or any "chain" of them.
        matmul_share, memory_share, attention_share: what kernels inside a step keep of the rates that the
            device reaches alone: clocks and caches are shared, shapes are not the benchmark's.
        attention_backward_share: the backward's rate over the forward's.
        host_s_per_launch, host_s_per_collective: what the host takes to launch a kernel, or a collective; it
            works ahead of the device, so a block takes the longer of the two.
        step_overhead_s: what else a step takes: data, logging, what the host waits for.
        collective_share: what collectives inside a step keep of the links' rate.
        gradient_sync_overlap, parameter_gather_overlap: which share of the backward's, and of the compute's,
            time can hide that communication.
        tensor_parallel_overlap: which share of a tensor-parallel collective hides behind its product; of all
            of it, a trifle is left (`tensor_parallel_exposed`).
        async_tensor_parallel_overlap: the same, at least, where products run in parts beside collectives.
        contention: how much slower compute gets while communication runs behind it.
        blocking_sends: whether messages between stages stop both of them.
        fused_gradient_accumulation: whether weight gradients are added where they are computed.
        recompute_stops_early: whether recomputation ends with the last value that the backward reads, so that
            a block's last product is not run again.
        scattered_messages: whether ranks of a tensor axis that hold the same activation send a part of it
            each to the next stage, and gather it there (arXiv:2104.04473, section 4.1).
        grouped_launches: whether products of a group of experts are launched one by one.
        keeps_quantised: whether a product on 8 bits keeps its operand as it was quantised.
        fused_loss: whether the loss reads logits in their own precision and makes their gradient from their
            softmax in one step.
        cached_weight_gradients: whether a tensor for the gradient of every weight of a block stays allocated,
            shared by all blocks.
        fragmentation: what the allocator reserves over what is allocated, as a share of activations.
    """

    name: str
    attention: Attention
    fusion: Fusion
    matmul_share: float
    memory_share: float
    attention_share: float
    attention_backward_share: float
    host_s_per_launch: float
    host_s_per_collective: float
    step_overhead_s: float
    collective_share: float
    gradient_sync_overlap: float
    parameter_gather_overlap: float
    tensor_parallel_overlap: float
    async_tensor_parallel_overlap: float
    contention: float
    blocking_sends: bool
    fused_gradient_accumulation: bool
    recompute_stops_early: bool
    scattered_messages: bool
    grouped_launches: bool
    keeps_quantised: bool
    fused_loss: bool
    cached_weight_gradients: bool
    fragmentation: float

    @property
    def tensor_parallel_exposed(self) -> float:
        """Which share of a tensor-parallel collective nothing hides. A trifle at least: links are not free,
        and of strategies that take as long the one that communicates less is the better."""
        return max(LEAST_EXPOSED, 1 - self.tensor_parallel_overlap)

    @property
    def with_async_tensor_parallelism(self) -> Software:
        """The same where products run in parts beside their collectives, unless it hides as much anyway."""
        overlap = max(self.tensor_parallel_overlap, self.async_tensor_parallel_overlap)
        return replace(self, tensor_parallel_overlap=overlap)

    @property
    def kinds(self) -> tuple[object, ...]:
        """All that is no number: which kernels there are and what they keep, not how fast they are."""
        values = (getattr(self, field.name) for field in fields(self) if field.name != "name")
        return tuple(value for value in values if not isinstance(value, float))


def software(name: str) -> Software:
    """The era of that name; raises CostModelError, with the nearest names, for an unknown one."""
    try:
        return _eras()[name]
    except KeyError:
        nearest = get_close_matches(name, _eras(), cutoff=0.3) or software_eras()
        raise CostModelError(f"unknown software {name!r}; did you mean {', '.join(nearest)}?") from None


def software_eras() -> tuple[str, ...]:
    """The names that `software` knows, in the order of time."""
    return tuple(_eras())


@cache
def _eras() -> Mapping[str, Software]:
    text = files("costmodel").joinpath("data", "software.json").read_text(encoding="utf-8")
    data: Mapping[str, Any] = json.loads(text)
    shared = data["shared"]
    return {name: _era(name, {**shared, **era}) for name, era in data["eras"].items()}


def _era(name: str, facts: Mapping[str, Any]) -> Software:
    known = {field.name for field in fields(Software)} - {"name"}
    return Software(name=name, **{key: facts[key]["value"] for key in known})
