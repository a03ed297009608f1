"""What a user calls: `plan` searches the best way to train a model on a cluster, `evaluate` prices a given
one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

import graphs
from autopar.errors import InvalidParallelismError
from autopar.plan import Certificate, Offload, Parallelism, Plan, Recompute, ScheduleName
from autopar.request import Precision, cluster_of, machine_of, policy_of, software_of
from autopar.search import attempts
from autopar.search.alternatives import memory_excess
from autopar.search.branch import Progress
from autopar.search.describe import build_plan
from autopar.search.effort import Effort
from autopar.search.pin_conflicts import check_model, check_pins
from autopar.search.pin_costs import MOST_WORK, PinPricer, with_pin_costs
from autopar.search.pins import Pins
from autopar.search.planner import NUM_RUNNERS_UP, Planner
from autopar.search.pool_plan import plan_pools
from autopar.search.validate import check_parallelism
from autopar.search.wording import duration
from costmodel import OptimizerPolicy, Software
from graphs import Capture
from hardware_db import Cluster, Pools, slice_shapes

Inputs = Mapping[str, Tensor] | Callable[[int], Mapping[str, Tensor]]

Space = Literal["programs", "whole"]
"""What is searched: what programs can be written for, or all that has a price."""

Callback = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


@runtime_checkable
class Buildable(Protocol):
    """A model that can be built and fed, such as `autopar.models.ModelSpec`."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def inputs(self) -> Callable[[int], Mapping[str, Tensor]]:
        """Keyword arguments of forward for a batch size."""
        ...

    def build_without_memory(self) -> nn.Module:
        """The module with its parameters on the meta device."""
        ...


Model = nn.Module | Capture | Buildable


@graphs.uncollected()
def plan(
    model: Model,
    cluster: Cluster | Pools | str | Path,
    *,
    inputs: Inputs | None = None,
    global_batch: int,
    name: str | None = None,
    software: Software | str | None = None,
    progress: Callback | None = None,
    time_limit_s: float | None = None,
    microbatch_size: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    cp: int | None = None,
    ep: int | None = None,
    zero_stage: int | None = None,
    recompute: Recompute | None = None,
    schedule: ScheduleName | None = None,
    num_virtual_stages: int | None = None,
    pins: Pins | Mapping[str, object] | str | Path | None = None,
    space: Space = "programs",
    price_pins: bool = True,
    runners_up: int = NUM_RUNNERS_UP,
    policy: OptimizerPolicy | str | None = None,
    precision: Precision | None = None,
    memory_bytes: float | None = None,
) -> Plan:
    """The fastest way found to train `model` on `cluster`, with a proof of how far from the best it can be.

    Args:
        model: a module (with `inputs`), a capture, or a `ModelSpec`.
        cluster: as `hardware_db.cluster` takes it: `"dgx-h100*8"`, a named cluster, a file, or a `Cluster`;
            or pools of different devices, `"dgx-h100*32 + dgx-a100*32"`, a file of them, or `Pools`.
        inputs: keyword tensors of the module's forward, labels included, or a function from a batch size to
            them.
        global_batch: samples in one optimizer step.
        name: what to call the model.
        software: the era of training software to predict for, or one of `costmodel.software_eras()`; by
            default torch's own kernels, which is what the emitted programs run on.
        progress: told `(what, done, total)` as the search goes on.
        time_limit_s: stop searching after so long, with the best plan so far and its gap.
        microbatch_size, tp, pp, dp, cp, ep, zero_stage, recompute, schedule, num_virtual_stages: settings to
            keep fixed.
        pins: more of what is fixed or forbidden (`autopar.search.pins.Pins`), a mapping, or a file.
        space: "programs" is what `compile` can write; "whole" adds what torch does not run (1F1B with fewer
            microbatches than stages) and experts dealt out over both data axes, to be priced and explained.
        runners_up: how many of the best plans with other meshes to keep (`Plan.alternatives`), beside plain
            DDP and FSDP.
        price_pins: find out what each pin costs (`Plan.pin_costs`), by searching again without it.
        policy: what the optimizer keeps for a parameter, or one of `costmodel.optimizer_policies()`; by
            default AdamW in the precision of the model.
        precision: what products with the parameters of repeated blocks run in, if not in the model's own.
        memory_bytes: what may be used of each device's memory; by default all of it.

    Of a machine whose links can be switched, every shape of so many chips is tried. Where nothing fits, the
    optimizer's states are offloaded to the hosts, and the plan's warnings say so. Pools get a pipeline
    through them, or the best plan for one of them where that is faster.

    Raises InfeasibleError when nothing fits, PinConflictError when the pins leave nothing to choose, or ask
    for what the space has not, SearchTimeoutError when the limit passes first, CostModelError for an unknown
    era, and the errors of capture and of the hardware database.
    """
    started = time.monotonic()
    settings = Pins.merged(
        pins, microbatch_size=microbatch_size, tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, zero_stage=zero_stage,
        recompute=recompute, schedule=schedule, num_virtual_stages=num_virtual_stages,
    )  # fmt: skip
    _check_batch(global_batch)
    machine, era = machine_of(cluster, memory_bytes), software_of(software)
    tell = progress or (lambda what, done, total: None)
    tell("capture", 0, 1)
    capture = captured(model, inputs, name)
    tell("capture", 1, 1)
    policy, effort = policy_of(policy, capture.graph), Effort()

    def planner_of(shape: Cluster, shorten: bool) -> Planner:
        return Planner(
            capture, shape, policy, era, global_batch=global_batch, pins=settings, time_limit_s=time_limit_s,
            report=_reporter(tell), shorten=shorten, whole_space=space == "whole", low_precision=precision,
            num_runners_up=runners_up, effort=effort,
        )  # fmt: skip

    if isinstance(machine, Pools):
        check_model(settings, capture.graph)
        return plan_pools(planner_of, machine, time_limit_s, tell, price_pins=price_pins)
    check_pins(settings, capture.graph, machine.num_devices, global_batch)
    found = attempts.settled(planner_of, slice_shapes(machine))
    plan = found.plan(solve_s=time.monotonic() - started)
    if not (settings and price_pins):
        return plan
    work = 0 if found.result.stopped else MOST_WORK
    return with_pin_costs(plan, PinPricer(found.planner, settings, found.best, work).costs())


def evaluate(
    model: Model,
    cluster: Cluster | str | Path,
    *,
    inputs: Inputs | None = None,
    global_batch: int | None = None,
    name: str | None = None,
    software: Software | str | None = None,
    parallelism: Parallelism | None = None,
    dp: int | None = None,
    tp: int | None = None,
    cp: int | None = None,
    ep: int | None = None,
    pp: int | None = None,
    zero_stage: int | None = None,
    dp_shard: int | None = None,
    microbatch_size: int | None = None,
    recompute: Recompute | None = None,
    schedule: ScheduleName | None = None,
    num_virtual_stages: int | None = None,
    sequence_parallel: bool | None = None,
    offload: Offload | None = None,
    axis_order: Sequence[str] | None = None,
    policy: OptimizerPolicy | str | None = None,
    precision: Precision | None = None,
    memory_bytes: float | None = None,
) -> Plan:
    """The cost of training `model` with the parallelism given: a plan whose certificate says "evaluated".

    Nothing is searched: the strategies on the tensor axis are Megatron's columns and rows, and blocks are
    dealt out evenly over the pipeline stages, as a trainer does with just these settings.

    Args:
        model, cluster, inputs, name, software, policy, precision, memory_bytes: as for `plan`.
        global_batch: samples in one optimizer step; by default that of `parallelism`.
        parallelism: all settings at once, instead of those that follow.
        dp, tp, cp, ep, pp: degrees; 1 by default, `dp` the devices that are left.
        zero_stage, dp_shard: what ZeRO shards (0, nothing), and among how many replicas (all of them).
        microbatch_size, recompute, schedule, num_virtual_stages: 1, "none", "1F1B" or, with several stages on
            a rank, "Interleaved1F1B".
        sequence_parallel: whether a tensor axis also splits what lies between its products, by the sequence
            (on).
        offload: "optimizer" keeps the optimizer's states in the memory of the hosts ("none").
        axis_order: the axes of the mesh, outermost first; those of one rank may be left out. By default
            `autopar.plan.MESH_AXES`.

    A plan that does not fit is no error: it has a warning, and `prediction.peak_memory_bytes` above
    `cluster.memory_bytes`.

    Raises InvalidParallelismError when the settings do not fit the devices, the batch or the model, and
    CostModelError for an unknown era of software, and for offloading to hosts of which nothing is known.
    """
    settings: dict[str, object] = {
        "dp": dp, "tp": tp, "cp": cp, "ep": ep, "pp": pp, "zero_stage": zero_stage, "dp_shard": dp_shard,
        "microbatch_size": microbatch_size, "recompute": recompute, "schedule": schedule,
        "num_virtual_stages": num_virtual_stages, "sequence_parallel": sequence_parallel, "offload": offload,
        "axis_order": axis_order,
    }  # fmt: skip
    if parallelism is not None:
        _check_alone(parallelism, settings, global_batch)
        settings = {name: getattr(parallelism, name) for name in settings}
        global_batch = parallelism.global_batch
    if global_batch is None:
        raise InvalidParallelismError("how many samples has a step? Pass global_batch=, or a parallelism=")
    _check_batch(global_batch)
    machine = cluster_of(cluster, memory_bytes)
    capture = captured(model, inputs, name)
    checked = check_parallelism(capture.graph, machine, global_batch, settings)
    planner = Planner(
        capture, machine, policy_of(policy, capture.graph), software_of(software), global_batch=global_batch,
        low_precision=precision,
    )  # fmt: skip
    solved = planner.as_given(checked)
    step_s = solved.evaluated.step_s
    priced = Certificate(
        status="evaluated", objective_s=step_s, bound_s=step_s, num_candidates=1, num_solved=1, pruned={}
    )
    warnings = [] if solved.evaluated.fits else [memory_excess(solved.evaluated)]
    return build_plan(planner, solved, priced, warnings=warnings)


def _reporter(tell: Callback) -> Callable[[Progress], None]:
    """Tells in words how far a search is."""

    def report(step: Progress) -> None:
        best = "no plan yet"
        if step.best is not None:
            best = f"{duration(step.best.evaluated.step_s)} with {step.best.parallelism}, gap {step.gap:.1%}"
        tell(f"search: {best}", step.num_decided, step.num_candidates)

    return report


def _check_batch(global_batch: int) -> None:
    if global_batch < 1:
        raise InvalidParallelismError(f"a global batch of {global_batch} has no sample; give 1 or more")


def _check_alone(parallelism: Parallelism, others: Mapping[str, object], global_batch: int | None) -> None:
    also = [name for name, value in others.items() if value is not None]
    if global_batch not in (None, parallelism.global_batch):
        also.append(f"a global batch of {global_batch} instead of its {parallelism.global_batch}")
    if also:
        raise InvalidParallelismError(
            f"parallelism={parallelism} says everything, but {', '.join(also)} was given as well; drop either"
        )


def captured(model: Model, inputs: Inputs | None, name: str | None) -> Capture:
    """The capture of a model in any of the forms that `plan` takes."""
    if isinstance(model, Capture):
        return model
    if isinstance(model, nn.Module):
        if inputs is None:
            raise InvalidParallelismError(
                f"{type(model).__name__} needs example inputs: pass inputs={{'x': ..., 'labels': ...}}, "
                "or a function from a batch size to such a mapping"
            )
        return graphs.capture(model, inputs, name=name)
    return graphs.capture(model.build_without_memory(), inputs or model.inputs, name=name or model.name)
