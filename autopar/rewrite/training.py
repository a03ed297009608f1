"""The training entry of an emitted program: `train.py`, with only the parts that its plan needs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill, indent

import torch

from autopar.plan import Parallelism
from autopar.rewrite.precision import Precision
from autopar.runtime.initial import Recipe
from autopar.runtime.log import Expected
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, stage_ranks

WIDTH = 100
"""Of the lines of a docstring."""


@dataclass(frozen=True)
class TrainingFacts:
    """What `train.py` is written from.

    `policy` is the name of the plan's optimizer policy, and `precision` what it means for the dtypes;
    `inputs` are shape (of one sample) and dtype of every model input, with the number of values of integer
    ones; `mesh` are the axes with their sizes, `data_axis` is the mesh axis over which data parallelism sums
    (None without it), `loss_axes` are the mesh axes on which each rank has only a term of the loss;
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


def emit_training(facts: TrainingFacts) -> str:
    """The source of `train.py`."""
    functions = [_rank(facts), _build(facts), _forward_backward(facts), _main(facts)]
    code = "\n\n\n".join(["\n".join(_tables(facts)), *functions])
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    plan = facts.parallelism
    docstring = (
        f'"""Train {facts.name} under the plan {plan}: {plan.global_batch} samples a step.\n\n'
        f"{_policy(facts)}\n\n"
        f"    torchrun --nproc-per-node {plan.world_size} train.py --data tokens.bin --checkpoints saved\n\n"
        'See --help for the rest.\n"""'
    )
    imports = IMPORTS.format(
        runtime=", ".join(name for name in RUNTIME_NAMES if name in used),
        model=", ".join(name for name in MODEL_TABLES if name in used),
    )
    return f"{docstring}\n\n{imports}\n{code}\n"


def _policy(facts: TrainingFacts) -> str:
    """How it trains, by the plan's optimizer policy."""
    precision = facts.precision
    compute, master, gradient = map(_name, (precision.compute, precision.master, precision.gradient))
    updated = f"{master} copies of them" if precision.has_master else "them"
    scaled = ", of a scaled loss" if precision.needs_loss_scale else ""
    return fill(
        f"By the policy {facts.policy} products read {compute} parameters, AdamW updates {updated}, and "
        f"gradients are added up in {gradient}{scaled}.",
        WIDTH,
    )


_RUNTIME_NAMES = """
Checkpoints Expected GradientBuckets HostAdamW LocalAdamW Log LossScale MasterAdamW MixedPrecision
PipelineSchedule Tied Trained allocate batches clip_gradients experts_of further_copies hold_until_last
initialize leave_weights load make_mesh matching open_data pipeline seed_step set_learning_rate
shard_parameters start sum_gradients sum_tied_gradients tied_parameters training_options unsharded_parameters
"""
RUNTIME_NAMES = tuple(_RUNTIME_NAMES.split())
MODEL_TABLES = ("BORDERS", "PARTIAL_GRADIENTS", "PLACEMENTS", "STAGES")

IMPORTS = """\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar_runtime import {runtime}
from model import {model}
"""


def _tables(facts: TrainingFacts) -> Iterator[str]:
    plan = facts.parallelism
    yield f"MESH = {dict(facts.mesh or {'dp_replicate': 1})!r}"
    yield f"MICROBATCH = {plan.microbatch_size}  # samples of one replica in one microbatch"
    yield f"NUM_MICROBATCHES = {plan.num_microbatches}"

    if plan.offload == "optimizer":
        yield "OPTIMIZER = HostAdamW  # its states and the master copies are in the host's memory"
    elif facts.precision.has_master:
        yield f"OPTIMIZER = MasterAdamW  # has {_name(facts.precision.master)} copies of what is narrower"
    elif plan.zero_stage:
        yield "OPTIMIZER = LocalAdamW  # of each rank's shards"
    else:
        yield "OPTIMIZER = torch.optim.AdamW"
    if facts.has_master_shards:
        dtypes = facts.precision.compute, facts.precision.master, facts.precision.gradient
        yield f"PRECISION = MixedPrecision({', '.join(map(str, dtypes))})"
    if plan.pp > 1:
        ranks = list(stage_ranks(plan.schedule, plan.pp, plan.num_virtual_stages))
        yield f"RANKS_OF_STAGES = {ranks}  # along pp"
    if facts.initial:
        yield "# How parameters begin: in-place ops with their numbers, and the parameters."
        yield "INITIAL = {"
        yield from (f"    {recipe!r}: {list(patterns)!r}," for recipe, patterns in facts.initial.items())
        yield "}"
    if facts.aliases:
        yield "# Further names of tied parameters, each with the first."
        yield f"ALIASES = {dict(facts.aliases)!r}"
    if facts.ties:
        yield "# Paths and stages of every parameter that several stages hold a copy of."
        yield f"TIES = {[{index: path for path, index in tie} for tie in facts.ties]!r}"
    if plan.zero_stage:
        yield "# Paths of the repeated blocks: each is gathered, and freed, by itself."
        yield f"BLOCKS = {list(facts.block_patterns)!r}"
    yield "# Inputs of the model: shape of one sample, dtype, and the number of values of an integer one."
    yield "INPUTS = {"
    for name, (shape, dtype, high) in facts.inputs.items():
        yield f'    "{name}": ({shape!r}, {dtype}, {high}),'
    yield "}"
    expected = facts.expected
    yield "# Of one step: tokens (samples where there are none), and the model's FLOPs on one device."
    yield (
        f"EXPECTED = Expected(tokens={expected.tokens}, model_flops={expected.model_flops:.6g}, "
        f"peak_flops_per_s={expected.peak_flops_per_s:.6g}, step_s={expected.step_s:.6g})"
    )


def _rank(facts: TrainingFacts) -> str:
    fields = ["mesh: DeviceMesh", "stages: dict[int, nn.Module]"]
    if facts.parallelism.pp > 1:
        fields.append("schedule: PipelineSchedule")
    if facts.ties:
        fields.append("tied: list[Tied]  # parameters that several stages have copies of")
    if facts.has_buckets:
        fields.append("gradients: GradientBuckets")
    if facts.precision.needs_loss_scale:
        fields.append("loss_scale: LossScale")
    return f'''\
@dataclass(frozen=True)
class Rank:
    """What one rank holds: its stages of the model by number, and what it runs them with."""

{indent(chr(10).join(fields), "    ")}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of this rank, by the names they have in the original model."""
        stages = self.stages.values()
        return {{
            name: each for stage in stages for name, each in stage.named_parameters(remove_duplicate=False)
        }}'''


def _build(facts: TrainingFacts) -> str:
    plan = facts.parallelism
    aliases = ", ALIASES" if facts.aliases else ""
    initial = ", INITIAL" if facts.initial else ""
    mine, stages = "", "{0: STAGES[0](mesh)}"
    if plan.pp > 1:
        mine = (
            "    mine = [index for index, rank in enumerate(RANKS_OF_STAGES)"
            ' if rank == mesh.get_local_rank("pp")]\n'
        )
        stages = "{index: STAGES[index](mesh) for index in mine}"
    zero, ending, arguments = "", "", "mesh, stages"
    if plan.zero_stage:
        precision = ", precision=PRECISION" if facts.has_master_shards else ""
        experts = ", experts=experts_of(stage, PLACEMENTS)" if plan.ep > 1 else ""
        options = f"zero_stage={plan.zero_stage}{precision}{experts}"
        zero = f"        shard_parameters(stage, BLOCKS, mesh, {options})\n"
    if plan.pp > 1:
        splitting = ", leave_weights" if plan.schedule in SPLIT_BACKWARD_SCHEDULES else ""
        if splitting and facts.has_master_shards and facts.precision.gradient != facts.precision.compute:
            splitting = ", lambda stage: leave_weights(stage, PRECISION.gradient)"
        pipeline = f'pipeline(stages, BORDERS, "{plan.schedule}", NUM_MICROBATCHES, mesh, device{splitting})'
        ending += f"    schedule = {pipeline}\n"
        arguments += ", schedule"
    if facts.ties:
        ending += "    tied = tied_parameters(stages, TIES, RANKS_OF_STAGES, mesh)\n"
        arguments += ", tied"
    if facts.precision.gradient != facts.precision.compute and not facts.has_master_shards:
        ending += f"""\
    for stage in stages.values():
        for parameter in stage.parameters():
            parameter.grad_dtype = {facts.precision.gradient}
"""
    if facts.has_buckets:
        if plan.ep > 1:  # gradients of experts, which other ranks do not have, are in PARTIAL_GRADIENTS
            ending += """\
    apart = {each for stage in stages.values() for each in experts_of(stage, PLACEMENTS)}
    parameters = [each for stage in stages.values() for each in stage.parameters() if each not in apart]
"""
        else:
            ending += """\
    parameters = [each for stage in stages.values() for each in stage.parameters()]
"""
        ending += f"""\
    gradients = GradientBuckets(parameters, mesh.get_group("{facts.data_axis}"), NUM_MICROBATCHES)
"""
        arguments += ", gradients"
    if facts.precision.needs_loss_scale:
        ending += """\
    loss_scale = LossScale()
    if len(STAGES) - 1 in stages:
        loss_scale.scale_output(stages[len(STAGES) - 1])
"""
        arguments += ", loss_scale"
    return f'''\
def build(device: torch.device, weights: Mapping[str, Any] | Path | None) -> Rank:
    """This rank, with its part of the original model's `weights` (fresh ones if None)."""
    mesh = make_mesh(device.type, MESH)
{mine}\
    with torch.device("meta"):  # no memory before it is clear which part this rank holds
        stages: dict[int, nn.Module] = {stages}
    for stage in stages.values():
{zero}\
        allocate(stage, device)
        if weights is None:
            initialize(stage, mesh, PLACEMENTS{initial})
        else:
            load(stage, weights, mesh, PLACEMENTS{aliases})
{ending}\
    return Rank({arguments})'''


def _forward_backward(facts: TrainingFacts) -> str:
    body = "    rank.gradients.clear()\n" if facts.has_buckets else ""
    body += _pipelined(facts) if facts.parallelism.pp > 1 else _accumulated(facts)
    return f'''\
def forward_backward(rank: Rank, batch: dict[str, Tensor]) -> Tensor:
    """Leave the gradients of the mean loss over the global batch; `batch` is the part of this rank's replica.

    Returns that loss, on every rank.
    """
{body}{_reductions(facts)}    return total'''


def _pipelined(facts: TrainingFacts) -> str:
    return f"""\
    losses: list[Tensor] = []
    if len(STAGES) - 1 in rank.stages:
        unread = next(iter(batch.values()))  # the last stage computes the loss itself; no target is read
        rank.schedule.step(batch=batch, target=unread, losses=losses, return_outputs=False)
    else:
        rank.schedule.step(batch=batch, return_outputs=False)
    device = next(iter(batch.values())).device
    total = sum((loss.detach() for loss in losses), torch.zeros((), dtype={facts.loss_dtype}, device=device))
"""


def _accumulated(facts: TrainingFacts) -> str:
    plan = facts.parallelism
    if plan.num_microbatches == 1:
        return """\
    loss: Tensor = rank.stages[0](**batch)
    loss.backward()
    total = loss.detach().clone()
"""
    holds = (
        "        hold_until_last(rank.stages[0], index == NUM_MICROBATCHES - 1, "
        f"zero_stage={plan.zero_stage})\n"
        if plan.zero_stage in (1, 2)
        else ""
    )
    return f"""\
    losses = []
    for index in range(NUM_MICROBATCHES):
        rows = slice(index * MICROBATCH, (index + 1) * MICROBATCH)
{holds}\
        loss = rank.stages[0](**{{name: each[rows] for name, each in batch.items()}}) / NUM_MICROBATCHES
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
"""


def _reductions(facts: TrainingFacts) -> str:
    """What is summed over ranks: partial gradients, gradients of replicas, of tied parameters, and the
    loss."""
    text = ""
    if facts.has_buckets:  # first: the other sums read what is reduced while the backward runs
        text += "    rank.gradients.reduce()\n"
    if facts.parallelism.zero_stage and facts.has_whole_parameters:
        text += f"""\
    for stage in rank.stages.values():
        sum_gradients(unsharded_parameters(stage), rank.mesh.get_group("{facts.data_axis}"))
"""
    if facts.partial_gradients:
        text += """\
    for axis, names in PARTIAL_GRADIENTS.items():
        for stage in rank.stages.values():
            sum_gradients(matching(stage, names), rank.mesh.get_group(axis))
"""
    if facts.ties:
        text += """\
    sum_tied_gradients(rank.tied)
"""
    for axis in facts.loss_axes:
        text += f'    dist.all_reduce(total, group=rank.mesh.get_group("{axis}"))\n'
    if facts.precision.needs_loss_scale:
        text += "    rank.loss_scale.unscale(rank.parameters().values())\n"
    return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _main(facts: TrainingFacts) -> str:
    aliases = ", ALIASES" if facts.aliases else ""
    tokens = f', "{facts.tokens[0]}", "{facts.tokens[1]}"' if facts.tokens else ""
    further = ", further_copies(rank.tied)" if facts.ties else ""
    step, scale, resumed = "        optimizer.step()\n", "", ""
    if facts.precision.needs_loss_scale:
        step = "        if rank.loss_scale.is_good(float(norm)):\n            optimizer.step()\n"
        scale = ", loss_scale=rank.loss_scale.state"
        resumed = '    rank.loss_scale.state = progress.get("loss_scale", rank.loss_scale.state)\n'
    return f"""\
def main() -> None:
    options = training_options(__doc__)
    device = start()
    rank = build(device, options.weights)
    if options.compile:
        for stage in rank.stages.values():
            stage.compile()
    optimizer = OPTIMIZER(
        dict.fromkeys(rank.parameters().values()), betas=options.betas, weight_decay=options.weight_decay
    )
    trained = Trained(tuple(rank.stages.values()), optimizer, rank.mesh, PLACEMENTS{aliases})
    checkpoints = Checkpoints(options.checkpoints)
    progress = checkpoints.resume(trained)
{resumed}\
    samples = open_data(options, INPUTS{tokens})
    first = progress.get("step", 0)
    data = batches(samples, rank.mesh, MICROBATCH * NUM_MICROBATCHES, first, options)
    log = Log(EXPECTED, options)
    last = first  # steps taken
    for step, batch in zip(range(first, options.steps), data, strict=False):
        seed_step(step, rank.mesh, options)
        rate = set_learning_rate(optimizer, step, options)
        loss = forward_backward(rank, {{name: each.to(device) for name, each in batch.items()}})
        norm = clip_gradients(trained.stages, options.clip, rank.mesh, PLACEMENTS{further})
{step}\
        optimizer.zero_grad()
        last = step + 1
        log.step(last, loss=loss, gradient_norm=norm, learning_rate=rate)
        if last % options.save_every == 0:
            checkpoints.save(last, trained{scale})
    if last > first and last % options.save_every:
        checkpoints.save(last, trained{scale})
    log.end(last)
    checkpoints.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()"""
