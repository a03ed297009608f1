"""Build a model of any size without memory for its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from graphs.uncollected import uncollected


@uncollected()
def build_without_memory(factory: Callable[[], nn.Module]) -> nn.Module:
    """The module that `factory` builds, with every parameter on the meta device.

    A parameter moves to meta as soon as a module registers it, before anything initialises it, so at most one
    of them has memory at a time. Ties are kept. Buffers are real and have their values.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with (
        patch.object(nn.Module, "register_parameter", register_on_meta),
        patch.object(torch.Tensor, "normal_", _in_memory(torch.Tensor.normal_)),
        patch.object(torch.Tensor, "uniform_", _in_memory(torch.Tensor.uniform_)),
    ):
        return factory()


def _in_memory(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A way to draw numbers that leaves meta tensors alone: torch works out in Python what it would draw for
    them, the longest part of building a model."""

    def drawn(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

    return drawn
