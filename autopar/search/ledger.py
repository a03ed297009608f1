"""What every pipeline rank holds at its fullest: the ledgers of a chain under a parallelism and given cuts.

A stage is fullest when its schedule has most microbatches in flight and one of its units works: then it holds
what the microbatches in flight keep and, of the last of them, what the units before the working one keep and
whatever that one holds (`autopar.search.saved`). With u the units of a stage, S what a unit keeps, W the most
that it holds and k microbatches in flight, its activations take

    (k - 1) Σ S_u + max over u of (Σ_{v < u} S_v + W_u).
"""

from __future__ import annotations

from dataclasses import replace

from autopar.plan import Parallelism
from autopar.search.data_axes import held_states, sharding_degree
from autopar.search.pieces import Choices, Held, Pieces, RankParameters
from costmodel import Ledger, OptimizerPolicy, Software, peak_activation_bytes
from costmodel.orders import rank_stages
from hardware_db import Accelerator


def rank_ledgers(
    pieces: Pieces,
    cuts: tuple[int, ...],
    p: Parallelism,
    policy: OptimizerPolicy,
    device: Accelerator,
    choices: Choices | None = None,
) -> tuple[Ledger, ...]:
    """The ledger of each pipeline rank.

    `cuts` are the numbers of the units that begin the (virtual) stages, 0 first; `choices` say what units
    keep, or else the mode of the parallelism does.
    """
    era, reserved_bytes = pieces.chain.era, device.efficiency.reserved_memory_bytes
    chosen = pieces.choices(cuts, choices or p.recompute)
    held = [piece.held(names) for piece, names in zip(pieces.cut(cuts), chosen, strict=True)]
    activations = peak_activation_bytes(
        p.schedule, p.pp, p.num_microbatches, [stage.saved_bytes for stage in held], p.num_virtual_stages
    )
    known: dict[tuple[int, ...], Ledger] = {}
    ledgers = []
    for rank, num_bytes in enumerate(activations):
        # Ranks with alike stages differ in nothing but what is in flight.
        mine = rank_stages(p.schedule, rank, p.pp, p.num_virtual_stages)
        key = tuple(id(held[stage]) for stage in mine)
        if key not in known:
            fullest = max((held[stage] for stage in mine), key=lambda stage: stage.working_bytes)
            is_loss = fullest.unit is pieces.chain.units[-1]
            known[key] = _without_activations(
                fullest, pieces.parameters(cuts, mine), p, policy, era, is_loss=is_loss
            )
        ledgers.append(_with_activations(known[key], num_bytes, era.fragmentation, reserved_bytes))
    return tuple(ledgers)


def _with_activations(rest: Ledger, num_bytes: float, fragmentation: float, reserved_bytes: float) -> Ledger:
    return Ledger(
        rest.parameters_bytes,
        rest.gradients_bytes,
        rest.optimizer_bytes,
        num_bytes,
        rest.logits_bytes,
        rest.buffers_bytes,
        rest.gathered_bytes,
        rest.fragmentation_bytes + fragmentation * num_bytes,
        reserved_bytes,
        rest.moment,
    )


def _without_activations(
    fullest: Held,
    parameters: RankParameters,
    p: Parallelism,
    policy: OptimizerPolicy,
    era: Software,
    *,
    is_loss: bool,
) -> Ledger:
    """What a rank holds when its `fullest` stage works, beside what is kept for the backward."""
    # A gradient for each weight of the largest block, in the format that products read.
    cached_bytes = policy.gathered_bytes * parameters.weight_elements if era.cached_weight_gradients else 0.0
    states = held_states(parameters.elements, p, policy)
    logits_bytes = fullest.working_bytes if is_loss else 0.0
    buffers_bytes = cached_bytes + (0.0 if is_loss else fullest.working_bytes)
    gathered_bytes = _gathered_bytes(parameters, p, policy)
    return replace(
        states,
        logits_bytes=logits_bytes,
        buffers_bytes=buffers_bytes,
        gathered_bytes=gathered_bytes,
        fragmentation_bytes=era.fragmentation * (logits_bytes + buffers_bytes + gathered_bytes),
        moment=fullest.moment,
    )


def _gathered_bytes(parameters: RankParameters, p: Parallelism, policy: OptimizerPolicy) -> float:
    """What ZeRO holds unsharded for a moment, as `fully_shard` does.

    From stage 2 on the gradients of one unit: as they are made, and as they are scattered. In stage 3 also
    the parameters of one unit that computes and of one that is being gathered; parameters outside of the
    blocks belong to the root and stay gathered from its forward to the end of its backward.
    """
    if p.zero_stage < 2 or sharding_degree(p) == 1:
        return 0.0
    block, root = parameters.block_elements, parameters.root_elements
    largest = block or root
    gradients = (policy.gathered_bytes + policy.gradient_bytes) * largest
    if p.zero_stage == 2:
        return gradients
    return gradients + policy.gathered_bytes * (2 * largest + (root if block else 0))
