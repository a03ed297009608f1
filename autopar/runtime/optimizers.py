"""Optimizers on a rank's own memory, with wide copies of narrow parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autopar.runtime.tensors import local_part, widened


class Optimizer(Protocol):
    """What training asks of an optimizer, torch's own or one of these. One that updates copies of parameters
    has them in `masters`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[Tensor, Any]: ...

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


def updated(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimizer updates, by the name of the parameter: the parameter itself, or its master copy."""
    masters: Mapping[nn.Parameter, Tensor] = getattr(optimizer, "masters", {})
    return {name: masters.get(each, each) for name, each in parameters.items()}


class LocalAdamW(torch.optim.AdamW):
    """AdamW on this rank's own memory: plain tensors, which torch updates many at a time, where DTensors go
    one by one. `masters` has what it updates of each parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        masters = {each: local_part(each.detach()).to(self.master_dtype(each.dtype)) for each in parameters}
        super().__init__(masters.values(), fused=torch.cuda.is_available(), **settings)
        self.masters = masters

    def master_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter of `dtype` is updated."""
        return dtype

    @torch.no_grad()
    # torch's takes a closure that computes the loss again, which a pipeline cannot.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for parameter, master in self.masters.items():
            if parameter.dtype == master.dtype:
                # `fully_shard` moves uneven shards when it first runs.
                master.data = local_part(parameter).data
            master.grad = None if parameter.grad is None else local_part(parameter.grad).to(master.dtype)
        super().step()
        for parameter, master in self.masters.items():
            master.grad = None
            if parameter.dtype != master.dtype:
                local_part(parameter).copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin anew, without gradients."""
        for parameter in self.masters:
            parameter.grad = None


class MasterAdamW(LocalAdamW):
    """AdamW on copies of narrow parameters in single precision (arXiv:1710.03740): updates that the
    parameters, which products read, would round away add up in them."""

    def master_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return widened(dtype)
