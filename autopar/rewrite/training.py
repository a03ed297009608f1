"""The training entry of an emitted program: `train.py`, with only the parts that its plan needs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent

import torch

from autopar.plan import Parallelism


@dataclass(frozen=True)
class TrainingFacts:
    """What `train.py` is written from.

    `inputs` are shape (of one sample) and dtype of every model input, with the number of values of integer
    ones; `data_axis` is the mesh axis over which data parallelism sums (None without it), `loss_axes` are the
    mesh axes on which each rank has only a term of the loss; `partial_gradients` says whether `model.py` has
    such a table; `ties` are the paths and stages of parameters tied across stages; `block_patterns` the
    repeated blocks, on which `fully_shard` works.
    """

    name: str
    parallelism: Parallelism
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype, int]]
    data_axis: str | None
    loss_axes: tuple[str, ...]
    partial_gradients: bool
    ties: tuple[tuple[tuple[str, int], ...], ...]
    block_patterns: Sequence[str]
    loss_dtype: torch.dtype


def emit_training(facts: TrainingFacts) -> str:
    """The source of `train.py`."""
    functions = [_rank(facts), _build(facts), _forward_backward(facts), MAIN]
    code = "\n\n\n".join(["\n".join(_tables(facts)), *functions])
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    plan = facts.parallelism
    docstring = (
        f'"""Train {facts.name} under the plan {plan}.\n\n'
        f'    torchrun --nproc-per-node {plan.world_size} train.py --steps 10\n"""'
    )
    imports = IMPORTS.format(
        runtime=", ".join(name for name in RUNTIME_NAMES if name in used),
        model=", ".join(name for name in MODEL_TABLES if name in used),
    )
    return f"{docstring}\n\n{imports}\n{code}\n"


RUNTIME_NAMES = (
    *(
        "HostAdamW",
        "PipelineSchedule",
        "allocate",
        "initialize",
        "load",
        "make_mesh",
        "matching",
        "pipeline",
        "shard_parameters",
    ),
    *("sum_gradients", "sync_in_backward", "tied_parameters"),
)
MODEL_TABLES = ("BORDERS", "PARTIAL_GRADIENTS", "PLACEMENTS", "STAGES")

IMPORTS = """\
from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar_runtime import {runtime}
from model import {model}
"""


def _tables(facts: TrainingFacts) -> Iterator[str]:
    plan = facts.parallelism
    yield f"MESH = {dict(plan.mesh or {'dp_replicate': 1})!r}"
    yield f"REPLICAS = {plan.dp}  # data-parallel"
    yield f"MICROBATCH = {plan.microbatch_size}  # samples of one replica in one microbatch"
    yield f"NUM_MICROBATCHES = {plan.num_microbatches}"
    yield "GLOBAL_BATCH = REPLICAS * MICROBATCH * NUM_MICROBATCHES"
    if plan.offload == "optimizer":
        yield "OPTIMIZER = HostAdamW  # its states and the master copies are in the host's memory"
    else:
        yield "OPTIMIZER = torch.optim.AdamW"
    if plan.pp > 1:
        ranks = [index % plan.pp for index in range(plan.pp * plan.num_virtual_stages)]
        yield f"RANKS_OF_STAGES = {ranks}  # along pp"
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


def _rank(facts: TrainingFacts) -> str:
    fields = ["mesh: DeviceMesh", "stages: dict[int, nn.Module]"]
    if facts.parallelism.pp > 1:
        fields.append("schedule: PipelineSchedule")
    if facts.ties:
        fields.append(
            "tied: list[tuple[nn.Parameter, dist.ProcessGroup]]  # parameters that other stages copy"
        )
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
    mine, stages = "", "{0: STAGES[0](mesh)}"
    if plan.pp > 1:
        mine = (
            "    mine = [index for index, rank in enumerate(RANKS_OF_STAGES)"
            ' if rank == mesh.get_local_rank("pp")]\n'
        )
        stages = "{index: STAGES[index](mesh) for index in mine}"
    zero, ending, arguments = "", "", "mesh, stages"
    if plan.zero_stage:
        axes = '"dp_replicate", "dp_shard"' if plan.dp_replicate > 1 else '"dp_shard"'
        zero = f"        shard_parameters(stage, BLOCKS, mesh[{axes}], zero_stage={plan.zero_stage})\n"
    if plan.pp > 1:
        ending += (
            f'    schedule = pipeline(stages, BORDERS, "{plan.schedule}", NUM_MICROBATCHES, mesh, device)\n'
        )
        arguments += ", schedule"
    if facts.ties:
        ending += "    tied = tied_parameters(stages, TIES, RANKS_OF_STAGES, mesh)\n"
        arguments += ", tied"
    return f'''\
def build(device: torch.device, weights: dict[str, Tensor] | None) -> Rank:
    """This rank, with its part of the original model's `weights` (fresh ones if None)."""
    mesh = make_mesh(device.type, MESH)
{mine}\
    with torch.device("meta"):  # no memory before it is clear which part this rank holds
        stages = {stages}
    for stage in stages.values():
{zero}\
        allocate(stage, device)
        if weights is None:
            initialize(stage, mesh, PLACEMENTS)
        else:
            load(stage, weights, mesh, PLACEMENTS)
{ending}\
    return Rank({arguments})'''


def _forward_backward(facts: TrainingFacts) -> str:
    body = _pipelined(facts) if facts.parallelism.pp > 1 else _accumulated(facts)
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
    loss = rank.stages[0](**batch)
    loss.backward()
    total = loss.detach().clone()
"""
    sync = (
        "        sync_in_backward(rank.stages[0], index == NUM_MICROBATCHES - 1)\n"
        if plan.zero_stage == 1
        else ""
    )
    return f"""\
    losses = []
    for index in range(NUM_MICROBATCHES):
        rows = slice(index * MICROBATCH, (index + 1) * MICROBATCH)
{sync}\
        loss = rank.stages[0](**{{name: each[rows] for name, each in batch.items()}}) / NUM_MICROBATCHES
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
"""


def _reductions(facts: TrainingFacts) -> str:
    """What is summed over ranks: partial gradients, gradients of replicas, of tied parameters, and the
    loss."""
    text = ""
    if facts.partial_gradients:
        text += """\
    for axis, names in PARTIAL_GRADIENTS.items():
        for stage in rank.stages.values():
            sum_gradients(matching(stage, names), rank.mesh.get_group(axis))
"""
    if facts.data_axis and not facts.parallelism.zero_stage:
        text += f"""\
    for stage in rank.stages.values():
        sum_gradients(stage.parameters(), rank.mesh.get_group("{facts.data_axis}"))
"""
    if facts.ties:
        text += """\
    for parameter, group in rank.tied:
        sum_gradients([parameter], group)
"""
    for axis in facts.loss_axes:
        text += f'    dist.all_reduce(total, group=rank.mesh.get_group("{axis}"))\n'
    return text


MAIN = '''\
def synthetic_batch(seed: int) -> dict[str, Tensor]:
    """A global batch of random samples, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for name, (shape, dtype, high) in INPUTS.items():
        if dtype.is_floating_point:
            batch[name] = torch.randn(GLOBAL_BATCH, *shape, generator=generator, dtype=dtype)
        else:
            batch[name] = torch.randint(high, (GLOBAL_BATCH, *shape), generator=generator, dtype=dtype)
    return batch


def replica(rank: Rank) -> int:
    """The number of this rank's data-parallel replica."""
    coordinate = dict(zip(MESH, rank.mesh.get_coordinate() or [], strict=True))
    return coordinate.get("dp_replicate", 0) * MESH.get("dp_shard", 1) + coordinate.get("dp_shard", 0)


def replica_part(batch: dict[str, Tensor], rank: Rank, device: torch.device) -> dict[str, Tensor]:
    """The samples of this rank's data-parallel replica."""
    size = MICROBATCH * NUM_MICROBATCHES
    rows = slice(replica(rank) * size, (replica(rank) + 1) * size)
    return {name: tensor[rows].to(device) for name, tensor in batch.items()}


def start() -> torch.device:
    """Join the process group and return this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--weights", type=Path, help="state_dict of the original model (torch.save); default: fresh"
    )
    parser.add_argument(
        "--data", type=Path, help="dict of tensors, one row a sample (torch.save); default: random"
    )
    arguments = parser.parse_args()
    device = start()
    weights = torch.load(arguments.weights, mmap=True, weights_only=True) if arguments.weights else None
    data = torch.load(arguments.data, mmap=True, weights_only=True) if arguments.data else None
    rank = build(device, weights)
    torch.manual_seed(replica(rank))  # of dropout: the same on ranks that share samples
    optimizer = OPTIMIZER(dict.fromkeys(rank.parameters().values()), lr=arguments.learning_rate)
    for step in range(arguments.steps):
        began = time.perf_counter()
        if data is None:
            batch = synthetic_batch(step)
        else:
            first = step * GLOBAL_BATCH % max(1, len(next(iter(data.values()))) - GLOBAL_BATCH + 1)
            batch = {name: tensor[first : first + GLOBAL_BATCH] for name, tensor in data.items()}
        loss = forward_backward(rank, replica_part(batch, rank, device)).item()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}  loss {loss:.6f}  {GLOBAL_BATCH / seconds:.1f} samples/s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()'''
