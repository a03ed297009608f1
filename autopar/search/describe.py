"""From what the search found to a `Plan`: names and predictions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from autopar.module_paths import module_ranges
from autopar.op_kinds import dtype_name, kind_of
from autopar.placements import RR
from autopar.plan import (
    Alternative,
    Certificate,
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
from autopar.search.summaries import cluster_summary, main_dtype, model_summary, tokens_per_sample
from autopar.search.units import Unit
from costmodel import Ledger, StageWork, check_host, model_flops_utilization
from costmodel.orders import stage_ranks
from graphs import Capture, rules
from graphs.ir import OpGraph
from hardware_db import Cluster


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
        policy=planner.policy,
        low_precision=planner.programs.low_precision,
        rank_groups=rank_groups(evaluated.parallelism, planner.cluster),
        strategies=solved.program.strategies,
        placements=parameter_placements(planner.capture.graph, solved),
        stages=_stage_plans(evaluated),
        recomputation=recomputation(planner.capture.graph, evaluated, solved.program.key.levels),
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


def _stage_plans(evaluated: Evaluated) -> tuple[StagePlan, ...]:
    p = evaluated.parallelism
    ranks = stage_ranks(p.schedule, p.pp, p.num_virtual_stages)
    ledgers = (evaluated.ledgers[rank] for rank in ranks)
    return tuple(
        stage_plan(index, evaluated.units(index), work, ledger)
        for index, (work, ledger) in enumerate(zip(evaluated.stages, ledgers, strict=True))
    )


def stage_plan(
    index: int, units: Sequence[Unit], work: StageWork, ledger: Ledger, pool: str | None = None
) -> StagePlan:
    """A stage, on one of several pools or on the only one, with the ledger of its device."""
    return StagePlan(
        index=index,
        first_op=units[0].first_op,
        modules=module_ranges(module for unit in units for module in unit.modules),
        forward_s=work.forward_s + work.forward_communication_s,
        backward_s=work.recompute_s + work.backward_s + work.backward_communication_s,
        memory_bytes=dict(ledger.entries),
        pool=pool,
    )


def recomputation(
    graph: OpGraph, evaluated: Evaluated, levels: Sequence[int] = ()
) -> tuple[Recomputation, ...]:
    """What blocks compute again, those together that do the same; `graph` is the captured one, and `levels`
    tell programs of blocks apart where these differ."""
    pairs = zip(graph.blocks, levels or (0,) * len(graph.blocks), strict=True)
    forms = {block.path: (block.kind, level) for block, level in pairs}
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
        key = ("kept", forms[path], len(unit.results), places)
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
    p, capture, step_s = evaluated.parallelism, planner.capture, evaluated.step_s
    peak = planner.cluster.device.peak_flops_per_s(dtype_name(main_dtype(capture.graph)))
    return Prediction(
        software=planner.evaluator.era.name,
        step_s=step_s,
        terms_s=dict(evaluated.step.terms),
        **rates(capture, p.global_batch, step_s, p.world_size, peak),
        peak_memory_bytes=evaluated.peak_memory_bytes,
        host_memory_bytes=host_memory_bytes(evaluated, planner.cluster),
        single_device_step_s=_single_device_step_s(planner, p),
    )


def rates(
    capture: Capture, num_samples: int, step_s: float, num_devices: int, peak_flops_per_s: float
) -> dict[str, float]:
    """Tokens a second, the model's FLOPs a second on each device, and their share of the peak (MFU)."""
    flops = 3 * capture.graph.flops / 2 * num_samples  # a backward is two forwards
    return {
        "tokens_per_s": tokens_per_sample(capture) * num_samples / step_s,
        "model_flops_per_s_per_device": flops / step_s / num_devices,
        "mfu": model_flops_utilization(flops, step_s, num_devices, peak_flops_per_s),
    }


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


def rule_warnings(graph: OpGraph) -> tuple[str, ...]:
    """Kinds of op without a sharding rule: every rank runs them whole."""
    distinct = (graph.ops[index] for index in dict.fromkeys(graph.representative))
    unknown = dict.fromkeys(op.target for op in distinct if op.inputs and rules.rule_for(op, graph) is None)
    return tuple(
        f"no sharding rule for {target}: every rank runs it whole; graphs.rules.register can add one"
        for target in unknown
    )


def _precision_warnings(planner: Planner) -> tuple[str, ...]:
    wanted, device, policy = planner.programs.low_precision, planner.cluster.device, planner.policy
    dtype = main_dtype(planner.capture.graph)
    own = dtype_name(dtype)
    warnings = []
    if policy.gathered_bytes != dtype.itemsize:
        warnings.append(
            f"the policy {policy.name} has products read parameters of {policy.gathered_bytes:g} bytes, the "
            f"model is in {own}, of {dtype.itemsize} bytes, and so is its program: convert the model, or "
            "choose another policy"
        )
    if wanted is not None:
        executed = device.executed_dtype(wanted)
        instead = "" if executed == wanted else f", which {device.name} runs as {executed}"
        warnings.append(
            f"products in repeated blocks are priced in {wanted}{instead}; the program runs them in {own}"
        )
    return tuple(warnings)


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
