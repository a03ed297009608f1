"""The norm of the whole gradient, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.runtime.layout import Placements, placements_of
from autopar.runtime.tensors import local_part, widened


@torch.no_grad()
def gradient_norm(
    stages: Iterable[nn.Module],
    mesh: DeviceMesh,
    placements: Placements,
    further: Collection[nn.Parameter] = (),
) -> Tensor:
    """The norm of the gradient of the whole model, on every rank: each element counts once, however many
    ranks and stages hold it. `further` are copies of parameters that are counted elsewhere."""
    held: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None and parameter not in further:
                num_parts = _num_parts(name, parameter.grad, mesh, placements)
                held.setdefault((num_parts, parameter.grad.dtype), []).append(local_part(parameter.grad))
    num_holders = mesh.size() // (mesh["pp"].size() if "pp" in (mesh.mesh_dim_names or ()) else 1)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for (num_parts, dtype), gradients in held.items():
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=widened(dtype)))
        total += norms.double().square().sum() * num_parts / num_holders
    dist.all_reduce(total)
    return total.sqrt()


def _num_parts(name: str, gradient: Tensor, mesh: DeviceMesh, placements: Placements) -> int:
    """How many different parts of a gradient the ranks of a stage hold."""
    parts = [mesh.get_group(axis).size() for axis in placements_of(name, placements)]
    if isinstance(gradient, DTensor):
        shards = enumerate(gradient.placements)
        parts += [gradient.device_mesh.size(dim) for dim, placement in shards if placement.is_shard()]
    return math.prod(parts)


@torch.no_grad()
def clip_gradients(
    stages: Sequence[nn.Module],
    largest_norm: float,
    mesh: DeviceMesh,
    placements: Placements,
    further: Collection[nn.Parameter] = (),
) -> Tensor:
    """Scale all gradients such that together they have at most the norm `largest_norm`.

    Returns the norm that they had, on every rank; as `torch.nn.utils.clip_grad_norm_` of the whole model.
    """
    norm = gradient_norm(stages, mesh, placements, further)
    if largest_norm == math.inf:
        return norm
    factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in {each for stage in stages for each in stage.parameters()}:
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(factor)
    return norm
