"""The training entry of an emitted program: `train.py`, with only the parts that its plan needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.plan import Parallelism


@dataclass(frozen=True)
class TrainingFacts:
    """What `train.py` is written from.

    `inputs` are shape (of one sample) and dtype of every model input, with the largest value of integer ones;
    `data_axis` the mesh axis over which data parallelism sums (None without it); `loss_axes` the mesh axes on which
    each rank has only a term of the loss; `ties` the paths and stages of parameters tied across stages;
    `block_paths` by stage what `fully_shard` and recomputation work on.
    """

    name: str
    parallelism: Parallelism
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype, int]]
    data_axis: str | None
    loss_axes: tuple[str, ...]
    partial_gradients: bool
    ties: tuple[tuple[tuple[str, int], ...], ...]
    block_containers: Sequence[tuple[str, ...]]
    needs_mesh: bool


def emit_training(facts: TrainingFacts) -> str:
    """The source of `train.py`."""
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: TrainingFacts) -> Iterator[str]:
    plan = facts.parallelism
    piped = plan.pp > 1
    runtime = {"initialize", "load", "make_mesh"}
    if piped:
        runtime.add("pipeline")
    if plan.zero_stage:
        runtime.add("shard_parameters")
    if not piped and plan.zero_stage == 1 and plan.num_microbatches > 1:
        runtime.add("sync_in_backward")
    if facts.data_axis and not plan.zero_stage:
        runtime.add("sum_gradients")
    if facts.partial_gradients:
        runtime |= {"matching", "sum_gradients"}
    if facts.ties:
        runtime |= {"tied_group", "sum_gradients"}
    tables = ["PLACEMENTS", "STAGES", *(["BORDERS"] if piped else []), *(["PARTIAL_GRADIENTS"] if facts.partial_gradients else [])]
    yield f'"""Train {facts.name} under the plan {plan}.'
    yield ""
    yield f"    torchrun --nproc-per-node {plan.world_size} train.py --steps 10"
    yield '"""'
    yield ""
    yield "from __future__ import annotations"
    yield ""
    yield "import argparse"
    yield "import os"
    yield "import time"
    yield "from pathlib import Path"
    yield ""
    yield "import torch"
    yield "import torch.distributed as dist"
    yield "from torch import Tensor, nn"
    yield "from torch.distributed.device_mesh import DeviceMesh"
    yield ""
    yield f"from autopar_runtime import {', '.join(sorted(runtime))}"
    yield f"from model import {', '.join(sorted(tables))}"
    yield ""
    mesh = plan.mesh or {"dp_replicate": 1}
    yield f"MESH = {dict(mesh)!r}"
    yield f"REPLICAS = {plan.dp}  # data-parallel"
    yield f"MICROBATCH = {plan.microbatch_size}  # samples of one replica in one microbatch"
    yield f"NUM_MICROBATCHES = {plan.num_microbatches}"
    yield "GLOBAL_BATCH = REPLICAS * MICROBATCH * NUM_MICROBATCHES"
    if piped:
        yield f"RANKS_OF_STAGES = {[index % plan.pp for index in range(plan.pp * plan.num_virtual_stages)]}  # along pp"
    yield "# Inputs of the model: shape of one sample, dtype, and the number of values of an integer one."
    yield "INPUTS = {"
    for name, (shape, dtype, high) in facts.inputs.items():
        yield f'    "{name}": ({shape!r}, {dtype}, {high}),'
    yield "}"
    yield ""
    yield ""
    yield from _build(facts, piped)
    yield ""
    yield ""
    yield from _step(facts, piped)
    yield ""
    yield ""
    yield from _MAIN


def _build(facts: TrainingFacts, piped: bool) -> Iterator[str]:
    plan = facts.parallelism
    yield "def build(device: torch.device, weights: dict[str, Tensor] | None) -> tuple[DeviceMesh, dict[int, nn.Module]]:"
    yield '    """The mesh, and the stages of this rank by number, with their part of `weights` (fresh ones if None)."""'
    yield "    mesh = make_mesh(device.type, MESH)"
    if piped:
        yield '    mine = [index for index, rank in enumerate(RANKS_OF_STAGES) if rank == mesh.get_local_rank("pp")]'
    else:
        yield "    mine = [0]"
    yield "    stages = {}"
    yield "    for index in mine:"
    yield "        stage = STAGES[index](mesh)" if facts.needs_mesh else "        stage = STAGES[index]()"
    yield "        if weights is None:"
    yield "            initialize(stage, mesh, PLACEMENTS)"
    yield "        else:"
    yield "            load(stage, weights, mesh, PLACEMENTS)"
    yield "        stage.to(device)"
    if plan.zero_stage:
        axes = '"dp_replicate", "dp_shard"' if plan.dp_replicate > 1 else '"dp_shard"'
        yield f"        shard_parameters(stage, blocks_of(stage), mesh[{axes}], zero_stage={plan.zero_stage})"
    yield "        stages[index] = stage"
    yield "    return mesh, stages"
    if plan.zero_stage:
        yield ""
        yield ""
        yield "def blocks_of(stage: nn.Module) -> list[nn.Module]:"
        yield '    """The repeated blocks of a stage: each is gathered and freed by itself."""'
        containers = ", ".join(f'"{path}"' for path in dict.fromkeys(path for paths in facts.block_containers for path in paths))
        yield f"    containers = [{containers}]"
        yield "    names = [name for name, _ in stage.named_modules()]"
        yield "    return [stage.get_submodule(name) for name in names if name.rpartition(\".\")[0] in containers]"


def _step(facts: TrainingFacts, piped: bool) -> Iterator[str]:
    plan = facts.parallelism
    yield "def forward_backward(mesh: DeviceMesh, stages: dict[int, nn.Module], batch: dict[str, Tensor]) -> Tensor:"
    yield '    """Gradients of the mean loss over the global batch; `batch` is the part of this rank\'s replica.'
    yield ""
    yield '    Returns that loss, on every rank."""'
    if piped:
        yield "    device = next(iter(batch.values())).device"
        yield f'    schedule = pipeline(list(stages.values()), list(stages), BORDERS, "{plan.schedule}", NUM_MICROBATCHES, mesh, device)'
        yield "    losses: list[Tensor] = []"
        yield "    target = next(iter(batch.values()))  # the loss is computed inside the last stage; this is not read"
        yield "    last = len(STAGES) - 1 in stages"
        yield "    schedule.step(**batch, target=target if last else None, losses=losses if last else None, return_outputs=False)"
        yield "    total = torch.stack([loss.detach() for loss in losses]).sum() if last else torch.zeros((), device=device)"
    else:
        yield "    stage = stages[0]"
        if plan.num_microbatches == 1:
            yield "    loss = stage(**batch)"
            yield "    loss.backward()"
            yield "    total = loss.detach().clone()"
        else:
            yield "    losses = []"
            yield "    for index in range(NUM_MICROBATCHES):"
            yield "        rows = slice(index * MICROBATCH, (index + 1) * MICROBATCH)"
            if plan.zero_stage == 1:
                yield "        sync_in_backward(stage, index == NUM_MICROBATCHES - 1)"
            yield "        loss = stage(**{name: tensor[rows] for name, tensor in batch.items()}) / NUM_MICROBATCHES"
            yield "        loss.backward()"
            yield "        losses.append(loss.detach())"
            yield "    total = torch.stack(losses).sum()"
    if facts.partial_gradients or facts.ties or (facts.data_axis and not plan.zero_stage):
        yield "    for stage in stages.values():" if piped else ""
        indent = "        " if piped else "    "
        if facts.partial_gradients:
            yield f"{indent}for axis, names in PARTIAL_GRADIENTS.items():"
            yield f"{indent}    sum_gradients(matching(stage, names), mesh.get_group(axis))"
        if facts.data_axis and not plan.zero_stage:
            yield f'{indent}sum_gradients(stage.parameters(), mesh.get_group("{facts.data_axis}"))'
    for tie in facts.ties:
        ranks = [index % plan.pp for _, index in tie]
        yield f"    group = tied_group(mesh, {ranks})"
        yield "    if group is not None:"
        yield f"        paths = {{{', '.join(f'{index}: {path!r}' for path, index in tie)}}}"
        yield "        sum_gradients([stages[i].get_parameter(path) for i, path in paths.items() if i in stages], group)"
    for axis in facts.loss_axes:
        yield f'    dist.all_reduce(total, group=mesh.get_group("{axis}"))'
    yield "    return total"


_MAIN = '''def synthetic_batch(seed: int) -> dict[str, Tensor]:
    """A global batch of random samples, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for name, (shape, dtype, high) in INPUTS.items():
        if dtype.is_floating_point:
            batch[name] = torch.randn(GLOBAL_BATCH, *shape, generator=generator, dtype=dtype)
        else:
            batch[name] = torch.randint(high, (GLOBAL_BATCH, *shape), generator=generator, dtype=dtype)
    return batch


def replica_part(batch: dict[str, Tensor], mesh: DeviceMesh, device: torch.device) -> dict[str, Tensor]:
    """The samples of this rank's data-parallel replica."""
    coordinate = dict(zip(MESH, mesh.get_coordinate() or [], strict=True))
    replica = coordinate.get("dp_replicate", 0) * MESH.get("dp_shard", 1) + coordinate.get("dp_shard", 0)
    rows = slice(replica * MICROBATCH * NUM_MICROBATCHES, (replica + 1) * MICROBATCH * NUM_MICROBATCHES)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weights", type=Path, help="state_dict of the original model (torch.save); default: fresh")
    parser.add_argument("--data", type=Path, help="dict of tensors, one row a sample (torch.save); default: random")
    arguments = parser.parse_args()
    device = start()
    weights = torch.load(arguments.weights, mmap=True, weights_only=True) if arguments.weights else None
    data = torch.load(arguments.data, mmap=True, weights_only=True) if arguments.data else None
    mesh, stages = build(device, weights)
    parameters = [parameter for stage in stages.values() for parameter in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate)
    for step in range(arguments.steps):
        began = time.perf_counter()
        if data is None:
            batch = synthetic_batch(step)
        else:
            first = step * GLOBAL_BATCH % max(1, len(next(iter(data.values()))) - GLOBAL_BATCH + 1)
            batch = {name: tensor[first : first + GLOBAL_BATCH] for name, tensor in data.items()}
        loss = forward_backward(mesh, stages, replica_part(batch, mesh, device))
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}  loss {loss.item():.6f}  {GLOBAL_BATCH / seconds:.1f} samples/s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()'''.splitlines()
