"""Checks of a parallelism that a person gave, with errors that show the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import get_args

from autopar.errors import InvalidParallelismError
from autopar.plan import MESH_AXES, Offload, Parallelism
from autopar.search.experts import num_experts
from autopar.search.space import divisors
from costmodel import SCHEDULES, CostModelError, orders
from graphs.ir import OpGraph
from hardware_db import Cluster

COUNTS = ("dp", "tp", "cp", "ep", "pp", "dp_shard", "microbatch_size", "num_virtual_stages")


def check_parallelism(
    graph: OpGraph, cluster: Cluster, global_batch: int, settings: Mapping[str, object]
) -> Parallelism:
    """The parallelism that the settings describe; None stands for what is usual.

    Raises InvalidParallelismError when it does not fit the devices, the batch or the model.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in COUNTS:
        value = given.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise InvalidParallelismError(f"{name}={value!r} is not a count; give 1 or more")

    def count(name: str) -> int:
        value = given.get(name, 1)
        assert isinstance(value, int)
        return value

    inner = count("tp") * count("cp") * count("pp")
    if "dp" not in given and cluster.num_devices % inner == 0:
        given["dp"] = cluster.num_devices // inner
    product = count("dp") * inner
    if product != cluster.num_devices:
        raise InvalidParallelismError(
            f"dp {count('dp')} x cp {count('cp')} x tp {count('tp')} x pp {count('pp')} = {product} devices, "
            f"but {cluster.name} has {cluster.num_devices}; the product must be equal, "
            "and dp may be left out to be filled in"
        )
    check_dimensions(graph, count("tp"))
    replicate, shard, zero_stage = _data_axes(count("dp"), given)
    size = count("microbatch_size")
    per_step = count("dp") * size
    if global_batch % per_step:
        below = global_batch // per_step * per_step
        nearest = f"{below} or {below + per_step}" if below else f"{per_step}"
        raise InvalidParallelismError(
            f"a global batch of {global_batch} does not divide into dp {count('dp')} x microbatch {size} = "
            f"{per_step} samples; the nearest that does is {nearest}"
        )
    if count("ep") > 1:
        check_experts(graph, count("ep"), count("dp"))
    schedule, num_virtual_stages = _schedule(given)
    parallelism = Parallelism.model_validate(
        {
            "dp_replicate": replicate, "dp_shard": shard, "cp": count("cp"), "tp": count("tp"),
            "ep": count("ep"), "pp": count("pp"), "zero_stage": zero_stage, "microbatch_size": size,
            "num_microbatches": global_batch // per_step,
            "num_virtual_stages": num_virtual_stages, "schedule": schedule,
            "recompute": given.get("recompute", "none"),
            "sequence_parallel": given.get("sequence_parallel"),
            "offload": _offload(given),
        }
    )  # fmt: skip
    check_schedule(parallelism)
    return parallelism.model_copy(update={"axis_order": _axis_order(given, parallelism)})


def _data_axes(dp: int, given: Mapping[str, object]) -> tuple[int, int, int]:
    """Sizes of `dp_replicate` and `dp_shard`, and the ZeRO stage."""
    zero_stage = given.get("zero_stage", 0)
    if not isinstance(zero_stage, int) or zero_stage not in range(4):
        raise InvalidParallelismError(f"zero_stage={zero_stage!r} is unknown; choose 0, 1, 2 or 3")
    shard = given.get("dp_shard", dp if zero_stage else 1)
    assert isinstance(shard, int)
    if shard > 1 and not zero_stage:
        raise InvalidParallelismError(
            f"dp_shard={shard} has nothing to shard at zero_stage=0; choose stage 1, 2 or 3"
        )
    if dp % shard:
        raise InvalidParallelismError(
            f"dp_shard={shard} does not divide dp={dp}; choose one of {', '.join(map(str, divisors(dp)))}"
        )
    return dp // shard, shard, zero_stage


def _offload(given: Mapping[str, object]) -> object:
    offload = given.get("offload", "none")
    if offload not in get_args(Offload):
        raise InvalidParallelismError(
            f"offload={offload!r} is unknown; choose {' or '.join(map(repr, get_args(Offload)))}"
        )
    return offload


def _axis_order(given: Mapping[str, object], p: Parallelism) -> tuple[str, ...]:
    """All axes, outermost first; the order that was given may leave out those of one rank."""
    order = given.get("axis_order", MESH_AXES)
    assert isinstance(order, Sequence)
    named = tuple(order)
    for axis in named:
        if axis not in MESH_AXES:
            nearest = get_close_matches(str(axis), MESH_AXES, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidParallelismError(
                f"axis_order has {axis!r}, but the axes of a mesh are {', '.join(MESH_AXES)}{hint}"
            )
    missing = [axis for axis in p.mesh if axis not in named]
    if missing or len(set(named)) < len(named):
        wrong = f"lacks {', '.join(missing)}" if missing else "has an axis twice"
        raise InvalidParallelismError(
            f"axis_order {', '.join(named)} {wrong}: name each axis of {p} once, outermost first "
            f"(usually {', '.join(p.mesh)})"
        )
    return (*(axis for axis in MESH_AXES if axis not in named), *named)


def check_dimensions(graph: OpGraph, tp: int) -> None:
    """Raises InvalidParallelismError when no dimension of any parameter divides by `tp`."""
    shapes = [graph.tensors[parameter.tensor].shape for parameter in graph.parameters]
    if any(size % tp == 0 for shape in shapes for size in shape):
        return
    sizes = sorted({size for shape in shapes for size in shape}, reverse=True)
    raise InvalidParallelismError(
        f"tp={tp} divides no dimension of any parameter; their sizes are {', '.join(map(str, sizes[:12]))}"
    )


def check_experts(graph: OpGraph, ep: int, dp: int) -> None:
    """Raises InvalidParallelismError for a model without experts, or a degree that they or the ranks do not
    allow."""
    experts = num_experts(graph)
    if experts == 0:
        raise InvalidParallelismError(
            f"ep={ep}, but {graph.name} has no experts (no grouped matrix product); use ep=1"
        )
    if experts % ep or dp % ep:
        raise InvalidParallelismError(
            f"ep={ep} must divide both the {experts} experts of a layer and the {dp} data-parallel ranks "
            "that share them"
        )


def _schedule(given: Mapping[str, object]) -> tuple[object, object]:
    """The schedule and the stages on each of its ranks: two in a V, and more than one mean interleaving."""
    virtual = given.get("num_virtual_stages")
    schedule = given.get("schedule", "1F1B" if virtual in (None, 1) else "Interleaved1F1B")
    if schedule not in SCHEDULES:
        raise InvalidParallelismError(
            f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
        )
    return schedule, virtual or (2 if schedule in orders.V_SCHEDULES else 1)


def check_schedule(p: Parallelism) -> None:
    """Raises InvalidParallelismError for sizes that the schedule does not run."""
    virtual = p.num_virtual_stages
    if virtual > 1 and p.pp == 1:
        instead = "1F1B" if p.schedule in orders.V_SCHEDULES else "num_virtual_stages=1"
        raise InvalidParallelismError(
            f"{p.schedule} with {virtual} virtual stages on a rank needs a pipeline; use pp of 2 or more, "
            f"or {instead}"
        )
    if virtual != 2 and p.schedule in orders.V_SCHEDULES:
        raise InvalidParallelismError(
            f"{p.schedule} has two stages on each rank, the pipeline's way there and back, but "
            f"num_virtual_stages={virtual}; use 2, or leave it out"
        )
    try:
        orders.check_schedule(p.schedule, p.pp, p.num_microbatches, virtual)
    except CostModelError as error:
        raise InvalidParallelismError(str(error)) from None
