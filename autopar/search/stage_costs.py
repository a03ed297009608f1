"""What a parallelism makes of runs of units (`autopar.search.stage_table`): what they move, hold and take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.data_axes import (
    DataTraffic,
    data_traffic,
    device_policy,
    least_accumulation_s,
    least_update_s,
    sharding_degree,
    updated_elements,
)
from autopar.search.pieces import Bucket
from autopar.search.run_sums import RunSums
from autopar.search.runs import Array
from autopar.search.stage_table import StageTable
from autopar.search.stage_times import StageTimes, stage_times
from costmodel import OptimizerPolicy, Overlap, model_state_ledger


class Machine(NamedTuple):
    """What stages run on: prices, the optimizer's policy, what overlaps, and the memory that there is for
    them; and whether anything `moves` on the data axes, or is gathered for that."""

    pricer: Pricer
    policy: OptimizerPolicy
    overlap: Overlap
    memory_bytes: float
    moves: bool = True


class Once(NamedTuple):
    """What data axes and optimizer add to each unit: seconds with every forward and every backward, and of
    synchronisation and of the optimizer once a step."""

    forward_gather_s: Array
    backward_gather_s: Array
    sync_s: Array
    optimizer_s: Array


def accumulating(sums: RunSums, p: Parallelism, machine: Machine) -> RunSums:
    """The sums of runs that add up the gradients of their parameters."""
    return sums.accumulating(least_accumulation_s(p, machine.policy, machine.pricer))


def moved_once(table: StageTable, p: Parallelism, machine: Machine) -> Once:
    """What moves for each unit; parameters that units share count for the first."""
    update_s = least_update_s(p, machine.policy, machine.pricer)
    kinds, places = table.parameter_kinds
    each = np.array([_unit_once(kind, p, machine, update_s) for kind in kinds])
    return Once(*each[places].T)


def held_bytes(table: StageTable, sums: RunSums, p: Parallelism, machine: Machine) -> Array:
    """R: model states, what the last unit works on, and what ZeRO gathers for a moment, as
    `autopar.search.ledger` counts it."""
    policy, held = machine.policy, np.zeros_like(sums.forward_s)
    for is_expert, elements in zip((False, True), sums.elements, strict=True):
        degree = sharding_degree(p, experts=is_expert)
        held += state_bytes(p, policy, degree) * elements
    moving = sums.working_bytes + cached_bytes(table, sums, machine)
    if machine.moves and p.zero_stage >= 2 and sharding_degree(p) > 1:
        is_block = sums.block_elements > 0
        largest = np.where(is_block, sums.block_elements, sums.root_elements)
        moving = moving + (policy.gathered_bytes + policy.gradient_bytes) * largest
        if p.zero_stage == 3:
            moving = moving + policy.gathered_bytes * (2 * largest + is_block * sums.root_elements)
    total: Array = held + table.held_per_byte * moving
    return total


def cached_bytes(table: StageTable, sums: RunSums, machine: Machine) -> Array:
    """A gradient for each weight of the largest block, in the format that products read."""
    if not table.chain.era.cached_weight_gradients:
        return np.zeros_like(sums.largest_weights)
    found: Array = machine.policy.gathered_bytes * sums.largest_weights
    return found


def room_bytes(table: StageTable, sums: RunSums, p: Parallelism, machine: Machine) -> Array:
    """What is left of the memory for what all microbatches in flight keep."""
    room: Array = (machine.memory_bytes - held_bytes(table, sums, p, machine)) / table.held_per_byte
    return room


def fitted_times(sums: RunSums, once: Once, overlap: Overlap, each_bytes: Array) -> StageTimes:
    """What runs take where each microbatch may keep so much; infinite where that is too little."""
    return run_times(sums, once, overlap, sums.relief_s(sums.saved_bytes - each_bytes))


def run_times(sums: RunSums, once: Once, overlap: Overlap, again_s: Array) -> StageTimes:
    """What runs take that compute `again_s` seconds again, which is infinite where memory is short."""
    moved_s = tuple(map(sums.runs.sums, once))
    return stage_times(sums.forward_s, sums.backward_s + again_s, moved_s, sums.num_sharding_units, overlap)


def state_bytes(p: Parallelism, policy: OptimizerPolicy, degree: int) -> float:
    """Bytes of a parameter's model states on a rank, sharded over `degree` of them."""
    return model_state_ledger(1.0, device_policy(p, policy), p.zero_stage, degree).total_bytes


def _unit_once(
    buckets: tuple[Bucket, ...], p: Parallelism, machine: Machine, update_s: float
) -> tuple[float, ...]:
    """What moves for one unit; updating a parameter takes `update_s`."""
    traffic = DataTraffic()
    if machine.moves:
        traffic = data_traffic(dict.fromkeys(buckets, 1), p, machine.pricer, machine.policy)
    updated = updated_elements({bucket.is_expert: bucket.num_elements for bucket in buckets}, p)
    return traffic.forward_s, traffic.backward_s, traffic.step_s, update_s * updated
