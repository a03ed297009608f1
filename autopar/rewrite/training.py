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
    each rank has only a term of the loss; `ties` the paths and stages of parameters tied across stages; `block_patterns` the repeated blocks, on which `fully_shard` works.
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
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: TrainingFacts) -> Iterator[str]:
    plan = facts.parallelism
    piped = plan.pp > 1
    runtime = {"initialize", "load", "make_mesh"}
    if piped:
        runtime |= {"PipelineSchedule", "pipeline"}
    if plan.zero_stage:
        runtime.add("shard_parameters")
    if not piped and plan.zero_stage == 1 and plan.num_microbatches > 1:
        runtime.add("sync_in_backward")
    if facts.data_axis and not plan.zero_stage:
        runtime.add("sum_gradients")
    if facts.partial_gradients:
        runtime |= {"matching", "sum_gradients"}
    if facts.ties:
        runtime |= {"tied_parameters", "sum_gradients"}
    tables = ["PLACEMENTS", "STAGES"]
    tables += ["BORDERS"] if piped else []
    tables += ["PARTIAL_GRADIENTS"] if facts.partial_gradients else []
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
    yield "from dataclasses import dataclass"
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
    if facts.ties:
        yield "# Paths and stages of every parameter that several stages hold a copy of."
        yield f"TIES = [{', '.join('{' + ', '.join(f'{index}: {path!r}' for path, index in tie) + '}' for tie in facts.ties)}]"
    if plan.zero_stage:
        yield "# Paths of the repeated blocks: each is gathered, and freed, by itself."
        yield f"BLOCKS = {list(facts.block_patterns)!r}"
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
    yield "@dataclass(frozen=True)"
    yield "class Rank:"
    yield '    """What one rank holds: its stages of the model by number, and what it runs them with."""'
    yield ""
    yield "    mesh: DeviceMesh"
    yield "    stages: dict[int, nn.Module]"
    if piped:
        yield "    schedule: PipelineSchedule"
    if facts.ties:
        yield "    tied: list[tuple[nn.Parameter, dist.ProcessGroup]]  # parameters that other stages have copies of"
    yield ""
    yield "    def parameters(self) -> dict[str, nn.Parameter]:"
    yield '        """All parameters of this rank, by the names they have in the original model."""'
    yield "        stages = self.stages.values()"
    yield "        return {name: each for stage in stages for name, each in stage.named_parameters(remove_duplicate=False)}"
    yield ""
    yield ""
    yield "def build(device: torch.device, weights: dict[str, Tensor] | None) -> Rank:"
    yield '    """This rank, with its part of the original model\'s `weights` (fresh ones if None)."""'
    yield "    mesh = make_mesh(device.type, MESH)"
    if piped:
        yield '    mine = [index for index, rank in enumerate(RANKS_OF_STAGES) if rank == mesh.get_local_rank("pp")]'
        yield "    stages = {index: STAGES[index](mesh) for index in mine}"
    else:
        yield "    stages = {0: STAGES[0](mesh)}"
    yield "    for stage in stages.values():"
    yield "        if weights is None:"
    yield "            initialize(stage, mesh, PLACEMENTS)"
    yield "        else:"
    yield "            load(stage, weights, mesh, PLACEMENTS)"
    yield "        stage.to(device)"
    if plan.zero_stage:
        axes = '"dp_replicate", "dp_shard"' if plan.dp_replicate > 1 else '"dp_shard"'
        yield f"        shard_parameters(stage, BLOCKS, mesh[{axes}], zero_stage={plan.zero_stage})"
    arguments = "mesh, stages"
    if piped:
        yield f'    schedule = pipeline(stages, BORDERS, "{plan.schedule}", NUM_MICROBATCHES, mesh, device)'
        arguments += ", schedule"
    if facts.ties:
        yield "    tied = tied_parameters(stages, TIES, RANKS_OF_STAGES, mesh)"
        arguments += ", tied"
    yield f"    return Rank({arguments})"


def _step(facts: TrainingFacts, piped: bool) -> Iterator[str]:
    plan = facts.parallelism
    yield "def forward_backward(rank: Rank, batch: dict[str, Tensor]) -> Tensor:"
    yield '    """Leave the gradients of the mean loss over the global batch; `batch` is the part of this rank\'s replica.'
    yield ""
    yield '    Returns that loss, on every rank."""'
    if piped:
        yield "    losses: list[Tensor] = []"
        yield "    if len(STAGES) - 1 in rank.stages:"
        yield "        unread = next(iter(batch.values()))  # the last stage computes the loss itself; no target is read"
        yield "        rank.schedule.step(**batch, target=unread, losses=losses, return_outputs=False)"
        yield "    else:"
        yield "        rank.schedule.step(**batch, return_outputs=False)"
        yield "    device = next(iter(batch.values())).device"
        yield f"    total = sum((loss.detach() for loss in losses), torch.zeros((), dtype={facts.loss_dtype}, device=device))"
    elif plan.num_microbatches == 1:
        yield "    loss = rank.stages[0](**batch)"
        yield "    loss.backward()"
        yield "    total = loss.detach().clone()"
    else:
        yield "    losses = []"
        yield "    for index in range(NUM_MICROBATCHES):"
        yield "        rows = slice(index * MICROBATCH, (index + 1) * MICROBATCH)"
        if plan.zero_stage == 1:
            yield "        sync_in_backward(rank.stages[0], index == NUM_MICROBATCHES - 1)"
        yield "        loss = rank.stages[0](**{name: each[rows] for name, each in batch.items()}) / NUM_MICROBATCHES"
        yield "        loss.backward()"
        yield "        losses.append(loss.detach())"
        yield "    total = torch.stack(losses).sum()"
    if facts.partial_gradients:
        yield "    for axis, names in PARTIAL_GRADIENTS.items():"
        yield "        for stage in rank.stages.values():"
        yield "            sum_gradients(matching(stage, names), rank.mesh.get_group(axis))"
    if facts.data_axis and not plan.zero_stage:
        yield "    for stage in rank.stages.values():"
        yield f'        sum_gradients(stage.parameters(), rank.mesh.get_group("{facts.data_axis}"))'
    if facts.ties:
        yield "    for parameter, group in rank.tied:"
        yield "        sum_gradients([parameter], group)"
    for axis in facts.loss_axes:
        yield f'    dist.all_reduce(total, group=rank.mesh.get_group("{axis}"))'
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


def replica_part(batch: dict[str, Tensor], rank: Rank, device: torch.device) -> dict[str, Tensor]:
    """The samples of this rank's data-parallel replica."""
    coordinate = dict(zip(MESH, rank.mesh.get_coordinate() or [], strict=True))
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
    rank = build(device, weights)
    optimizer = torch.optim.AdamW(dict.fromkeys(rank.parameters().values()), lr=arguments.learning_rate)
    for step in range(arguments.steps):
        began = time.perf_counter()
        if data is None:
            batch = synthetic_batch(step)
        else:
            first = step * GLOBAL_BATCH % max(1, len(next(iter(data.values()))) - GLOBAL_BATCH + 1)
            batch = {name: tensor[first : first + GLOBAL_BATCH] for name, tensor in data.items()}
        loss = forward_backward(rank, replica_part(batch, rank, device))
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}  loss {loss.item():.6f}  {GLOBAL_BATCH / seconds:.1f} samples/s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()'''.splitlines()
