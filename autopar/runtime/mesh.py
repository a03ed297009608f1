"""The process group, the device mesh, and where in it this rank is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.runtime.drawing import seed_ranks
from autopar.runtime.hashing import hashed


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


JOINT = {
    "dp": ("dp_replicate", "dp_shard", "ep"),
    "dp_cp": ("dp_replicate", "dp_shard", "ep", "cp"),
    "shard": ("dp_shard", "ep", "cp"),
    "expert_dp": ("dp_replicate", "dp_shard", "cp"),
    "expert_shard": ("dp_shard", "cp"),
}
"""What ranks along several axes are together: replicas; replicas with ranks of a context axis, which compute
gradients of the same parameters from other tokens; those that ZeRO shards over; and the last two of experts,
of which the ranks along `ep` have different ones."""


def joint(axes: Collection[str], name: str) -> str | None:
    """The axis of a mesh with these `axes` that stands for one of `JOINT`: the only one that it has of them,
    or the first joint axis with the same ranks. None where it has none of them."""
    present = {key: tuple(axis for axis in axes if axis in parts) for key, parts in JOINT.items()}
    if len(present[name]) < 2:
        return present[name][0] if present[name] else None
    return next(key for key, parts in present.items() if parts == present[name])


def make_mesh(device_type: str, axes: Mapping[str, int]) -> DeviceMesh:
    """The device mesh of a program, outermost axis first, with the joint axes of `JOINT`."""
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    for name in JOINT:
        if joint(axes, name) == name:
            joined_mesh(mesh, name)
    return mesh


def joined_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The mesh of the ranks along all axes of `JOINT[name]` that there are: made once, then found again."""
    axes = mesh.mesh_dim_names or ()
    part = mesh[tuple(axis for axis in axes if axis in JOINT[name])]
    return part if part.ndim == 1 else part._flatten(joint(axes, name))


def seed_step(step: int, mesh: DeviceMesh, options: argparse.Namespace) -> None:
    """Random numbers of a step, of dropout above all: after a restart the same again, and the same on the
    ranks of a tensor axis, which are at the same layers and samples (`drawn_apart` where they have different
    parts; `drawn_together` where ranks of other axes have the same)."""
    stage, _ = _place(mesh, ("pp",))
    place, _ = _place(mesh, JOINT["dp_cp"])
    seed_ranks(hashed(f"{options.seed} {step} {stage}"), place)


def replica(mesh: DeviceMesh) -> tuple[int, int]:
    """The number of this rank's data-parallel replica, and how many there are."""
    return _place(mesh, JOINT["dp"])


def _place(mesh: DeviceMesh, axes: Sequence[str]) -> tuple[int, int]:
    """The number of this rank among those along some axes, and how many there are."""
    number, count = 0, 1
    for axis in mesh.mesh_dim_names or ():
        if axis in axes:
            number, count = number * mesh[axis].size() + mesh.get_local_rank(axis), count * mesh[axis].size()
    return number, count


def replica_part(batch: Mapping[str, Tensor], mesh: DeviceMesh, device: torch.device) -> dict[str, Tensor]:
    """The samples of a global batch that this rank's replica takes."""
    number, count = replica(mesh)
    return {name: rows.chunk(count)[number].to(device) for name, rows in batch.items()}
