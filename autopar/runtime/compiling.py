"""What `torch.compile` leaves alone, and what it takes as an op of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, which compiled code around it calls as it is."""
    return cast(Function, torch.compiler.disable(function))


def opaque(like: Callable[..., Tensor]) -> Callable[[Function], Function]:
    """Makes a function an op in namespace `autopar` that compiled code calls without a look inside; `like`
    makes an empty tensor of the shape and dtype that it returns for the same arguments. Other code calls the
    function itself, so that whatever counts ops sees those in it."""

    def made(function: Function) -> Function:
        op = torch.library.custom_op(f"autopar::{function.__name__.strip('_')}", function, mutates_args=())
        op.register_fake(like)

        @wraps(function)
        def called(*args: Any) -> Any:
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        return cast(Function, called)

    return made


def compile_stages(stages: Iterable[nn.Module], **options: Any) -> None:
    """Run stages through `torch.compile`, which takes `options`. Sizes that are known only when a stage runs,
    as of the rows that experts get, do not end a graph."""
    import torch._dynamo.config as config  # slow, and mostly not wanted

    config.capture_dynamic_output_shape_ops = True
    for stage in stages:
        stage.compile(**options)
