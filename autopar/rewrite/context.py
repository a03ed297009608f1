"""What every class of one program is printed from, and how it writes sizes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autopar.placements import Shard, State
from autopar.rewrite.mesh import ProgramMesh
from autopar.rewrite.recompute import Recomputing
from graphs.ir import OpGraph


@dataclass(frozen=True)
class ProgramContext:
    """The local graph of a program, and the names of its sizes.

    `states` are the states of all tensors by mesh axis; `batch_coefficient` says, for a tensor, how many
    rows each of its dimensions has per sample (0 where it does not depend on the batch); `axis_names` gives
    the mesh axis behind the axis names of the local graph, and `axis_sizes` its ranks; `mesh` is what they
    are axes of; `batch` is the samples of one rank in a microbatch; `block_paths` are the repeated blocks,
    and `recomputing` says how they are called.
    """

    graph: OpGraph
    states: Mapping[str, Mapping[str, State]]
    batch_coefficient: Mapping[str, tuple[int, ...]]
    axis_names: Mapping[str, str]
    axis_sizes: Mapping[str, int]
    mesh: ProgramMesh
    batch: int
    block_paths: frozenset[str]
    recomputing: Recomputing

    def sizes(self, tensor: str) -> list[str]:
        """The local shape of a tensor as text, with the batch and the axis sizes by name."""
        shape = self.graph.tensors[tensor].shape
        rows = self.batch_coefficient.get(tensor, (0,) * len(shape))
        return [
            self._size(tensor, dim, size, per_sample)
            for dim, (size, per_sample) in enumerate(zip(shape, rows, strict=True))
        ]

    def _size(self, tensor: str, dim: int, size: int, per_sample: int) -> str:
        if per_sample:
            return "BATCH" if per_sample == 1 else f"BATCH * {per_sample}"
        divisors = ""
        for axis, state in self.states.get(tensor, {}).items():
            if isinstance(state.value, Shard) and state.value.dim == dim and axis != "dp":
                divisors += f" // {axis.upper()}"
                size *= self.axis_sizes[axis]
        return f"{size}{divisors}"

    def dtype(self, tensor: str) -> str:
        """The keyword argument that gives a tensor its dtype; nothing for torch's default."""
        dtype = self.graph.tensors[tensor].dtype
        return "" if dtype == torch.float32 else f", dtype={dtype}"


def access(path: str) -> str:
    """Attribute access from `self` along a path whose numbers are keys of a `ModuleDict`:
    `self.layers["0"]`."""
    return "self" + "".join(
        f'["{name}"]' if name.isdigit() else f".{name}" for name in path.split(".") if name
    )


def prefix(path: str) -> str:
    """What the paths of everything inside the module at `path` begin with."""
    return f"{path}." if path else ""


def below(path: str, module: str) -> str:
    """A path relative to the module it is in."""
    return path.removeprefix(prefix(module))
