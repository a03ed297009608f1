"""Print a localized, staged graph as the source of a model."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from autopar.placements import RP, Shard, State
from autopar.rewrite.batch_norm import STATISTICS, keeps_statistics
from autopar.rewrite.classes import ClassPrinter, Instance
from autopar.rewrite.context import ProgramContext
from autopar.rewrite.naming import RUNTIME_NAMES
from autopar.rewrite.source_format import format_source
from autopar.rewrite.stages import Stage
from autopar.rewrite.tree import build_tree, call_leaves
from graphs.ir import OpGraph

TORCH_IMPORTS = {
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "DeviceMesh": "from torch.distributed.device_mesh import DeviceMesh",
}
"""Imports of torch by the name that needs them."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class ModelSource:
    """`model.py`, and the buffers too large to stand in it."""

    text: str
    buffers: Mapping[str, torch.Tensor]


def emit_model(
    context: ProgramContext, stages: Sequence[Stage], header: Sequence[str], name: str
) -> ModelSource:
    """The source of `model.py`.

    It has a class for every distinct module, one for every distinct stage, and the tables that say how
    parameters are split.
    """
    printer = ClassPrinter(context)
    roots: list[Instance] = []
    for stage in stages:
        ops = call_leaves(stage.ops, context.graph)
        root = build_tree(ops, context.graph, context.block_paths)
        roots.append(printer.stage(root, stage, f"{name}{stage.kind}"))
    sources, kept = printer.sources(), context.recomputing
    table = kept.table if any("KEPT" in source for source in sources) else ()
    constants = ["\n".join([*kept.lines, *table])] if kept.lines or table else []
    code = "\n\n".join([*constants, *sources, *_tables(context, stages, roots)])
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    parts = [
        '"""' + "\n".join(header) + '\n"""',
        "from __future__ import annotations",
        *_imports(used),
        "\n".join(_constants(context, used)),
        code,
    ]
    return ModelSource(format_source("\n\n".join(part for part in parts if part)), printer.large_buffers)


def _imports(used: Collection[str]) -> list[str]:
    """Groups of imports of the names that the source uses, as isort orders them."""
    torch_lines = [line for name, line in TORCH_IMPORTS.items() if name in used]
    types = ", ".join(name for name in ("Tensor", "nn") if name in used)
    torch_lines.insert(sum(name in used for name in ("torch", "F")), f"from torch import {types}")
    runtime = ", ".join(name for name in RUNTIME_NAMES if name in used)
    return [
        "import functools" if "functools" in used else "",
        "\n".join(torch_lines),
        f"from autopar_runtime import {runtime}",
    ]


def _constants(context: ProgramContext, used: Collection[str]) -> list[str]:
    lines = [
        f"{axis.upper()} = {size}  # ranks of the {axis} axis"
        for axis, size in context.axis_sizes.items()
        if axis.upper() in used
    ]
    if "BATCH" in used:
        lines.append(f"BATCH = {context.batch}  # samples of one rank in one microbatch")
    return lines


def _tables(context: ProgramContext, stages: Sequence[Stage], roots: Sequence[Instance]) -> list[str]:
    splits, partial = parameter_tables(context, stages)
    lines = [
        "# How parameters are split over the mesh; what is not named is whole on every rank.",
        "PLACEMENTS: Placements = {",
    ]
    for pattern, by_axis in splits.items():
        inner = ", ".join(f'"{axis}": {_split(state)}' for axis, state in by_axis.items())
        lines.append(f'    "{pattern}": {{{inner}}},')
    lines.append("}")
    texts = ["\n".join(lines)]
    if partial:
        lines = ["# Parameters that are whole on every rank of an axis, of whose gradient each has a term."]
        lines.append("PARTIAL_GRADIENTS = {")
        lines += [f'    "{axis}": {list(patterns)!r},' for axis, patterns in partial.items()]
        texts.append("\n".join([*lines, "}"]))
    of_type = ": list[StageMaker]" if len(stages) > 1 else ""
    texts.append(f"STAGES{of_type} = [{', '.join(code.factory for code in roots)}]")
    if len(stages) > 1:
        borders = [stage.receives for stage in stages] + [stages[-1].sends]
        rows = [f"    [{', '.join(_meta(context.graph, name) for name in border)}]," for border in borders]
        texts.append(
            "\n".join(
                [
                    "# What each stage receives, and what the last one returns.",
                    "BORDERS: list[Border] = [",
                    *rows,
                    "]",
                ]
            )
        )
    return texts


def _meta(graph: OpGraph, name: str) -> str:
    tensor = graph.tensors[name]
    without_gradient = tensor.dtype.is_floating_point and not tensor.requires_grad
    return f"({tuple(tensor.shape)}, {tensor.dtype}{', False' if without_gradient else ''})"


def _split(state: State) -> str:
    assert isinstance(state.value, Shard)
    if state.value.sections is None:
        return f"Split({state.value.dim})"
    return f"Split({state.value.dim}, sections={state.value.sections})"


def parameter_tables(
    context: ProgramContext, stages: Sequence[Stage]
) -> tuple[dict[str, dict[str, State]], dict[str, list[str]]]:
    """Patterns of parameter names with the states they are stored in, and those whose gradients are partial
    by axis. Running statistics lie as the channels that they are of.

    The names of a repeated block's parameters share a pattern where all of them agree.
    """
    read = {name for stage in stages for op in stage.ops for name in op.inputs}
    splits: dict[str, dict[str, State]] = {}
    partial: dict[str, tuple[str, ...]] = {}
    for parameter in context.graph.parameters:
        states = context.states.get(parameter.tensor, {}) if parameter.tensor in read else {}
        for path in (parameter.name, *parameter.aliases):
            splits[path] = {axis: state for axis, state in states.items() if isinstance(state.value, Shard)}
            partial[path] = _partial_over(states)
    for op in (op for stage in stages for op in stage.ops if keeps_statistics(op)):
        channels = {}
        for axis, state in context.states.get(op.output, {}).items():
            if isinstance(state.value, Shard) and state.value.dim == 1:
                channels[axis] = State(replace(state.value, dim=0), state.grad)
        splits |= {f"{op.module}.{name}": channels for name in STATISTICS[:2]}
    partial = by_pattern(partial, context.block_paths)
    axes = dict.fromkeys(axis for found in partial.values() for axis in found)
    patterns = {axis: [pattern for pattern, found in partial.items() if axis in found] for axis in axes}
    return {path: found for path, found in by_pattern(splits, context.block_paths).items() if found}, patterns


def _partial_over(states: Mapping[str, State]) -> tuple[str, ...]:
    """The mesh axes over which gradients of a parameter are summed by themselves: not those of all parameters
    together."""
    return tuple(axis for axis, state in states.items() if state == RP and axis not in {"dp", "cp"})


def by_pattern(table: Mapping[str, Value], block_paths: Iterable[str]) -> dict[str, Value]:
    """The table with one pattern for the same parameter of all repeated blocks, where all of them agree."""
    alike: dict[str, list[str]] = {}
    for path in table:
        alike.setdefault(_pattern(path, block_paths), []).append(path)
    result = {}
    for pattern, paths in alike.items():
        values = [table[path] for path in paths]
        if all(value == values[0] for value in values):
            result[pattern] = values[0]
        else:
            result.update(zip(paths, values, strict=True))
    return result


def _pattern(path: str, block_paths: Iterable[str]) -> str:
    for block in block_paths:
        if path.startswith(f"{block}."):
            return f"{_starred(block)}.{path.removeprefix(block + '.')}"
    return path


def block_patterns(block_paths: Iterable[str]) -> list[str]:
    """The paths of blocks, with `*` for the number of each."""
    return sorted({_starred(block) for block in block_paths})


def _starred(block: str) -> str:
    container, _, index = block.rpartition(".")
    return f"{container}.*" if index.isdigit() and container else block
