"""What a parallel program written by autopar needs besides torch. Saved beside the program; depends on torch
alone.

Programs run on local shards with plain autograd. A tensor has a state on each mesh axis: how its value lies
on the ranks, and how its gradient does. `S(d)` is a slice of dimension d (value and gradient), `R` the whole
value, `P` a term of a sum. Each function below changes the state forward and does the conjugate change
backward:

    all_gather             S(d) -> R, gradient P     all_gather      | reduce_scatter
    all_gather_replicated  S(d) -> R, gradient R     all_gather      | slice
    shard                  R, gradient R -> S(d)     slice           | all_gather
    shard_partial          R, gradient P -> S(d)     slice           | zero padding
    copy                   R, gradient R -> P        -               | all_reduce
    all_reduce             P -> R, gradient R        all_reduce      | -
    all_reduce_partial     P -> R, gradient P        all_reduce      | all_reduce
    reduce_scatter         P -> S(d)                 reduce_scatter  | all_gather
    all_to_all             S(i) -> S(j)              all_to_all      | all_to_all
    first_only             R -> P                    zero but on the first rank | -
    first_grad             gradient P -> R           -               | zero but on the first rank
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.pipelining.schedules import _PipelineSchedule as PipelineSchedule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Sections = tuple[int, ...] | None


# --- moving data: no autograd here --------------------------------------------------------------------------


def _parts(size: int, sections: Sections) -> Sequence[int]:
    return (size,) if sections is None else sections


def _gather(x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None) -> Tensor:
    whole: Tensor = funcol.wait_tensor(funcol.all_gather_single(x.contiguous(), dim, group))
    if sections is None:
        return whole
    local = [part // group.size() for part in sections]
    ranks = [piece.split(local, dim) for piece in whole.chunk(group.size(), dim)]
    return torch.cat([piece for part in zip(*ranks, strict=True) for piece in part], dim)


def _slice(x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None) -> Tensor:
    parts = x.split(list(_parts(x.shape[dim], sections)), dim)
    pieces = [part.chunk(group.size(), dim)[group.rank()] for part in parts]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].contiguous()


def _pad(x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None) -> Tensor:
    """The inverse of `_slice` with zeros where other ranks have their slices."""
    padded = []
    for part in x.split(
        [size // group.size() for size in _parts(x.shape[dim] * group.size(), sections)], dim
    ):
        pieces = [torch.zeros_like(part)] * group.size()
        pieces[group.rank()] = part
        padded.extend(pieces)
    return torch.cat(padded, dim)


def _reduce(x: Tensor, group: ProcessGroup, *_: Any) -> Tensor:
    reduced: Tensor = funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))
    return reduced


def _scatter(x: Tensor, group: ProcessGroup, dim: int, sections: Sections = None) -> Tensor:
    if sections is not None:
        parts = [part.chunk(group.size(), dim) for part in x.split(list(sections), dim)]
        x = torch.cat([piece for rank in zip(*parts, strict=True) for piece in rank], dim)
    scattered: Tensor = funcol.wait_tensor(funcol.reduce_scatter_single(x.contiguous(), "sum", dim, group))
    return scattered


def _exchange(x: Tensor, group: ProcessGroup, source: int, target: int) -> Tensor:
    """From a slice of dimension `source` to a slice of dimension `target`."""
    pieces = torch.cat([piece.unsqueeze(0) for piece in x.chunk(group.size(), target)])
    received = funcol.wait_tensor(funcol.all_to_all_single(pieces.contiguous(), None, None, group))
    return torch.cat(list(received.unbind(0)), source)


def _exchange_back(x: Tensor, group: ProcessGroup, source: int, target: int) -> Tensor:
    return _exchange(x, group, target, source)


def _keep(x: Tensor, *_: Any) -> Tensor:
    return x.view_as(x)


def _first(x: Tensor, group: ProcessGroup, *_: Any) -> Tensor:
    return x.clone() if group.rank() == 0 else torch.zeros_like(x)


# --- changes of state: forward, and its conjugate backward --------------------------------------------------

Move = Callable[..., Tensor]


def _conjugate(forward: Move, backward: Move) -> Callable[..., Tensor]:
    """A differentiable function `(x, group, *dims)` that moves data with `forward`, and gradients with
    `backward`."""

    class Conjugate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, group: ProcessGroup, *dims: Any) -> Tensor:
            ctx.group, ctx.dims = group, dims
            return forward(x, group, *dims)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return backward(gradient, ctx.group, *ctx.dims), None, *(None for _ in ctx.dims)

    return Conjugate.apply


all_gather = _conjugate(_gather, _scatter)
all_gather_replicated = _conjugate(_gather, _slice)
shard = _conjugate(_slice, _gather)
shard_partial = _conjugate(_slice, _pad)
copy = _conjugate(_keep, _reduce)
all_reduce = _conjugate(_reduce, _keep)
all_reduce_partial = _conjugate(_reduce, _reduce)
reduce_scatter = _conjugate(_scatter, _gather)
all_to_all = _conjugate(_exchange, _exchange_back)
first_only = _conjugate(_first, _keep)
first_grad = _conjugate(_keep, _first)


# --- ops that know they are split ---------------------------------------------------------------------------


def embedding(indices: Tensor, weight: Tensor, vocab: ProcessGroup, padding_idx: int = -1) -> Tensor:
    """A lookup in a table whose rows are split over `vocab`. Returns a partial sum: zero for rows of other
    ranks."""
    start = vocab.rank() * weight.shape[0]
    local = indices - start
    mine = (local >= 0) & (local < weight.shape[0])
    padding = padding_idx - start if 0 <= padding_idx - start < weight.shape[0] else None
    found = F.embedding(local.where(mine, 0), weight, padding_idx=padding)
    return found * mine.unsqueeze(-1)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x` `[t, k]`, sorted by expert, times the matrix of their expert in `weight` `[e, k, n]`.

    Expert e has the rows up to `ends[e]`; rows past the last end give zeros.
    """
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        pieces.append(x[start:end] @ weight[expert])
        start = end
    pieces.append(x.new_zeros(x.shape[0] - start, weight.shape[2]))
    return torch.cat(pieces)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    rows: ProcessGroup | None = None,
    classes: ProcessGroup | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of `logits` `[n, c]` with rows split over `rows`, or classes over `classes`, or both.

    Over `rows` the result is partial: this rank's sum, divided by the number of valid targets on all of them.
    Over `classes` it is whole on every rank.
    """
    if classes is None:
        total = F.cross_entropy(
            logits, target, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    else:
        total = _vocab_parallel_sum(logits, target, classes, ignore_index, label_smoothing)
    if reduction == "sum":
        return total
    count = (target != ignore_index).sum()
    return total / (count if rows is None else _reduce(count, rows))


def _vocab_parallel_sum(
    logits: Tensor, target: Tensor, classes: ProcessGroup, ignore_index: int, label_smoothing: float
) -> Tensor:
    highest = funcol.wait_tensor(funcol.all_reduce(logits.detach().amax(-1), "max", classes))
    shifted = (logits - highest.unsqueeze(-1)).to(torch.promote_types(logits.dtype, torch.float32))
    log_normalizer = all_reduce(shifted.exp().sum(-1), classes).log()
    local = target - classes.rank() * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    picked = shifted.gather(-1, local.where(mine, 0).unsqueeze(-1)).squeeze(-1) * mine
    loss = log_normalizer - all_reduce(picked, classes)
    if label_smoothing:
        average = all_reduce(shifted.sum(-1), classes) / (logits.shape[-1] * classes.size())
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_normalizer - average)
    return loss.masked_fill(target == ignore_index, 0).sum().to(logits.dtype)


# --- modules ------------------------------------------------------------------------------------------------


class Parameters(nn.Module):
    """A module that only holds parameters, under the names they have in the original model."""

    def __init__(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))


# --- parameters: from and to the original model's -----------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A parameter is split along `dim`; with `sections`, every one of these parts of the dimension is."""

    dim: int
    sections: Sections = None


Placements = Mapping[str, Mapping[str, Split]]
"""Pattern of parameter names -> mesh axis -> how it is split there. What no pattern matches is replicated."""


def _matches(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern` with a number for every `*`."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def placements_of(name: str, placements: Placements) -> Mapping[str, Split]:
    """How the parameter `name` is split."""
    return next((split for pattern, split in placements.items() if _matches(name, pattern)), {})


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory on `device` for the parameters of a model that was built on the meta device.

    Tied parameters stay tied; buffers, which are never built on meta, keep their values.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                fresh = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def load(model: nn.Module, state: Mapping[str, Tensor], mesh: DeviceMesh, placements: Placements) -> None:
    """Fill the parameters and buffers of a rank's model with its part of the original model's `state_dict`.

    Raises ValueError where `state` is of another model.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in state:
            near = difflib.get_close_matches(name, state, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(
                f"the weights have no {name!r}{hint}. Pass the state_dict() of the model that was planned"
            )
        _fill(name, tensor, state[name], mesh, placements)


def initialize(model: nn.Module, mesh: DeviceMesh, placements: Placements, seed: int = 0) -> None:
    """Fresh parameters, the same on any mesh: matrices normal with deviation 0.02, vectors 1, biases 0.

    Buffers keep the values they were built with.
    """
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        for axis, split in placements_of(name, placements).items():
            shape[split.dim] *= mesh.get_group(axis).size()
        if len(shape) > 1:
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            whole = torch.randn(shape, generator=generator) * 0.02
        else:
            whole = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        _fill(name, parameter, whole, mesh, placements)


def _fill(name: str, tensor: Tensor, whole: Tensor, mesh: DeviceMesh, placements: Placements) -> None:
    """Give a tensor this rank's part of the whole value."""
    for axis, split in placements_of(name, placements).items():
        whole = _slice(whole, mesh.get_group(axis), split.dim, split.sections)
    if whole.shape != tensor.shape:
        raise ValueError(
            f"{name}: this rank's part of the weights has the shape {tuple(whole.shape)}, the program's "
            f"parameter {tuple(tensor.shape)}. Pass the state_dict() of the model that the plan was made for"
        )
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            on_device = whole.to(tensor.device)
            part = distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(part.to_local())
        else:
            tensor.copy_(whole)


def gather(tensors: Mapping[str, Tensor], mesh: DeviceMesh, placements: Placements) -> dict[str, Tensor]:
    """Whole tensors from every rank's part: of parameters, or of anything laid out like them (gradients)."""
    result = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for axis, split in reversed(list(placements_of(name, placements).items())):
            whole = _gather(whole, mesh.get_group(axis), split.dim, split.sections)
        result[name] = whole.detach()
    if "pp" in (mesh.mesh_dim_names or ()):
        stages: list[dict[str, Tensor]] = [{} for _ in range(mesh.get_group("pp").size())]
        dist.all_gather_object(stages, result, mesh.get_group("pp"))
        result = {name: tensor for stage in stages for name, tensor in stage.items()}
    return result


# --- gradients ----------------------------------------------------------------------------------------------


def sum_gradients(
    parameters: Iterable[nn.Parameter], group: ProcessGroup, bucket_bytes: int = 32 * 2**20
) -> None:
    """Sum gradients over `group`, in flat buckets. Of a parameter under `fully_shard`, its shard's."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if bucket and (
            local.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + local.nbytes > bucket_bytes
        ):
            _sum_bucket(bucket, group)
            bucket = []
        bucket.append(local)
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(bucket: Sequence[Tensor], group: ProcessGroup) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def matching(model: nn.Module, patterns: Iterable[str]) -> list[nn.Parameter]:
    """The parameters whose name matches one of the patterns."""
    patterns = tuple(patterns)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(_matches(name, pattern) for pattern in patterns)
    ]


# --- an optimizer in the host's memory ----------------------------------------------------------------------


class HostAdamW:
    """AdamW on copies of the parameters in the host's memory, where its states are too (ZeRO-Offload,
    arXiv:2101.06840). Copies have single precision at least: of narrower parameters they are master copies.

    A step fetches all gradients, then updates one parameter after the other, each of which goes back to its
    device while the host works on the next.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: float) -> None:
        self._hosted = [_Hosted.of(parameter, settings) for parameter in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        fetched = [(each, each.fetch()) for each in self._hosted if each.parameter.grad is not None]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for each, gradient in fetched:
            each.copy.grad = gradient.to(each.copy.dtype)
            each.optimizer.step()
            each.copy.grad = None
            each.buffer.copy_(each.copy)
            _local(each.parameter).copy_(each.buffer, non_blocking=True)

    def zero_grad(self) -> None:
        for each in self._hosted:
            each.parameter.grad = None


@dataclass(frozen=True)
class _Hosted:
    """A parameter, its copy in the host's memory with an optimizer of its own, and the buffer through which
    both its gradient and what becomes of it travel."""

    parameter: nn.Parameter
    copy: Tensor
    buffer: Tensor
    optimizer: torch.optim.AdamW

    @staticmethod
    def of(parameter: nn.Parameter, settings: Mapping[str, Any]) -> _Hosted:
        local = _local(parameter.detach())
        wide = torch.promote_types(local.dtype, torch.float32)
        copy = local.to("cpu", wide, copy=True)
        buffer = torch.empty_like(local, device="cpu", pin_memory=torch.cuda.is_available())
        return _Hosted(parameter, copy, buffer, torch.optim.AdamW([copy], **settings))

    def fetch(self) -> Tensor:
        """The gradient in the host's memory, as soon as the device is through with it."""
        assert self.parameter.grad is not None
        return self.buffer.copy_(_local(self.parameter.grad), non_blocking=True)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


# --- building and running a program -------------------------------------------------------------------------


def make_mesh(device_type: str, axes: Mapping[str, int]) -> DeviceMesh:
    """The device mesh of a program, outermost axis first; both data axes together are its axis `dp`."""
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    if {"dp_replicate", "dp_shard"} <= set(axes):
        mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return mesh


def shard_parameters(stage: nn.Module, blocks: Sequence[str], mesh: DeviceMesh, zero_stage: int) -> None:
    """ZeRO through `fully_shard`: each block (by pattern of its path) by itself, what is left with the stage.

    Gradients are summed, not averaged: the loss of each rank is already divided by the count of all. Stage 3
    frees gathered parameters after the forward; 1 and 2 keep them until the optimizer has run.
    """
    units = [module for name, module in stage.named_modules() if any(_matches(name, each) for each in blocks)]
    for module in (*units, stage):
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=zero_stage == 3)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def sync_in_backward(stage: nn.Module, enabled: bool) -> None:
    """Whether the backward of a stage under `fully_shard` reduces gradients, or only adds them up."""
    assert isinstance(stage, FSDPModule), "only a stage whose parameters are sharded has gradients to reduce"
    stage.set_requires_gradient_sync(enabled)


def pipeline(
    stages: Mapping[int, nn.Module],
    borders: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]],
    schedule: str,
    num_microbatches: int,
    mesh: DeviceMesh,
    device: torch.device,
) -> PipelineSchedule:
    """The schedule that drives this rank's `stages`, given by their number in the pipeline.

    `borders[i]` are shape and dtype of what stage i receives; the last stage returns the loss.
    """

    def activations(border: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty(shape, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)
            for shape, dtype in border
        )

    for module in stages.values():
        module.register_forward_hook(_contiguous)

    built: list[Any] = [
        PipelineStage(
            module,
            index,
            len(borders) - 1,
            device,
            input_args=activations(borders[index]),
            output_args=activations(borders[index + 1]),
            group=mesh.get_group("pp"),
        )
        for index, module in stages.items()
    ]
    kind = get_schedule_class(schedule)
    options = {"loss_fn": lambda loss, _: loss / num_microbatches, "scale_grads": False}
    several = issubclass(kind, PipelineScheduleMulti)
    made: PipelineSchedule = kind(built if several else built[0], num_microbatches, **options)
    return made


def _contiguous(module: nn.Module, args: object, sent: Tensor | tuple[Tensor, ...]) -> object:
    """What a stage returns, as it can be sent."""
    return sent.contiguous() if isinstance(sent, Tensor) else tuple(each.contiguous() for each in sent)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a forward under `checkpoint`, and around the one that computes it again."""

KINDS = {
    "products": r"aten::(mm|addmm|convolution|_grouped_mm)",
    "batched_products": r"aten::(bmm|baddbmm)",
    "attention": r"aten::_scaled_dot_product\w*",
    "collectives": r"_c10d_functional::(all|reduce)_\w+",
    "received": r"_c10d_functional::\w+",  # what waits for the collective before it, and goes with it
}
"""The ops whose results may be kept; the first pattern that fits counts."""


def checkpointed(block: nn.Module, contexts: Callable[[], Contexts] | None, *args: Tensor) -> Any:
    """What a block makes of `args`; with `contexts` it computes again in the backward what these do not
    keep."""
    if contexts is None:
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def keep_nothing() -> Contexts:
    """Recomputation of everything."""
    return nullcontext(), nullcontext()


def keep(**numbers: Sequence[int]) -> Callable[[], Contexts]:
    """Recomputation of all but some results: of each of `KINDS` the ops with these numbers, counted from 0 as
    a block runs them."""

    def contexts() -> Contexts:
        forward, recomputation = create_selective_checkpoint_contexts(_Kept(numbers))
        return forward, recomputation

    return contexts


class _Kept:
    """Counts the ops of one run of a block."""

    def __init__(self, numbers: Mapping[str, Sequence[int]]) -> None:
        self.numbers = numbers
        self.counts: Counter[tuple[bool, str | None]] = Counter()
        self.is_received = False

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = _kind(op)
        if kind == "received":
            is_kept = self.is_received
        else:
            at = (context.is_recompute, kind)
            is_kept = kind is not None and self.counts[at] in self.numbers.get(kind, ())
            self.counts[at] += 1
            if kind == "collectives":
                self.is_received = is_kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kind(op: Any) -> str | None:
    name = op.name().split(".")[0] if hasattr(op, "name") else str(op)
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), None)


def keep_matmuls() -> Contexts:
    """Selective recomputation: keep the results of matrix products, attention and collectives, compute the
    rest again."""
    forward, recomputation = create_selective_checkpoint_contexts(_keep_matmul)
    return forward, recomputation


def _keep_matmul(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE if _kind(op) is None else CheckpointPolicy.MUST_SAVE


def tied_parameters(
    stages: Mapping[int, nn.Module],
    ties: Sequence[Mapping[int, str]],
    ranks_of_stages: Sequence[int],
    mesh: DeviceMesh,
) -> list[tuple[nn.Parameter, ProcessGroup]]:
    """Parameters of this rank that other stages have copies of, each with the group that adds up their
    gradients.

    A tie gives the path of the parameter in each stage that has it; all copies take the values of the first.
    Every rank must call this: all make each group.
    """
    axis = (mesh.mesh_dim_names or ()).index("pp")
    lines = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist()
    found = []
    for tie in ties:
        for line in lines:
            members = [line[ranks_of_stages[index]] for index in tie]
            group = dist.new_group(members)
            for index, path in tie.items():
                if dist.get_rank() in members and index in stages:
                    parameter = stages[index].get_parameter(path)
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    dist.broadcast(local.detach(), members[0], group)
                    found.append((parameter, group))
    return found


def saved_buffer(name: str) -> Tensor:
    """A buffer of the original model that is too large to be written into the source."""
    path = Path(__file__).with_name("buffers.pt")
    buffers: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return buffers[name]
