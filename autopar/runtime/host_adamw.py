"""AdamW in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar.runtime.tensors import local_part, widened


class HostAdamW:
    """AdamW on copies of the parameters in the host's memory, where its states are too (ZeRO-Offload,
    arXiv:2101.06840). Copies have single precision at least: of narrower parameters they are master copies.

    A step fetches all gradients, then updates one parameter after the other, each of which goes back to its
    device while the host works on the next.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: float) -> None:
        self._hosted = [_Hosted.of(parameter, settings) for parameter in parameters]
        self.masters = {each.parameter: each.copy for each in self._hosted}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The settings, one group for each parameter: what a schedule of learning rates changes."""
        return [group for each in self._hosted for group in each.optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The states of every copy."""
        return {each.copy: each.optimizer.state[each.copy] for each in self._hosted}

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        fetched = [(each, each.fetch()) for each in self._hosted if each.parameter.grad is not None]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for each, gradient in fetched:
            each.copy.grad = gradient.to(each.copy.dtype)
            each.optimizer.step()
            each.copy.grad = None
            each.buffer.copy_(each.copy)
            local_part(each.parameter).copy_(each.buffer, non_blocking=True)

    def zero_grad(self) -> None:
        """Begin anew, without gradients."""
        for each in self._hosted:
            each.parameter.grad = None


@dataclass(frozen=True)
class _Hosted:
    """A parameter, its copy in the host's memory with an optimizer of its own, and the buffer through which
    what becomes of it travels back."""

    parameter: nn.Parameter
    copy: Tensor
    buffer: Tensor
    optimizer: torch.optim.AdamW

    @staticmethod
    def of(parameter: nn.Parameter, settings: Mapping[str, Any]) -> _Hosted:
        local = local_part(parameter.detach())
        copy = local.to("cpu", widened(local.dtype), copy=True)
        buffer = torch.empty_like(local, device="cpu", pin_memory=torch.cuda.is_available())
        return _Hosted(parameter, copy, buffer, torch.optim.AdamW([copy], **settings))

    def fetch(self) -> Tensor:
        """The gradient in the host's memory, in its own dtype, as soon as the device is through with it."""
        assert self.parameter.grad is not None
        return local_part(self.parameter.grad).to("cpu", non_blocking=True)
