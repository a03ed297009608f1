"""What every pipeline rank holds at its fullest: the ledgers of a chain under a parallelism and given cuts.

A stage is fullest when its schedule has most microbatches in flight and one of its units works: then it holds
what the microbatches in flight keep and, of the last of them, what the units before the working one keep and
whatever that one holds (`autopar.search.saved`). With u the units of a stage, S what a unit keeps, W the most
that it holds and k microbatches in flight, its activations take

    (k - 1) Σ S_u + max over u of (Σ_{v < u} S_v + W_u).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.plan import Parallelism
from autopar.search.data_axes import data_groups, held_states
from autopar.search.units import Chain, ParameterShard, Unit
from costmodel import Ledger, OptimizerPolicy, peak_activation_bytes
from hardware_db import Accelerator


def rank_ledgers(
    chain: Chain, cuts: Sequence[int], p: Parallelism, policy: OptimizerPolicy, device: Accelerator
) -> tuple[Ledger, ...]:
    """The ledger of each pipeline rank, which holds every `p.pp`-th of the (virtual) stages.

    `cuts` are the numbers of the units that begin the stages, 0 first.
    """
    era, parameters = chain.era, chain.parameters
    stages = [chain.units[a:b] for a, b in zip(cuts, [*cuts[1:], len(chain.units)], strict=True)]
    held = [_held(units, p) for units in stages]
    activations = peak_activation_bytes(
        p.schedule, p.pp, p.num_microbatches, [stage.saved_bytes for stage in held], p.num_virtual_stages
    )
    ledgers = []
    for rank, num_bytes in enumerate(activations):
        units = [unit for stage in stages[rank :: p.pp] for unit in stage]
        own = {name: parameters[name] for unit in units for name in unit.parameters}
        fullest = max(held[rank :: p.pp], key=lambda stage: stage.working_bytes)
        is_loss = rank == p.pp - 1 and fullest.unit is stages[-1][-1]
        cached = _weight_gradients_bytes(units, own, policy) if era.cached_weight_gradients else 0.0
        moving = Ledger(
            activations_bytes=num_bytes,
            logits_bytes=fullest.working_bytes if is_loss else 0.0,
            buffers_bytes=cached + (0.0 if is_loss else fullest.working_bytes),
            gathered_bytes=_gathered_bytes(units, own, p, policy),
            moment=fullest.moment,
        )
        wasted = Ledger(
            fragmentation_bytes=era.fragmentation * moving.total_bytes,
            reserved_bytes=device.efficiency.reserved_memory_bytes,
        )
        ledgers.append(held_states(own.values(), p, policy) + moving + wasted)
    return tuple(ledgers)


@dataclass(frozen=True)
class _Held:
    """What a stage keeps of one microbatch, what it holds at most beside that, and which unit then works."""

    saved_bytes: float
    working_bytes: float
    unit: Unit
    moment: str


def _held(units: Sequence[Unit], p: Parallelism) -> _Held:
    seen: dict[str, int] = {}
    before = 0
    fullest = 0
    at = units[0]
    for unit in units:
        saved = unit.saved[p.recompute]
        if before + saved.peak_bytes > fullest:
            fullest, at = before + saved.peak_bytes, unit
        fresh = sum(size for name, size in saved.storages.items() if name not in seen)
        seen.update(saved.storages)
        before += fresh + saved.internal_bytes
    name = next((module for module in at.modules if module), at.first_op)
    return _Held(before, max(0, fullest - before), at, f"{at.saved[p.recompute].phase} of {name}")


def _weight_gradients_bytes(
    units: Sequence[Unit], parameters: Mapping[str, ParameterShard], policy: OptimizerPolicy
) -> float:
    """A gradient for each weight of the largest block, in the format that products read."""
    return policy.gathered_bytes * max(num_weights(unit, parameters) for unit in units)


def num_weights(unit: Unit, parameters: Mapping[str, ParameterShard]) -> float:
    """Elements of a block's parameters, one matrix of every stack; 0 outside of blocks."""
    if not unit.is_block:
        return 0.0
    return sum(parameters[name].num_elements / parameters[name].num_matrices for name in unit.parameters)


def _gathered_bytes(
    units: Sequence[Unit], parameters: Mapping[str, ParameterShard], p: Parallelism, policy: OptimizerPolicy
) -> float:
    """What ZeRO holds unsharded for a moment, as `fully_shard` does.

    From stage 2 on the gradients of one unit: as they are made, and as they are scattered. In stage 3 also
    the parameters of one unit that computes and of one that is being gathered; parameters outside of the
    blocks belong to the root and stay gathered from its forward to the end of its backward.
    """
    if p.zero_stage < 2 or data_groups(p)[0].size == 1:
        return 0.0

    def num_elements(unit: Unit) -> int:
        return sum(parameters[name].num_elements for name in unit.parameters)

    block = max((num_elements(unit) for unit in units if unit.is_block), default=0)
    root = sum(num_elements(unit) for unit in units if not unit.is_block)
    largest = block or root
    gradients = (policy.gathered_bytes + policy.gradient_bytes) * largest
    if p.zero_stage == 2:
        return gradients
    return gradients + policy.gathered_bytes * (2 * largest + (root if block else 0))
