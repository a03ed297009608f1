"""From a captured model and a plan to a program: source, tables, and the files that run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autopar.errors import RewriteError
from autopar.localize import Localized
from autopar.op_kinds import is_conversion
from autopar.placements import Partial
from autopar.plan import Parallelism, Plan, has_program
from autopar.rewrite.batch_norm import check_batch_norms
from autopar.rewrite.bundle import RUNTIME, bundle
from autopar.rewrite.context import ProgramContext, prefix
from autopar.rewrite.deferral import defer_weights
from autopar.rewrite.emit import emit_model, parameter_tables
from autopar.rewrite.facts import tied_across, training_facts
from autopar.rewrite.initial import NOTHING_KNOWN, Initial
from autopar.rewrite.local import local_program
from autopar.rewrite.mesh import ProgramMesh
from autopar.rewrite.parity import PARITY
from autopar.rewrite.precision import Precision, precision_of
from autopar.rewrite.recompute import check_recomputation, recomputing
from autopar.rewrite.source_format import format_source
from autopar.rewrite.stages import Stage, cut
from autopar.rewrite.training import emit_training
from autopar.rewrite.tree import is_leaf
from autopar.search.summaries import main_dtype
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, stage_ranks
from graphs import Capture, CaptureError
from graphs.ir import OpGraph


@dataclass(frozen=True)
class Program:
    """A parallel torch program.

    Attributes:
        plan: what it carries out.
        files: name -> text of `model.py`, `train.py`, `parity.py`, `plan.json` and the runtime.
        tensors: what lies beside the source: buffers too large to stand in it, and values that parameters
        begin with.
        loss_name: under which key, or at which place, the original model returns its loss.
        precision: in which it trains.
    """

    plan: Plan
    files: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    loss_name: str
    precision: Precision

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
        if self.tensors:
            torch.save(dict(self.tensors), target / "tensors.pt")
        return target


def rewrite(
    capture: Capture,
    plan: Plan,
    initial: Initial = NOTHING_KNOWN,
) -> Program:
    """The program that trains the captured model as `plan` says; `initial` tells how parameters begin.

    Raises `RewriteError` where the plan asks for something that cannot be emitted, and names it.
    """
    _check(capture.graph, plan)
    local = local_program(capture, plan)
    graph = local.graph
    assert graph.loss is not None
    stages = cut(graph, [_start(local, stage.first_op) for stage in plan.stages], (graph.loss,))
    _check_stages(graph, stages, plan.parallelism)
    if plan.parallelism.schedule in SPLIT_BACKWARD_SCHEDULES:
        stages = tuple(defer_weights(stage, graph) for stage in stages)
    context = _context(capture, plan, local)
    _check_experts(context)
    root = capture.graph.modules.get("")
    model = emit_model(
        context, stages, _header(plan), root.type_name if root else _class_name(plan.model.name)
    )
    _, partial = parameter_tables(context, stages)
    precision = precision_of(plan.policy, main_dtype(capture.graph))
    _check_offloading(plan, precision)
    facts = training_facts(
        context, plan, stages, partial_gradients=bool(partial), precision=precision, recipes=initial.recipes
    )
    training = emit_training(facts)
    sources = {"model.py": model.text, "train.py": format_source(training), "parity.py": PARITY}
    files = {**sources, f"{RUNTIME}.py": bundle(sources), "plan.json": plan.to_json()}
    loss_name = capture.graph.output_names[capture.graph.outputs.index(capture.graph.loss or "")]
    tensors = {**model.buffers, **initial.values}
    return Program(plan, files, tensors, loss_name, precision)


def _check(graph: OpGraph, plan: Plan) -> None:
    parallelism = plan.parallelism
    if graph.loss is None:
        raise RewriteError(
            f"{graph.name} returns no loss: training needs a scalar output; pass labels, or return the loss "
            "from forward"
        )
    check_recomputation(plan.recomputation)
    check_batch_norms(graph)
    axes = list(parallelism.mesh)
    if {"dp_replicate", "dp_shard"} <= set(axes) and axes.index("dp_shard") < axes.index("dp_replicate"):
        raise RewriteError(
            f"axis_order ({', '.join(parallelism.axis_order)}) has dp_replicate inside dp_shard, but "
            "fully_shard takes the replicas of shards outside of them; put dp_replicate before dp_shard"
        )
    if not has_program(parallelism.schedule, parallelism.pp, parallelism.num_microbatches):
        raise RewriteError(
            f"torch's {parallelism.schedule} needs a microbatch for each of its {parallelism.pp} stages, got "
            f"{parallelism.num_microbatches}; use smaller microbatches, fewer stages, or schedule='GPipe'"
        )


def _check_stages(graph: OpGraph, stages: Sequence[Stage], parallelism: Parallelism) -> None:
    """Raises RewriteError where a rank has nothing to train, or two copies of a parameter under one name."""
    ranks = stage_ranks(parallelism.schedule, parallelism.pp, parallelism.num_virtual_stages)
    for rank in range(parallelism.pp):
        mine = [stage for stage in stages if ranks[stage.index] == rank]
        numbers = ", ".join(str(stage.index + 1) for stage in mine)
        read = {name for stage in mine for op in stage.ops for name in op.inputs}
        if not any(name in read and graph.tensors[name].requires_grad for name in graph.parameter_tensors):
            raise RewriteError(
                f"pipeline rank {rank} would train nothing: stages {numbers} of {len(stages)} hold no "
                "parameters; let stages begin elsewhere, or use fewer of them"
            )
        for tie in tied_across(graph, mine):
            names = [path for path, _ in tie]
            if len(set(names)) < len(names):
                raise RewriteError(
                    f"pipeline rank {rank} would hold {names[0]} twice: several of its stages ({numbers} of "
                    f"{len(stages)}) read it there; use a schedule with one stage on a rank, such as 1F1B"
                )


def _check_offloading(plan: Plan, precision: Precision) -> None:
    """`fully_shard` gives gradients the dtype of its shards, which offloading leaves narrow."""
    parallelism = plan.parallelism
    is_wide = precision.gradient != precision.compute
    if parallelism.offload == "optimizer" and parallelism.zero_stage and is_wide:
        raise RewriteError(
            f"the policy {plan.policy.name} adds up gradients in {precision.gradient}, but under ZeRO-"
            f"{parallelism.zero_stage} with offloaded states fully_shard keeps them in {precision.compute}; "
            "plan with adamw-mixed, or with offload='none'"
        )


def _check_experts(context: ProgramContext) -> None:
    """`fully_shard` takes modules, and experts are sharded over other ranks than all else."""
    if not context.mesh.zero_stage:
        return
    experts = {each.name for each in context.graph.parameters if "ep" in context.states.get(each.tensor, {})}
    for module in sorted({name.rpartition(".")[0] for name in experts}):
        others = [
            each.name
            for each in context.graph.parameters
            if each.name.startswith(prefix(module)) and each.name not in experts
        ]
        if others:
            raise RewriteError(
                f"ZeRO shards the experts of {module or 'the root'} over fewer ranks than {others[0]}, which "
                "is in the same module; give the experts a module of their own, or use zero_stage=0 or ep=1"
            )


def _start(local: Localized, first_op: str) -> str:
    """The op at which a stage begins: `first_op`, or the first of the conversions made for it."""
    graph = local.graph
    position = next(index for index, op in enumerate(graph.ops) if op.name == first_op)
    while position > 0:
        before = graph.ops[position - 1]
        if not is_conversion(before):
            break
        if isinstance(local.states[before.inputs[0]][before.kwargs["axis"]].value, Partial):
            break
        position -= 1
    return graph.ops[position].name


def _context(capture: Capture, plan: Plan, local: Localized) -> ProgramContext:
    parallelism = plan.parallelism
    degrees = {axis: getattr(parallelism, axis) for axis in ("dp", "cp", "tp", "ep")}
    mesh = ProgramMesh.of(parallelism)
    block_paths = frozenset(
        block.path for block in capture.graph.blocks if not is_leaf(capture.graph, block.path)
    )
    return ProgramContext(
        graph=local.graph,
        states=local.states,
        batch_coefficient=_batch_coefficients(capture, local.graph, parallelism.microbatch_size),
        axis_names={"dp": mesh.joint("dp") or "", "cp": "cp", "tp": "tp", "ep": "ep"},
        axis_sizes={axis: size for axis, size in degrees.items() if size > 1},
        mesh=mesh,
        batch=parallelism.microbatch_size,
        block_paths=block_paths,
        recomputing=recomputing(plan.recomputation, local.graph, block_paths),
    )


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


def _class_name(name: str) -> str:
    words = "".join(char if char.isalnum() else " " for char in name).split()
    text = "".join(word[0].upper() + word[1:] for word in words) or "Model"
    return text if text[0].isalpha() else f"Model{text}"


_ZIGZAG = (
    "In zigzag, rank i of the n along an axis has the i-th of 2n slices from the front and from the back.",
)


def _header(plan: Plan) -> list[str]:
    parallelism = plan.parallelism
    mesh = " x ".join(f"{axis} {size}" for axis, size in parallelism.mesh.items()) or "one device"
    return [
        f"{plan.model.name} for the mesh {mesh}: the plan {parallelism}.",
        "",
        "Written by autopar. Each rank runs this on its own shards; comments at the collectives tell the",
        "state of the tensor before and after: S(d) is split along dimension d, R whole, P a term of a sum;",
        "value/gradient.",
        *(_ZIGZAG if parallelism.cp > 1 else ()),
    ]
