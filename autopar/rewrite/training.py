"""The training entry of an emitted program: `train.py`. Here what follows from the plan alone: its docstring,
imports and tables."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from textwrap import fill

import torch

from autopar.rewrite.facts import TrainingFacts
from autopar.rewrite.training_functions import build_function, main_function, rank_class, step_function
from costmodel.orders import stage_ranks

WIDTH = 100
"""Of the lines of a docstring."""


def emit_training(facts: TrainingFacts) -> str:
    """The source of `train.py`."""
    functions = [rank_class(facts), build_function(facts), step_function(facts), main_function(facts)]
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
PipelineSchedule Tied Trained allocate batches clip_gradients compile_stages experts_of further_copies
hold_until_last initialize leave_weights load make_mesh matching open_data pipeline seed_step
set_learning_rate shard_parameters start sum_gradients sum_tied_gradients tied_parameters training_options
unsharded_parameters
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
