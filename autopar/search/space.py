"""The candidates: every parallelism that fits the devices and the batch, and agrees with what the user
pinned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import Literal, get_args

from autopar.errors import PinConflictError
from autopar.plan import PLANNED_SCHEDULES, Parallelism, Recompute, ScheduleName
from autopar.search.units import RECOMPUTE_MODES
from costmodel import SCHEDULES, CostModelError
from costmodel.orders import check_schedule
from hardware_db import Cluster

ZeroStage = Literal[0, 1, 2, 3]
VIRTUAL_STAGES = (2, 4)


@dataclass(frozen=True)
class Pins:
    """Settings that the user has decided; None leaves them to the search."""

    microbatch_size: int | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    zero_stage: int | None = None
    recompute: Recompute | None = None
    schedule: ScheduleName | None = None
    num_virtual_stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("microbatch_size", "tp", "pp", "dp", "num_virtual_stages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PinConflictError(
                    f"{name}={value} is not a count; give 1 or more, or leave it to the search"
                )
        _check_choice("zero_stage", self.zero_stage, get_args(ZeroStage))
        _check_choice("recompute", self.recompute, RECOMPUTE_MODES)
        _check_choice("schedule", self.schedule, SCHEDULES)
        if self.schedule not in (None, *PLANNED_SCHEDULES):
            raise PinConflictError(
                f"schedule={self.schedule!r} can be evaluated but not planned yet; "
                f"choose one of {', '.join(PLANNED_SCHEDULES)}, or leave it to the search"
            )

    def __str__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name}={value}" for name, value in given if value is not None) or "nothing pinned"


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value is not None and value not in known:
        raise PinConflictError(f"{name}={value!r} is unknown; choose one of {', '.join(map(str, known))}")


def candidates(
    cluster: Cluster, global_batch: int, tensor_degrees: tuple[int, ...], num_units: int, pins: Pins
) -> Iterator[Parallelism]:
    """All candidates, in a fixed order. `tensor_degrees` are the degrees by which the model can be split,
    `num_units` the most stages that it can be cut into."""
    num_devices = cluster.num_devices
    for tp in (pins.tp,) if pins.tp else tensor_degrees:
        for pp in (pins.pp,) if pins.pp else divisors(num_devices):
            if num_devices % (tp * pp) or pp > num_units:
                continue
            dp = num_devices // (tp * pp)
            if global_batch % dp or (pins.dp or dp) != dp:
                continue
            for shards, size in product(_shardings(cluster, dp, tp, pins), _sizes(global_batch // dp, pins)):
                for schedule, virtual in _schedules(pp, global_batch // dp // size, num_units, pins):
                    for recompute in (pins.recompute,) if pins.recompute else RECOMPUTE_MODES:
                        yield _parallelism(
                            tp=tp, pp=pp, microbatch_size=size, num_microbatches=global_batch // dp // size,
                            schedule=schedule, num_virtual_stages=virtual, recompute=recompute, **shards,
                        )  # fmt: skip


def _parallelism(**settings: object) -> Parallelism:
    # The settings are valid by construction, and there are thousands of them.
    defaults = {name: field.default for name, field in Parallelism.model_fields.items()}
    return Parallelism.model_construct(**{**defaults, **settings})


def divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def scale_up_size(cluster: Cluster) -> int:
    """Devices that reach each other without the network: where tensor parallelism pays."""
    return max(cluster.levels[0].num_devices, cluster.devices_per_node)


def _shardings(cluster: Cluster, dp: int, tp: int, pins: Pins) -> Iterator[dict[str, int]]:
    """ZeRO stages with the data axes they shard over: all replicas, or those of one node."""
    if dp == 1:
        if not pins.zero_stage:
            yield {"dp_replicate": 1, "dp_shard": 1, "zero_stage": 0}
        return
    stages = (pins.zero_stage,) if pins.zero_stage is not None else get_args(ZeroStage)
    inside = scale_up_size(cluster) // tp
    for zero_stage in stages:
        if zero_stage == 0:
            yield {"dp_replicate": dp, "dp_shard": 1, "zero_stage": 0}
            continue
        yield {"dp_replicate": 1, "dp_shard": dp, "zero_stage": zero_stage}
        if 1 < inside < dp and dp % inside == 0:
            yield {"dp_replicate": dp // inside, "dp_shard": inside, "zero_stage": zero_stage}


def _sizes(per_replica: int, pins: Pins) -> Iterator[int]:
    """Microbatch sizes: powers of two that divide a replica's part of the batch."""
    if pins.microbatch_size is not None:
        if per_replica % pins.microbatch_size == 0:
            yield pins.microbatch_size
        return
    size = 1
    while per_replica % size == 0:
        yield size
        size *= 2


def _schedules(
    pp: int, num_microbatches: int, num_units: int, pins: Pins
) -> Iterator[tuple[ScheduleName, int]]:
    """Schedules with their virtual stages. GPipe is never faster than 1F1B and holds more: only if it is
    asked for."""
    if pp == 1:
        if (pins.num_virtual_stages or 1) == 1:
            yield pins.schedule if pins.schedule == "GPipe" else "1F1B", 1
        return
    if pins.schedule in (None, "1F1B", "GPipe") and (pins.num_virtual_stages or 1) == 1:
        yield pins.schedule or "1F1B", 1
    if pins.schedule in (None, "Interleaved1F1B"):
        for virtual in (pins.num_virtual_stages,) if pins.num_virtual_stages else VIRTUAL_STAGES:
            if virtual * pp <= num_units and runs("Interleaved1F1B", pp, num_microbatches, virtual):
                yield "Interleaved1F1B", virtual


def runs(schedule: str, pp: int, num_microbatches: int, num_virtual_stages: int) -> bool:
    """Whether torch's schedule accepts these sizes."""
    try:
        check_schedule(schedule, pp, num_microbatches, num_virtual_stages)
    except CostModelError:
        return False
    return True
