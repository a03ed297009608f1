"""What a program holds in place of modules of the original model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


class Parameters(nn.Module):
    """A module that only holds parameters, under the names they have in the original model."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))


class Container(nn.ModuleDict):
    """A module that only holds others, under the names or numbers they have in the original model."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __getitem__(self, key: str) -> Any: ...


def saved_tensor(name: str) -> Tensor:
    """A buffer of the original model that is too large to be written into the source, or what a parameter
    begins with."""
    path = Path(__file__).with_name("tensors.pt")
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return tensors[name]
