"""Whole tensors from every rank's part."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.runtime.layout import Placements, placements_of
from autopar.runtime.moves import gathered


def gather(
    tensors: Mapping[str, Tensor],
    mesh: DeviceMesh,
    placements: Placements,
    like: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Whole tensors from every rank's part: of parameters, or of anything laid out like them (gradients).

    A copy of what `fully_shard` holds of a parameter is laid out as the one of this name in `like`.
    """
    result = {}
    for name, tensor in tensors.items():
        source = like.get(name, tensor)
        if isinstance(source, DTensor) and not isinstance(tensor, DTensor):
            local, shape, stride = tensor.to(source.device), source.shape, source.stride()
            tensor = DTensor.from_local(
                local, source.device_mesh, source.placements, shape=shape, stride=stride
            )
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for axis, split in reversed(list(placements_of(name, placements).items())):
            whole = gathered(whole, mesh.get_group(axis), split.dim, split.sections)
        result[name] = whole.detach()
    if "pp" in (mesh.mesh_dim_names or ()):
        stages: list[dict[str, Tensor]] = [{} for _ in range(mesh.get_group("pp").size())]
        dist.all_gather_object(stages, result, mesh.get_group("pp"))
        result = {name: tensor for stage in stages for name, tensor in stage.items()}
    return result
