"""From what the search found to a `Plan`: names, predictions, and why the others lost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

import torch

from autopar.module_paths import module_ranges
from autopar.op_kinds import dtype_name, kind_of
from autopar.placements import RR
from autopar.plan import (
    Alternative,
    Certificate,
    ClusterSummary,
    ModelSummary,
    Parallelism,
    Plan,
    Prediction,
    Recomputation,
    StagePlan,
)
from autopar.search.effort import Effort
from autopar.search.evaluate import Evaluated
from autopar.search.outcome import Solved
from autopar.search.placement import rank_groups
from autopar.search.planner import Planner
from autopar.search.saved import MODES
from costmodel import OptimizerPolicy, check_host, model_flops_utilization, optimizer_policy
from costmodel.orders import stage_ranks
from graphs import Capture, CaptureError, rules
from graphs.ir import OpGraph
from hardware_db import Cluster

TERM_NAMES: Mapping[str, str] = {
    "compute": "compute",
    "recompute": "recomputation",
    "tensor_parallel": "tensor-parallel communication",
    "parameter_gather": "parameter gathering",
    "send_recv": "pipeline messages",
    "pipeline_bubble": "pipeline bubble",
    "gradient_sync": "gradient synchronisation",
    "optimizer": "optimizer",
    "overhead": "overhead",
}

GB, MB = 1e9, 1e6


class Searched(Protocol):
    """What a search says of itself."""

    @property
    def bound_s(self) -> float: ...
    @property
    def num_candidates(self) -> int: ...
    @property
    def num_solved(self) -> int: ...
    @property
    def pruned(self) -> dict[str, int]: ...


def certificate(result: Searched, step_s: float, effort: Effort, solve_s: float) -> Certificate:
    """What a search has proven of its best plan, which takes `step_s`."""
    bound_s = min(step_s, result.bound_s)
    return Certificate(
        status="optimal" if bound_s >= step_s * (1 - 1e-6) else "feasible",
        objective_s=step_s,
        bound_s=bound_s,
        num_candidates=result.num_candidates,
        num_solved=result.num_solved,
        pruned=result.pruned,
        layers=effort.layers(),
        solve_s=solve_s,
    )


def build_plan(
    planner: Planner,
    solved: Solved,
    certificate: Certificate,
    alternatives: Sequence[Alternative] = (),
    warnings: Sequence[str] = (),
) -> Plan:
    """The plan for a candidate at full depth."""
    evaluated = solved.evaluated
    return Plan(
        model=model_summary(planner.capture),
        cluster=cluster_summary(planner.cluster, planner.capture),
        parallelism=Parallelism.model_validate(evaluated.parallelism.model_dump()),
        rank_groups=rank_groups(evaluated.parallelism, planner.cluster),
        strategies=solved.program.strategies,
        placements=parameter_placements(planner.capture.graph, solved),
        stages=tuple(_stage_plan(evaluated, index) for index in range(len(evaluated.stages))),
        recomputation=recomputation(planner.capture.graph, evaluated),
        prediction=_prediction(planner, evaluated),
        certificate=certificate,
        alternatives=tuple(alternatives),
        warnings=(
            *warnings,
            *rule_warnings(planner.capture.graph),
            *_precision_warnings(planner),
            *_gather_warnings(planner, evaluated.parallelism),
        ),
    )


def parameter_placements(graph: OpGraph, solved: Solved) -> dict[str, str]:
    """How parameters lie on the tensor axis, by name, `*` for numbers where all of that pattern agree."""
    solution = solved.program.solution
    sources = solution.assignment.sources if solution is not None else {}
    texts = {each.name: f"tp {sources.get(each.tensor, RR)}" for each in graph.parameters} if sources else {}
    by_pattern: dict[str, set[str]] = {}
    for name, text in texts.items():
        by_pattern.setdefault(re.sub(r"\.\d+\.", ".*.", name), set()).add(text)
    found = {}
    for name, text in texts.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        found[pattern if len(by_pattern[pattern]) == 1 else name] = text
    return found


def training_policy(graph: OpGraph) -> OptimizerPolicy:
    """AdamW in the precision of the model: with fp32 master weights where it is narrower than fp32."""
    dtype = main_dtype(graph)
    if dtype.itemsize == 8:
        return OptimizerPolicy("adamw-fp64", 8, 8, (("exp_avg", 8), ("exp_avg_sq", 8)), 8)
    return optimizer_policy("adamw-mixed" if dtype.itemsize <= 2 else "adamw-fp32")


def main_dtype(graph: OpGraph) -> torch.dtype:
    """The dtype of most parameters."""
    counts: dict[torch.dtype, int] = {}
    for parameter in graph.parameters:
        tensor = graph.tensors[parameter.tensor]
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_elements
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def fingerprint(graph: OpGraph) -> str:
    """SHA-256 of the graph's text: equal for equal models, whatever their weights."""
    digest = hashlib.sha256()
    for tensor in graph.tensors.values():
        digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype} {tensor.requires_grad}\n".encode())
    for op in graph.ops:
        digest.update(f"{op.name} {op.target} {op.args} {sorted(op.kwargs.items())} {op.outputs}\n".encode())
    for parameter in graph.parameters:
        digest.update(f"{parameter.name} {parameter.tensor} {parameter.aliases}\n".encode())
    return digest.hexdigest()


def model_summary(capture: Capture) -> ModelSummary:
    graph = capture.graph
    shapes = _sample_shapes(capture)
    return ModelSummary(
        name=graph.name,
        fingerprint=fingerprint(graph),
        num_parameters=graph.num_parameters,
        dtype=dtype_name(main_dtype(graph)),
        input_shapes=shapes,
        tokens_per_sample=tokens_per_sample(capture),
        num_ops=len(graph.ops),
        flops_per_sample=graph.flops / 2,
    )


def _sample_shapes(capture: Capture) -> dict[str, tuple[int, ...]]:
    try:
        graph = capture.at(1)
    except CaptureError:
        graph = capture.graph
    return {name: graph.tensors[name].shape for name in graph.inputs}


def tokens_per_sample(capture: Capture) -> int:
    """Positions of the first integer input of a sample, which are its tokens; 1 for models that read none."""
    graph = capture.graph
    for name in graph.inputs:
        tensor = graph.tensors[name]
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool and len(tensor.shape) > 1:
            return prod(tensor.shape[1:])
    return 1


def cluster_summary(cluster: Cluster, capture: Capture) -> ClusterSummary:
    device = cluster.device
    return ClusterSummary(
        id=cluster.id,
        name=cluster.name,
        device=device.id,
        num_devices=cluster.num_devices,
        devices_per_node=cluster.devices_per_node,
        memory_bytes=device.memory_bytes,
        host_memory_bytes=cluster.host_memory_bytes_per_device,
        peak_flops_per_s=device.peak_flops_per_s(dtype_name(main_dtype(capture.graph))),
        price_usd_per_device_hour=cluster.price_usd_per_device_hour,
    )


def _stage_plan(evaluated: Evaluated, index: int) -> StagePlan:
    work, units = evaluated.stages[index], evaluated.units(index)
    p = evaluated.parallelism
    rank = stage_ranks(p.schedule, p.pp, p.num_virtual_stages)[index]
    return StagePlan(
        index=index,
        first_op=units[0].first_op,
        modules=module_ranges(module for unit in units for module in unit.modules),
        forward_s=work.forward_s + work.forward_communication_s,
        backward_s=work.recompute_s + work.backward_s + work.backward_communication_s,
        memory_bytes=dict(evaluated.ledgers[rank].entries),
    )


def recomputation(graph: OpGraph, evaluated: Evaluated) -> tuple[Recomputation, ...]:
    """What blocks compute again, those together that do the same; `graph` is the captured one."""
    classes = {block.path: block.block_class for block in graph.blocks}
    groups: dict[tuple[object, ...], tuple[list[str], tuple[str, ...]]] = {}
    for unit, choice in zip(evaluated.chain.units, evaluated.choices, strict=True):
        if not unit.is_block or choice == "none":
            continue
        (path,) = unit.modules
        if choice in MODES:
            groups.setdefault((choice,), ([], ()))[0].append(path)
            continue
        kept = unit.kept[choice]
        places = tuple(place for place, result in enumerate(unit.results) if result.name in kept)
        key = ("kept", classes[path], len(unit.results), places)
        groups.setdefault(key, ([], kept))[0].append(path)
    return tuple(
        Recomputation.model_validate(
            {
                "blocks": paths,
                "mode": mode,
                "kept": kept,
                "labels": [_result_label(graph, name, paths[0]) for name in kept],
            }
        )
        for (mode, *_), (paths, kept) in groups.items()
    )


def _result_label(graph: OpGraph, name: str, block: str) -> str:
    """What a result of a block is called in a report; what was inserted to move it counts as received."""
    made, _, inserted = name.partition("__")
    if made not in graph.producer:
        return name
    op = graph.ops[graph.producer[made]]
    label = "attention" if kind_of(op, graph.tensors) == "attention" else op.module.removeprefix(f"{block}.")
    return f"{label}, received" if inserted else label


def _prediction(planner: Planner, evaluated: Evaluated) -> Prediction:
    p = evaluated.parallelism
    graph = planner.capture.graph
    step_s = evaluated.step_s
    flops = 3 * graph.flops / 2 * p.global_batch  # a backward is two forwards
    peak = planner.cluster.device.peak_flops_per_s(dtype_name(main_dtype(graph)))
    return Prediction(
        software=planner.evaluator.era.name,
        step_s=step_s,
        terms_s=dict(evaluated.step.terms),
        tokens_per_s=tokens_per_sample(planner.capture) * p.global_batch / step_s,
        model_flops_per_s_per_device=flops / step_s / p.world_size,
        mfu=model_flops_utilization(flops, step_s, p.world_size, peak),
        peak_memory_bytes=evaluated.peak_memory_bytes,
        host_memory_bytes=host_memory_bytes(evaluated, planner.cluster),
        single_device_step_s=_single_device_step_s(planner, p),
    )


def host_memory_bytes(evaluated: Evaluated, cluster: Cluster) -> float:
    """What offloaded states of the fullest device take of its host's memory."""
    if evaluated.parallelism.offload == "none":
        return 0.0
    return evaluated.host_excess_bytes + check_host(cluster).memory_bytes


def _single_device_step_s(planner: Planner, p: Parallelism) -> float:
    """The same batch on one device that has memory enough, in microbatches of the same size."""
    alone = Parallelism(
        microbatch_size=p.microbatch_size, num_microbatches=p.global_batch // p.microbatch_size
    )
    return planner.evaluator.evaluate(planner.programs.program(alone).chain, alone, (0,)).step_s


def alternative(label: str, solved: Solved, best: Evaluated) -> Alternative:
    """A runner-up and why it lost."""
    evaluated = solved.evaluated
    return Alternative(
        label=label,
        parallelism=Parallelism.model_validate(evaluated.parallelism.model_dump()),
        step_s=evaluated.step_s,
        peak_memory_bytes=evaluated.peak_memory_bytes,
        reason=_why_worse(evaluated, best),
    )


def impossible_baseline(label: str, global_batch: int, num_devices: int) -> Alternative:
    """Plain data parallelism over all devices, where the batch does not divide over them."""
    sharded = label == "FSDP"
    return Alternative(
        label=label,
        parallelism=Parallelism(
            dp_shard=num_devices if sharded else 1,
            dp_replicate=1 if sharded else num_devices,
            zero_stage=3 if sharded else 0,
        ),
        step_s=None,
        peak_memory_bytes=None,
        reason=f"a global batch of {global_batch} does not divide over {num_devices} replicas",
    )


def _why_worse(evaluated: Evaluated, best: Evaluated) -> str:
    if not evaluated.fits:
        return memory_excess(evaluated)
    if evaluated.parallelism == best.parallelism:
        return "this is the plan"
    extra = {name: seconds - best.step.terms[name] for name, seconds in evaluated.step.terms.items()}
    worst = max(extra, key=lambda name: extra[name])
    ratio = evaluated.step_s / best.step_s
    factor = f"{ratio:.2f}x slower" if ratio >= 1.005 else f"{100 * (ratio - 1):.1g} % slower"
    return f"{factor}: {TERM_NAMES[worst]} +{duration(extra[worst])}"


def memory_excess(evaluated: Evaluated) -> str:
    """By how much a candidate exceeds memory, and its largest entries."""
    if evaluated.excess_bytes == evaluated.host_excess_bytes:
        return f"out of the host's memory by {size(evaluated.excess_bytes)}: offloaded optimizer states"
    fullest = max(evaluated.ledgers, key=lambda ledger: ledger.total_bytes)
    entries = sorted(fullest.entries.items(), key=lambda entry: -entry[1])
    largest = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in entries[:2])
    return f"out of memory by {size(evaluated.excess_bytes)} in the {fullest.moment}: {largest}"


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / MB:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds >= 0.1:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.2g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.2g} us"


def rule_warnings(graph: OpGraph) -> tuple[str, ...]:
    """Kinds of op without a sharding rule: every rank runs them whole."""
    distinct = (graph.ops[index] for index in dict.fromkeys(graph.representative))
    unknown = dict.fromkeys(op.target for op in distinct if op.inputs and rules.rule_for(op, graph) is None)
    return tuple(
        f"no sharding rule for {target}: every rank runs it whole; graphs.rules.register can add one"
        for target in unknown
    )


def _precision_warnings(planner: Planner) -> tuple[str, ...]:
    wanted, device = planner.programs.low_precision, planner.cluster.device
    if wanted is None:
        return ()
    executed = device.executed_dtype(wanted)
    own = dtype_name(main_dtype(planner.capture.graph))
    instead = "" if executed == wanted else f", which {device.name} runs as {executed}"
    return (f"products in repeated blocks are priced in {wanted}{instead}; the program runs them in {own}",)


def _gather_warnings(planner: Planner, p: Parallelism) -> tuple[str, ...]:
    if p.dp == 1 or planner.programs.routes_itself:
        return ()
    gathered = planner.programs.replica(p.microbatch_size, 2).gathered
    modules = {op.name: op.module or "the root" for op in planner.capture.graph.ops}
    places = list(dict.fromkeys(f"{modules.get(name, name)} ({name})" for name in gathered))
    if not places:
        return ()
    return (
        f"samples meet in {', '.join(places[:3])}{' and others' if len(places) > 3 else ''}: "
        "data parallelism gathers the batch there",
    )
