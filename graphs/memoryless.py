"""Build a model of any size without memory for its parameters."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

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

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        return factory()
