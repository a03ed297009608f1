"""ZeRO through `fully_shard`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from autopar.runtime.layout import Placements, matches, placements_of
from autopar.runtime.mesh import joined_mesh


def sharding_mesh(mesh: DeviceMesh, name: str = "shard") -> DeviceMesh:
    """The axes over which ZeRO works: shards, and outside of them replicas."""
    shards = joined_mesh(mesh, name)
    if "dp_replicate" not in (mesh.mesh_dim_names or ()):
        return shards
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards])


def experts_of(stage: nn.Module, placements: Placements) -> list[nn.Parameter]:
    """The parameters of a stage of which the ranks along `ep` hold different experts."""
    named = stage.named_parameters()
    return [parameter for name, parameter in named if "ep" in placements_of(name, placements)]


def shard_parameters(
    stage: nn.Module,
    blocks: Sequence[str],
    mesh: DeviceMesh,
    zero_stage: int,
    precision: MixedPrecision | None = None,
    experts: Collection[nn.Parameter] = (),
) -> None:
    """ZeRO through `fully_shard`: each block (by pattern of its path) by itself, what is left with the stage.

    Gradients are summed, not averaged: the loss of each rank is already divided by the count of all. Stage 3
    frees gathered parameters of a block after its forward, and what is left, where the backward begins, after
    the backward; 1 and 2 free nothing before it (`hold_until_last`). With `precision` the shards are master
    copies. Scalars and parameters of an unusual dtype, which `fully_shard` does not take, stay whole
    (`unsharded_parameters`). Modules of `experts` are sharded by themselves, over the ranks that hold the
    same ones.
    """
    units = [module for name, module in stage.named_modules() if any(matches(name, each) for each in blocks)]
    dtypes: Counter[torch.dtype] = Counter()
    for parameter in stage.parameters():
        dtypes[parameter.dtype] += parameter.numel()
    usual = dtypes.most_common(1)[0][0] if dtypes else None
    left = {each for each in stage.parameters() if each.ndim == 0 or each.dtype != usual}
    policy = MixedPrecisionPolicy()
    if precision is not None:
        policy = precision.widen(each for each in stage.parameters() if each not in left)
    options: dict[str, Any] = {"mp_policy": policy, "ignored_params": left}
    apart = set(experts)
    holders = [each for each in stage.modules() if not apart.isdisjoint(each.parameters(recurse=False))]
    for module in (*holders, *units, stage):
        over = sharding_mesh(mesh, "expert_shard" if module in holders else "shard")
        frees = None if zero_stage == 3 and module is stage else zero_stage == 3  # None: where it is no root
        sharded = fully_shard(module, mesh=over, reshard_after_forward=frees, **options)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class MixedPrecision:
    """Parameters are stored and updated in `master`, read in `compute`; gradients are reduced in
    `gradient`."""

    compute: torch.dtype
    master: torch.dtype
    gradient: torch.dtype

    def widen(self, parameters: Iterable[nn.Parameter]) -> MixedPrecisionPolicy:
        """Give parameters, still on the meta device, the dtype in which they are stored."""
        for parameter in parameters:
            parameter.data = parameter.data.to(self.master)
        return MixedPrecisionPolicy(self.compute, self.gradient, cast_forward_inputs=False)


def unsharded_parameters(stage: nn.Module) -> list[nn.Parameter]:
    """The parameters of a stage that `fully_shard` left whole, whose gradients ranks sum themselves."""
    return [parameter for parameter in stage.parameters() if not isinstance(parameter, DTensor)]


def hold_until_last(stage: nn.Module, is_last: bool, zero_stage: int) -> None:
    """Before a microbatch under ZeRO-1 or 2: parameters stay gathered until the backward of the last one of a
    step, and under ZeRO-1 gradients are only added up until then."""
    assert isinstance(stage, FSDPModule), "only a stage whose parameters are sharded gathers them"
    stage.set_reshard_after_backward(is_last)
    if zero_stage == 1:
        stage.set_requires_gradient_sync(is_last)
