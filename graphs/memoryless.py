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

    # Torch works out what it would draw for a meta tensor in Python, the longest part of building a model.
    normal = torch.Tensor.normal_

    def normal_in_memory(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else normal(tensor, *args, **kwargs)

    with (
        patch.object(nn.Module, "register_parameter", register_on_meta),
        patch.object(torch.Tensor, "normal_", normal_in_memory),
    ):
        return factory()
