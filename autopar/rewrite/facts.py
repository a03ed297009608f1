"""What `train.py` has to know of a program: read off its graph, its stages and its plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.placements import Partial
from autopar.plan import Parallelism, Plan
from autopar.rewrite.context import ProgramContext
from autopar.rewrite.emit import block_patterns, by_pattern
from autopar.rewrite.precision import Precision
from autopar.rewrite.stages import Stage
from autopar.runtime.initial import Recipe
from autopar.runtime.log import Expected
from graphs.ir import OpGraph


@dataclass(frozen=True)
class TrainingFacts:
    """What `train.py` is written from.

    `policy` is the name of the plan's optimizer policy, and `precision` what it means for the dtypes;
    `inputs` are shape (of one sample) and dtype of every model input, with the number of values of integer
    ones; `mesh` are the axes with their sizes, `data_axis` is the mesh axis over which data parallelism sums
    (None without it), `expert_axis` the one over which it sums gradients of experts (None where they are not
    apart), `loss_axes` are the mesh axes on which each rank has only a term of the loss;
    `partial_gradients` says whether `model.py` has such a table; `ties` are the paths and stages of
    parameters tied across stages; `block_patterns` the repeated blocks, on which `fully_shard` works;
    `has_whole_parameters` says whether it must leave some whole; `aliases` are the further names of tied
    parameters, each with the first; `tokens` are the inputs that tokens and labels go to (None where the
    model reads none); `expected` is what the plan says of a step; `initial` are the patterns of parameters by
    how they are initialised.
    """

    name: str
    parallelism: Parallelism
    policy: str
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype, int]]
    mesh: Mapping[str, int]
    data_axis: str | None
    expert_axis: str | None
    loss_axes: tuple[str, ...]
    partial_gradients: bool
    ties: tuple[tuple[tuple[str, int], ...], ...]
    block_patterns: Sequence[str]
    loss_dtype: torch.dtype
    has_whole_parameters: bool
    precision: Precision
    aliases: Mapping[str, str]
    tokens: tuple[str, str] | None
    expected: Expected
    initial: Mapping[Recipe, Sequence[str]]

    @property
    def has_buckets(self) -> bool:
        """Whether whole gradients are summed over replicas; under ZeRO `fully_shard` does it."""
        return self.data_axis is not None and not self.parallelism.zero_stage

    @property
    def has_master_shards(self) -> bool:
        """Whether the shards of ZeRO are the master copies; a host keeps its own."""
        parallelism = self.parallelism
        on_device = parallelism.offload == "none"
        return self.precision.has_master and parallelism.zero_stage > 0 and on_device


def training_facts(
    context: ProgramContext,
    plan: Plan,
    stages: Sequence[Stage],
    *,
    partial_gradients: bool,
    precision: Precision,
    recipes: Mapping[str, Recipe],
) -> TrainingFacts:
    """The facts of a program whose stages are these; `recipes` tell how parameters are initialised."""
    graph = context.graph
    axes = [
        axis
        for axis, state in context.states.get(graph.loss or "", {}).items()
        if isinstance(state.value, Partial)
    ]
    loss_axes = tuple(context.axis_names[axis] for axis in axes) + (
        ("pp",) if plan.parallelism.pp > 1 else ()
    )
    return TrainingFacts(
        name=plan.model.name,
        parallelism=plan.parallelism,
        policy=plan.policy.name,
        inputs={
            name: (graph.tensors[name].shape[1:], graph.tensors[name].dtype, _num_values(graph, name))
            for name in graph.inputs
        },
        mesh=context.mesh.axes,
        data_axis=context.mesh.joint("dp_cp"),
        expert_axis=context.mesh.expert_gradients,
        loss_axes=loss_axes,
        partial_gradients=partial_gradients,
        ties=tied_across(graph, stages),
        block_patterns=block_patterns(context.block_paths),
        loss_dtype=graph.tensors[graph.loss or ""].dtype,
        has_whole_parameters=any(
            not tensor.shape or tensor.dtype != precision.compute
            for tensor in (graph.tensors[each.tensor] for each in graph.parameters)
        ),
        precision=precision,
        aliases={alias: each.name for each in graph.parameters for alias in each.aliases},
        tokens=_token_inputs(graph),
        expected=_expected(plan),
        initial=_initial(recipes, context.block_paths),
    )


def _initial(recipes: Mapping[str, Recipe], block_paths: Collection[str]) -> dict[Recipe, list[str]]:
    """Patterns of parameter names by how they are initialised."""
    patterns: dict[Recipe, list[str]] = {}
    for pattern, recipe in by_pattern(recipes, block_paths).items():
        patterns.setdefault(recipe, []).append(pattern)
    return patterns


def _expected(plan: Plan) -> Expected:
    predicted = plan.prediction
    return Expected(
        tokens=plan.parallelism.global_batch * plan.model.tokens_per_sample,
        model_flops=predicted.model_flops_per_s_per_device * predicted.step_s,
        peak_flops_per_s=plan.cluster.peak_flops_per_s,
        step_s=predicted.step_s,
    )


def _token_inputs(graph: OpGraph) -> tuple[str, str] | None:
    """The inputs that a text can fill: the integers of which there are most kinds, and labels of the same
    shape."""
    integers = {name: _num_values(graph, name) for name in graph.inputs if _is_integer(graph, name)}
    tokens = max(integers, key=lambda name: integers[name], default="")
    shape = graph.tensors[tokens].shape if tokens else ()
    labels = [name for name in integers if name != tokens and graph.tensors[name].shape == shape]
    named = [name for name in labels if "label" in name or "target" in name]
    return (tokens, named[0]) if named else None


def _is_integer(graph: OpGraph, name: str) -> bool:
    return graph.tensors[name].dtype in (torch.int32, torch.int64)


def _num_values(graph: OpGraph, name: str) -> int:
    """How many values an integer input may take: the rows of the table it looks up, the classes it is
    compared with.
    """
    for index in graph.consumers[name]:
        op = graph.ops[index]
        if op.target in {"aten.embedding.default", "autopar.embedding"}:
            return graph.tensors[op.inputs[0]].shape[0]
    for op in graph.ops:
        if op.target in {"aten.cross_entropy_loss.default", "autopar.cross_entropy"}:
            return graph.tensors[op.inputs[0]].shape[-1]
    return 2


def tied_across(graph: OpGraph, stages: Sequence[Stage]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Parameters that more than one stage holds, with the path they have in each."""
    ties = []
    for parameter in graph.parameters:
        paths = (parameter.name, *parameter.aliases)
        holders = []
        for stage in stages:
            users = [op.module for op in stage.ops if parameter.tensor in op.inputs]
            if users:
                path = next((path for path in paths if path.rpartition(".")[0] in users), paths[0])
                holders.append((path, stage.index))
        if len(holders) > 1:
            ties.append(tuple(holders))
    return tuple(ties)
