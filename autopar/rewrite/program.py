"""From a captured model and a plan to a program: source, tables, and the files that run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autopar.data_parallel import data_parallel
from autopar.errors import RewriteError
from autopar.localize import Assignment, Localized, localize
from autopar.placements import RR, Partial, State
from autopar.plan import PLANNED_SCHEDULES, Plan, has_program
from autopar.rewrite.context import ProgramContext
from autopar.rewrite.emit import block_patterns, emit_model, format_source, parameter_tables
from autopar.rewrite.parity import PARITY
from autopar.rewrite.recompute import check_recomputation, recomputing
from autopar.rewrite.stages import Stage, cut
from autopar.rewrite.training import TrainingFacts, emit_training
from autopar.rewrite.tree import is_leaf
from autopar.strategies import Strategy, natural_sections, stored_state, strategies
from graphs import Capture, CaptureError
from graphs.blocks import find_blocks
from graphs.ir import OpGraph

RUNTIME = "autopar_runtime.py"


@dataclass(frozen=True)
class Program:
    """A parallel torch program.

    Attributes:
        plan: what it carries out.
        files: name -> text of `model.py`, `train.py`, `parity.py`, `plan.json` and the runtime.
        buffers: buffers of the model too large to stand in the source.
        loss_name: under which key, or at which place, the original model returns its loss.
    """

    plan: Plan
    files: Mapping[str, str]
    buffers: Mapping[str, torch.Tensor]
    loss_name: str

    @property
    def source(self) -> str:
        """The source of the model: `model.py`."""
        return self.files["model.py"]

    def save(self, directory: str | Path, *, force: bool = False) -> Path:
        """Write the program to `directory`, which may exist but not hold other files of these names unless
        `force`.
        """
        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise RewriteError(f"{target} is a file; give a directory for the program")
        taken = [name for name in self.files if (target / name).exists()]
        if taken and not force:
            raise RewriteError(
                f"{target} already holds {', '.join(taken)}; choose another directory or pass force=True"
            )
        target.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (target / name).write_text(text, encoding="utf-8")
        if self.buffers:
            torch.save(dict(self.buffers), target / "buffers.pt")
        return target


def rewrite(capture: Capture, plan: Plan) -> Program:
    """The program that trains the captured model as `plan` says.

    Raises `RewriteError` where the plan asks for something that cannot be emitted, and names it.
    """
    _check(capture.graph, plan)
    local = local_program(capture, plan)
    graph = local.graph
    assert graph.loss is not None
    stages = cut(graph, [_start(local, stage.first_op) for stage in plan.stages], (graph.loss,))
    context = _context(capture, plan, local)
    root = capture.graph.modules.get("")
    model = emit_model(
        context, stages, _header(plan), root.type_name if root else _class_name(plan.model.name)
    )
    _, partial = parameter_tables(context, stages)
    training = emit_training(_training_facts(context, plan, stages, bool(partial)))
    runtime = Path(__file__).parents[1] / "runtime" / RUNTIME
    files = {
        "model.py": model.text,
        "train.py": format_source(training),
        "parity.py": PARITY,
        RUNTIME: runtime.read_text(encoding="utf-8"),
        "plan.json": plan.to_json(),
    }
    loss_name = capture.graph.output_names[capture.graph.outputs.index(capture.graph.loss or "")]
    return Program(plan, files, model.buffers, loss_name)


def local_program(capture: Capture, plan: Plan) -> Localized:
    """What one rank runs, before it is cut into stages."""
    parallelism = plan.parallelism
    local = Localized.of(capture.at(parallelism.microbatch_size * parallelism.dp))
    if parallelism.dp > 1:
        local = localize(local, data_parallel(local.graph, parallelism.dp))
    if parallelism.tp > 1:
        local = localize(local, chosen(local.graph, "tp", parallelism.tp, plan.strategies["tp"]))
    return replace(local, graph=replace(local.graph, blocks=find_blocks(local.graph)))


def chosen(graph: OpGraph, axis: str, size: int, keys: Mapping[str, str]) -> Assignment:
    """The assignment that a plan's strategy keys name; repeated blocks take the keys of their
    representative."""
    graph = replace(graph, blocks=find_blocks(graph))
    sections = natural_sections(graph, size)
    choice = []
    for index, op in enumerate(graph.ops):
        key = keys.get(op.name) or keys.get(graph.ops[graph.representative[index]].name)
        offered = {strategy.key: strategy for strategy in strategies(op, graph, size, sections)}
        if key is None or key not in offered:
            raise RewriteError(
                f"the plan gives {op.name} ({op.target}, module {op.module or 'root'}) the strategy "
                f"{key!r} on axis {axis}, but the model offers {', '.join(offered)}; the plan was made for "
                "another model"
            )
        choice.append(offered[key])
    return Assignment(axis, size, tuple(choice), parameter_sources(graph, choice))


def parameter_sources(graph: OpGraph, choice: Sequence[Strategy]) -> dict[str, State]:
    """The state in which every input, parameter and buffer lies on an axis; for parameters see
    `stored_state`."""
    wanted: dict[str, list[State]] = {}
    for op, strategy in zip(graph.ops, choice, strict=True):
        for name, state in zip(op.inputs, strategy.operands, strict=True):
            wanted.setdefault(name, []).append(state)
    sources = dict.fromkeys((*graph.inputs, *(buffer.tensor for buffer in graph.buffers)), RR)
    return sources | {each.tensor: stored_state(wanted.get(each.tensor, ())) for each in graph.parameters}


def _check(graph: OpGraph, plan: Plan) -> None:
    parallelism = plan.parallelism
    if graph.loss is None:
        raise RewriteError(
            f"{graph.name} returns no loss: training needs a scalar output; pass labels, or return the loss "
            "from forward"
        )
    scalars = [each.name for each in graph.parameters if not graph.tensors[each.tensor].shape]
    if parallelism.zero_stage and scalars:
        raise RewriteError(
            f"ZeRO stage {parallelism.zero_stage} cannot split the parameter {scalars[0]}: it is a scalar, "
            "which fully_shard does not take; give it one dimension of size 1, or use zero_stage=0"
        )
    check_recomputation(plan.recomputation)
    axes = list(parallelism.mesh)
    if {"dp_replicate", "dp_shard"} <= set(axes) and axes.index("dp_shard") < axes.index("dp_replicate"):
        raise RewriteError(
            f"axis_order ({', '.join(parallelism.axis_order)}) has dp_replicate inside dp_shard, but "
            "fully_shard takes the replicas of shards outside of them; put dp_replicate before dp_shard"
        )
    if parallelism.schedule not in PLANNED_SCHEDULES:
        raise RewriteError(
            f"schedule={parallelism.schedule!r} can be evaluated but not yet emitted; use one of "
            f"{', '.join(PLANNED_SCHEDULES)}"
        )
    if not has_program(parallelism.schedule, parallelism.pp, parallelism.num_microbatches):
        raise RewriteError(
            f"torch's {parallelism.schedule} needs a microbatch for each of its {parallelism.pp} stages, got "
            f"{parallelism.num_microbatches}; use smaller microbatches, fewer stages, or schedule='GPipe'"
        )
    for axis, size, what in (("cp", parallelism.cp, "context"), ("ep", parallelism.ep, "expert")):
        if size > 1:
            raise RewriteError(
                f"{axis}={size}: {what} parallelism can be evaluated but not yet emitted; use {axis}=1"
            )


def _start(local: Localized, first_op: str) -> str:
    """The op at which a stage begins: `first_op`, or the first of the conversions made for it."""
    graph = local.graph
    position = next(index for index, op in enumerate(graph.ops) if op.name == first_op)
    while position > 0:
        before = graph.ops[position - 1]
        axis = before.kwargs.get("axis")
        if not before.target.startswith("autopar.") or axis is None:
            break
        if isinstance(local.states[before.inputs[0]][axis].value, Partial):
            break
        position -= 1
    return graph.ops[position].name


def _context(capture: Capture, plan: Plan, local: Localized) -> ProgramContext:
    parallelism = plan.parallelism
    data_axis = _data_axis(plan)
    block_paths = frozenset(
        block.path for block in capture.graph.blocks if not is_leaf(capture.graph, block.path)
    )
    return ProgramContext(
        graph=local.graph,
        states=local.states,
        batch_coefficient=_batch_coefficients(capture, local.graph, parallelism.microbatch_size),
        axis_names={"dp": data_axis or "", "tp": "tp"},
        axis_sizes={
            axis: size for axis, size in (("dp", parallelism.dp), ("tp", parallelism.tp)) if size > 1
        },
        batch=parallelism.microbatch_size,
        block_paths=block_paths,
        recomputing=recomputing(plan.recomputation, local.graph, block_paths),
    )


def _data_axis(plan: Plan) -> str | None:
    parallelism = plan.parallelism
    if parallelism.dp == 1:
        return None
    if parallelism.dp_replicate == 1:
        return "dp_shard"
    return "dp_replicate" if parallelism.dp_shard == 1 else "dp"


def _batch_coefficients(capture: Capture, local: OpGraph, batch: int) -> dict[str, tuple[int, ...]]:
    """For each local tensor, rows per sample of each dimension; 0 where it has no such rows."""
    try:
        two, three = capture.at(2), capture.at(3)
    except CaptureError:
        return {}
    found = {}
    for name, tensor in local.tensors.items():
        base = name.partition("__")[0] if name not in two.tensors else name
        if base not in two.tensors:
            continue
        low, high = two.tensors[base].shape, three.tensors[base].shape
        found[name] = tuple(
            more - less if more > less and less == 2 * (more - less) and size == (more - less) * batch else 0
            for less, more, size in zip(low, high, tensor.shape, strict=True)
        )
    return found


def _training_facts(
    context: ProgramContext, plan: Plan, stages: Sequence[Stage], partial: bool
) -> TrainingFacts:
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
        inputs={
            name: (graph.tensors[name].shape[1:], graph.tensors[name].dtype, _num_values(graph, name))
            for name in graph.inputs
        },
        data_axis=_data_axis(plan),
        loss_axes=loss_axes,
        partial_gradients=partial,
        ties=_ties(graph, stages),
        block_patterns=block_patterns(context.block_paths),
        loss_dtype=graph.tensors[graph.loss or ""].dtype,
    )


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


def _ties(graph: OpGraph, stages: Sequence[Stage]) -> tuple[tuple[tuple[str, int], ...], ...]:
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


def _class_name(name: str) -> str:
    words = "".join(char if char.isalnum() else " " for char in name).split()
    text = "".join(word[0].upper() + word[1:] for word in words) or "Model"
    return text if text[0].isalpha() else f"Model{text}"


def _header(plan: Plan) -> list[str]:
    parallelism = plan.parallelism
    mesh = " x ".join(f"{axis} {size}" for axis, size in parallelism.mesh.items()) or "one device"
    return [
        f"{plan.model.name} for the mesh {mesh}: the plan {parallelism}.",
        "",
        "Written by autopar. Each rank runs this on its own shards; comments at the collectives tell the",
        "state of the tensor before and after: S(d) is split along dimension d, R whole, P a term of a sum;",
        "value/gradient.",
    ]
