"""Parameters that several stages hold copies of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.tensors import local_part


@dataclass(frozen=True)
class Tied:
    """The copies of one parameter that the stages of a rank hold, and the ranks that hold further ones."""

    copies: tuple[nn.Parameter, ...]
    group: ProcessGroup | None


def tied_parameters(
    stages: Mapping[int, nn.Module],
    ties: Sequence[Mapping[int, str]],
    ranks_of_stages: Sequence[int],
    mesh: DeviceMesh,
) -> list[Tied]:
    """The parameters of this rank that several stages have copies of.

    A tie gives the path of the parameter in each stage that has it; all copies take the values of the first.
    Every rank must call this: all make each group.
    """
    axis = (mesh.mesh_dim_names or ()).index("pp")
    lines = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist()
    found = []
    for tie in ties:
        for line in lines:
            members = list(dict.fromkeys(line[ranks_of_stages[index]] for index in tie))
            group = dist.new_group(members) if len(members) > 1 else None
            if dist.get_rank() in members:
                copies = (stages[index].get_parameter(path) for index, path in tie.items() if index in stages)
                found.append(Tied(tuple(copies), group))
                _share([local_part(each.detach()) for each in found[-1].copies], group, members[0])
    return found


def further_copies(tied: Iterable[Tied]) -> set[nn.Parameter]:
    """Those of this rank's copies that are not the first one of all."""
    return {
        copy
        for each in tied
        for copy in (each.copies[1:] if each.group is None or each.group.rank() == 0 else each.copies)
    }


def sum_tied_gradients(tied: Iterable[Tied]) -> None:
    """Give all copies of a parameter the sum of their gradients."""
    for each in tied:
        gradients = [local_part(copy.grad) for copy in each.copies if copy.grad is not None]
        for gradient in gradients[1:]:
            gradients[0].add_(gradient)
        if gradients:  # frozen parameters have none
            _share(gradients, each.group)


def _share(copies: Sequence[Tensor], group: ProcessGroup | None, source: int | None = None) -> None:
    """Give all copies the first one's value at rank `source`, or its sum over the ranks of `group`."""
    if group is not None and source is None:
        dist.all_reduce(copies[0], group=group)
    elif group is not None:
        dist.broadcast(copies[0], source, group)
    for copy in copies[1:]:
        copy.copy_(copies[0])
