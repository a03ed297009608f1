"""Captures of small models in double precision, with the values of their tensors."""

from __future__ import annotations

from functools import cache

import torch

import graphs
from graphs import Capture
from tests.models import case


@cache
def captured(name: str) -> tuple[Capture, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A capture in double precision, its parameters and buffers, and a batch of four, by tensor name."""
    torch.manual_seed(0)
    model_case = case(name)
    model = model_case.build().double()

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        given = model_case.inputs(batch)
        return {key: each.double() if each.is_floating_point() else each for key, each in given.items()}

    capture = graphs.capture(model, inputs, name=name)
    named = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, torch.Tensor] = {
        parameter.tensor: named[parameter.name] for parameter in capture.graph.parameters
    }
    weights |= {buffer.tensor: buffer.value for buffer in capture.graph.buffers if buffer.value is not None}
    return capture, weights, inputs(4)
