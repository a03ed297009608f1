"""Legal plans at random: whatever the search may one day choose, the rewriter must get right."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import hardware_db
from autopar.data_parallel import data_parallel
from autopar.localize import Localized, localize
from autopar.op_kinds import without_order
from autopar.placements import RR, Partial, Shard, State
from autopar.plan import (
    Certificate,
    ClusterSummary,
    ModelSummary,
    Parallelism,
    Plan,
    Prediction,
    Recomputation,
    StagePlan,
)
from autopar.request import training_policy
from autopar.rewrite.local import context_split
from autopar.search.context import is_attention
from autopar.search.programs import Programs
from autopar.strategies import REPLICATE, Strategy, conversion, natural_sections, strategies
from graphs import Capture, OpGraph
from graphs.ir import Op

SPLIT_SHARE = 0.8
"""How often an op that can be split is, so that few ops just stay whole."""
WHOLE_EXPERTS_SHARE = 0.8
"""How often experts that are dealt out run whole on the tensor axis: most splits move their rows about there,
which the rewriter refuses."""


def random_plan(capture: Capture, parallelism: Parallelism, seed: int) -> Plan:
    """A plan with these degrees in which every op takes some strategy on the context and on the tensor axis,
    each by itself."""
    local = Localized.of(capture.at(parallelism.microbatch_size * parallelism.dp))
    keys = {}
    if parallelism.dp > 1:
        local = localize(local, data_parallel(local.graph, parallelism.dp))
    if parallelism.cp > 1:
        keys["cp"] = random_context(local.graph, parallelism.cp, seed)
        local = localize(local, context_split(local.graph, parallelism.cp, keys["cp"]))
    if parallelism.tp > 1:
        whole = _experts(local.graph) if parallelism.ep > 1 and _has_whole_experts(seed) else frozenset()
        keys["tp"] = random_strategies(local.graph, parallelism.tp, seed, unsplit=whole)
    return plan_of(capture.graph, parallelism, keys)


def _has_whole_experts(seed: int) -> bool:
    return random.Random(f"experts {seed}").random() < WHOLE_EXPERTS_SHARE


def _experts(graph: OpGraph) -> frozenset[str]:
    """What experts do with their rows, and what is made of parameters alone."""
    parameters = graph.parameter_tensors.keys()
    return frozenset(op.name for op in graph.ops if op.rows is not None or set(op.inputs) <= parameters)


def random_context(graph: OpGraph, axis_size: int, seed: int) -> dict[str, str]:
    """A strategy key for every op on a context axis, where attention may be split by rows and no parameter
    is split."""
    free = replace(graph, ops=tuple(map(without_order, graph.ops)))
    return random_strategies(free, axis_size, seed, whole=frozenset(graph.parameter_tensors))


def random_strategies(
    graph: OpGraph,
    axis_size: int,
    seed: int,
    whole: frozenset[str] = frozenset(),
    unsplit: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """A strategy key for every op, such that a conversion leads to everything it needs; the tensors in
    `whole` and the work of the ops in `unsplit` are not split."""
    rng = random.Random(seed)
    while True:  # until no choice leaves a later op without one
        keys = _random_walk(graph, axis_size, rng, whole, unsplit)
        if keys is not None:
            return keys


def _random_walk(
    graph: OpGraph, axis_size: int, rng: random.Random, whole: frozenset[str], unsplit: frozenset[str]
) -> dict[str, str] | None:
    sections = natural_sections(graph, axis_size)
    made: dict[str, State] = {}
    keys = {}
    for op in graph.ops:
        offered = [
            strategy
            for strategy in strategies(op, graph, axis_size, sections)
            if _reachable(graph, op.inputs, strategy, made)
            and not _splits(op, strategy, whole)
            and (strategy.key == REPLICATE or op.name not in unsplit)
        ]
        if not offered:
            return None
        split = [strategy for strategy in offered if strategy.factor is not None]
        chosen = rng.choice(split if split and rng.random() < SPLIT_SHARE else offered)
        made.update(zip(op.outputs, chosen.results, strict=True))
        keys[op.name] = chosen.key
    return keys


def _splits(op: Op, strategy: Strategy, whole: frozenset[str]) -> bool:
    states = zip(op.inputs, strategy.operands, strict=True)
    return any(name in whole and isinstance(state.value, Shard) for name, state in states)


def _reachable(
    graph: OpGraph, operands: Sequence[str], strategy: Strategy, made: Mapping[str, State]
) -> bool:
    return all(
        not isinstance(needed.value, Partial)
        if name in graph.parameter_tensors
        else made.get(name, RR) == needed
        or conversion(made.get(name, RR), needed, graph.tensors[name].requires_grad) is not None
        for name, needed in zip(operands, strategy.operands, strict=True)
    )


def exchanging_heads(plan: Plan, graph: OpGraph) -> Plan:
    """The plan with attention split by heads on the context axis: Ulysses (arXiv:2309.14509)."""
    heads = {op.name: "h" for op in graph.ops if is_attention(op) and op.name in plan.strategies["cp"]}
    strategies = {**plan.strategies, "cp": {**plan.strategies["cp"], **heads}}
    return plan.model_copy(update={"strategies": strategies})


def with_random_cuts(plan: Plan, graph: OpGraph, seed: int) -> Plan:
    """The plan with stages that begin at any ops."""
    starts = sorted(random.Random(seed).sample(range(1, len(graph.ops)), len(plan.stages) - 1))
    stages = [
        stage.model_copy(update={"first_op": graph.ops[start].name})
        for stage, start in zip(plan.stages, (0, *starts), strict=True)
    ]
    return plan.model_copy(update={"stages": tuple(stages)})


def with_mixed_recomputation(model: Capture, plan: Plan, seed: int) -> Plan:
    """The plan with a choice for every block: random results by name for the first, then in turn nothing,
    everything, all products, other results."""
    rng = random.Random(seed)
    machine = hardware_db.cluster(f"local-cpu*{plan.parallelism.world_size}")
    units = Programs(model, machine, shorten=False).given(plan.parallelism).chain.units
    found = []
    for number, unit in enumerate(unit for unit in units if unit.is_block):
        mode = ("kept", "full", "none", "selective", "kept")[number % 5]
        names = [result.name for result in unit.results]
        kept = [name for name in names if rng.random() < 0.5] or names[:1]
        if mode != "none":
            entry = {"blocks": unit.modules, "mode": mode, "kept": kept if mode == "kept" else ()}
            found.append(Recomputation.model_validate({**entry, "labels": entry["kept"]}))
    parallelism = plan.parallelism.model_copy(update={"recompute": "mixed"})
    return plan.model_copy(update={"parallelism": parallelism, "recomputation": tuple(found)})


def uniform_recomputation(graph: OpGraph, parallelism: Parallelism) -> tuple[Recomputation, ...]:
    """What all blocks compute again under the parallelism's mode."""
    if parallelism.recompute == "none":
        return ()
    blocks = [block.path for block in graph.blocks]
    return (Recomputation.model_validate({"blocks": blocks, "mode": parallelism.recompute}),)


def plan_of(graph: OpGraph, parallelism: Parallelism, strategies: Mapping[str, Mapping[str, str]]) -> Plan:
    """A plan that says what to do, and nothing about what it costs; stages hold equal numbers of blocks."""
    num_stages = parallelism.pp * parallelism.num_virtual_stages
    possible = [block.start for block in graph.blocks] or range(len(graph.ops))
    starts = [0] + [possible[i * len(possible) // num_stages] for i in range(1, num_stages)]
    stages = tuple(
        StagePlan(
            index=index,
            first_op=graph.ops[start].name,
            modules=(),
            forward_s=0,
            backward_s=0,
            memory_bytes={},
        )
        for index, start in enumerate(starts)
    )
    return Plan(
        model=ModelSummary(
            name=graph.name,
            fingerprint="",
            num_parameters=graph.num_parameters,
            dtype="float64",
            input_shapes={},
            tokens_per_sample=1,
            num_ops=len(graph.ops),
            flops_per_sample=1.0,
        ),
        cluster=ClusterSummary(
            id="local",
            name="local",
            device="cpu",
            num_devices=parallelism.world_size,
            devices_per_node=parallelism.world_size,
            memory_bytes=1.0,
            peak_flops_per_s=1.0,
        ),
        parallelism=parallelism,
        policy=training_policy(graph),
        strategies=strategies,
        stages=stages,
        recomputation=uniform_recomputation(graph, parallelism),
        prediction=Prediction(
            software="torch-eager",
            step_s=1.0,
            terms_s={},
            tokens_per_s=1.0,
            model_flops_per_s_per_device=1.0,
            mfu=1.0,
            peak_memory_bytes=1.0,
        ),
        certificate=Certificate(
            status="evaluated", objective_s=1.0, bound_s=1.0, num_candidates=1, num_solved=1, pruned={}
        ),
    )
