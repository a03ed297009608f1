"""The space: every layout of devices and batch, and every way to run it, that agrees with the user's pins.

A `Layout` is what the local program depends on: the degrees of tensor, context, expert and pipeline
parallelism and the microbatch size. The ways to run it differ in schedule, virtual stages, and in what the
data axes shard. What blocks compute again, and where stages begin, is decided for each way by the stage
layer (`autopar.search.stages`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, get_args

from autopar.plan import Parallelism, ScheduleName, has_program
from autopar.search.pins import Pins
from costmodel import SCHEDULES, CostModelError
from costmodel.orders import check_schedule
from hardware_db import Cluster

ZeroStage = Literal[0, 1, 2, 3]

VIRTUAL_STAGES: Mapping[ScheduleName, tuple[int, ...]] = {
    "1F1B": (1,),
    "Interleaved1F1B": (2, 3, 4, 5, 6, 8),
    "InterleavedZeroBubble": (2, 4),
    "ZBVZeroBubble": (2,),
    "DualPipeV": (2,),
}
"""The schedules that are searched, with the usual numbers of stages of a rank; `virtual_stages` has all.
GPipe is never faster than 1F1B and holds more, LoopedBFS likewise: they are for those who pin them."""

TENSOR_REACH = 2
"""The scale-up domains that a tensor axis may span: beyond one it pays only where links are fast, or where
memory leaves no choice."""

SHORTEST_CONTEXT = 2048
"""The fewest positions that a context axis leaves a rank."""


class Layout(NamedTuple):
    """Degrees and microbatch size; data parallelism takes the devices that are left."""

    microbatch_size: int
    tp: int
    cp: int
    ep: int
    pp: int
    dp: int
    num_microbatches: int

    @property
    def degrees(self) -> dict[str, int]:
        """The settings of a parallelism that a layout decides."""
        names = ("microbatch_size", "num_microbatches", "tp", "cp", "ep", "pp")
        return {name: getattr(self, name) for name in names}


class Scheduled(NamedTuple):
    """A layout with the order of its pipeline; the ways to run it differ in what the data axes shard."""

    layout: Layout
    schedule: ScheduleName
    num_virtual_stages: int

    @property
    def settings(self) -> dict[str, object]:
        """The settings of a parallelism that are decided."""
        virtual = self.num_virtual_stages
        return {**self.layout.degrees, "schedule": self.schedule, "num_virtual_stages": virtual}


class Degrees(NamedTuple):
    """What suits a model: degrees of tensor, context and expert parallelism, most and fewest stages; its
    repeated blocks, which virtual stages share evenly; whether there must be a program that runs the way, and
    whether that adds up gradients in a wider format than products read."""

    tp: tuple[int, ...]
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    num_units: int
    fewest_stages: int = 1
    num_blocks: int = 0
    programs_only: bool = False
    wide_gradients: bool = False


def layouts(cluster: Cluster, global_batch: int, degrees: Degrees, pins: Pins) -> Iterator[Layout]:
    """All layouts, in a fixed order."""
    num_devices = cluster.num_devices
    for tp, cp in product(pins.values("tp", degrees.tp), pins.values("cp", degrees.cp)):
        for pp in pins.values("pp", divisors(num_devices)):
            if num_devices % (tp * cp * pp) or pp > degrees.num_units:
                continue
            dp = num_devices // (tp * cp * pp)
            if global_batch % dp or dp not in pins.values("dp", (dp,)):
                continue
            for ep in pins.values("ep", _expert_degrees(tp, degrees, pins)):
                if dp % ep:
                    continue
                for size in _sizes(global_batch // dp, pins):
                    yield Layout(size, tp, cp, ep, pp, dp, global_batch // dp // size)


def _expert_degrees(tp: int, degrees: Degrees, pins: Pins) -> tuple[int, ...]:
    """Beside a tensor axis, every rank of which sends all rows, experts are dealt out only for those who ask
    for it: the exchange takes as many times longer as the axis has ranks."""
    return degrees.ep if tp == 1 or pins.tp is not None or pins.ep is not None else (1,)


def ways(layout: Layout, cluster: Cluster, degrees: Degrees, pins: Pins) -> Iterator[Parallelism]:
    """Every way to run a layout, in a fixed order; what is computed again is left open."""
    for scheduled in schedules(layout, degrees, pins):
        yield from shardings(scheduled, cluster, degrees, pins)


def schedules(layout: Layout, degrees: Degrees, pins: Pins) -> Iterator[Scheduled]:
    """The orders in which the pipeline of a layout may run."""
    for schedule, virtual in _schedules(layout.pp, layout.num_microbatches, degrees, pins):
        yield Scheduled(layout, schedule, virtual)


def shardings(scheduled: Scheduled, cluster: Cluster, degrees: Degrees, pins: Pins) -> Iterator[Parallelism]:
    """Every way to run a layout in an order; as many for every order."""
    layout = scheduled.layout
    common = parallelism(
        **scheduled.settings, sequence_parallel=pins.sequence_parallel if layout.tp > 1 else None,
        recompute=pins.recompute or "none", offload=pins.offload or "none",
    )  # fmt: skip
    for replicate, shard, zero_stage in _shardings(cluster, layout, pins):
        sharding = {"dp_replicate": replicate, "dp_shard": shard, "zero_stage": zero_stage}
        p = common.model_copy(update=sharding)
        if pins.admits(p) and (not degrees.programs_only or _is_written(p, degrees)):
            yield p


def _is_written(p: Parallelism, degrees: Degrees) -> bool:
    """Whether the rewriter has a form for what the data axes do: experts lie on one of them, and with states
    on the host `fully_shard` adds up gradients in the format of its shards."""
    is_narrow = p.offload == "optimizer" and p.zero_stage > 0
    return p.expert_axis is not None and not (is_narrow and degrees.wide_gradients)


_DEFAULT = Parallelism()


def parallelism(**settings: object) -> Parallelism:
    """A parallelism that is valid by construction: there are thousands of them."""
    return _DEFAULT.model_copy(update=settings)


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, in ascending order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def scale_up_size(cluster: Cluster) -> int:
    """Devices that reach each other without the network: where tensor parallelism pays."""
    return max(cluster.levels[0].num_devices, cluster.devices_per_node)


def longest_tensor_axis(cluster: Cluster) -> int:
    """The largest degree of tensor parallelism that is worth a look."""
    return min(TENSOR_REACH * scale_up_size(cluster), cluster.num_devices)


def _shardings(cluster: Cluster, layout: Layout, pins: Pins) -> Iterator[tuple[int, int, int]]:
    """`(dp_replicate, dp_shard, zero_stage)`: ZeRO shards over all replicas, or over those of a part of the
    cluster: a node, or more of them up to all."""
    dp = layout.dp
    inside = max(1, scale_up_size(cluster) // (layout.tp * layout.cp))
    usual = tuple(
        n for n in divisors(dp) if n == dp or (n > 1 and n % inside == 0 and _is_power(n // inside))
    )
    for zero_stage in pins.values("zero_stage", get_args(ZeroStage)):
        if zero_stage == 0:
            if (pins.dp_shard or 1) == 1:
                yield dp, 1, 0
            continue
        for shard in pins.values("dp_shard", usual):
            if dp % shard == 0 and dp * layout.cp > 1:
                yield dp // shard, shard, zero_stage


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


def _sizes(per_replica: int, pins: Pins) -> tuple[int, ...]:
    """Microbatch sizes: all that divide a replica's part of the batch."""
    sizes = pins.values("microbatch_size", divisors(per_replica))
    return tuple(size for size in sizes if per_replica % size == 0)


def _schedules(
    pp: int, num_microbatches: int, degrees: Degrees, pins: Pins
) -> Iterator[tuple[ScheduleName, int]]:
    """Schedules with their virtual stages."""
    if pp == 1:
        if degrees.fewest_stages == 1 and 1 in pins.values("num_virtual_stages", (1,)):
            yield pins.schedule if pins.schedule == "GPipe" else "1F1B", 1
        return
    for schedule in pins.values("schedule", VIRTUAL_STAGES):
        usual = virtual_stages(schedule, pp, degrees.num_blocks)
        for virtual in pins.values("num_virtual_stages", usual):
            suits = degrees.fewest_stages <= virtual * pp <= degrees.num_units
            suits &= not degrees.programs_only or has_program(schedule, pp, num_microbatches)
            if suits and runs(schedule, pp, num_microbatches, virtual):
                yield schedule, virtual


@cache
def virtual_stages(schedule: ScheduleName, pp: int, num_blocks: int) -> tuple[int, ...]:
    """The stages that each of `pp` ranks may have: for "Interleaved1F1B" the numbers that deal the blocks out
    evenly, by themselves or with what comes before and after counted as a block each; the usual ones where
    none does, and for other schedules."""
    usual = VIRTUAL_STAGES.get(schedule, (1, 2))
    if schedule != "Interleaved1F1B" or not num_blocks:
        return usual
    even = {n for total in (num_blocks, num_blocks + 2) if total % pp == 0 for n in divisors(total // pp)}
    return tuple(sorted(even - {1})) or usual


@cache
def runs(schedule: str, pp: int, num_microbatches: int, num_virtual_stages: int) -> bool:
    """Whether torch's schedule accepts these sizes."""
    assert schedule in SCHEDULES
    try:
        check_schedule(schedule, pp, num_microbatches, num_virtual_stages)
    except CostModelError:
        return False
    return True
