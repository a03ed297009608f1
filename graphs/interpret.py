"""Run an operator graph with torch, one op after the other, on real or fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphs.ir import Op, OpGraph, map_refs


def fake_tensors() -> FakeTensorMode:
    """A mode of fake tensors with the settings of torch.export's.

    torch remembers by these settings what a call returns, so nothing that an export has called is worked out
    again. Where a size or a number depends on the values of tensors, it is a symbol.
    """
    return FakeTensorMode(shape_env=ShapeEnv(trace_asserts=True))


def resolve(target: str) -> OpOverload:
    """The torch operator that a target such as `aten.linear.default` names.

    Raises `AttributeError` where no library of that name is loaded.
    """
    namespace, name, overload = target.split(".")
    packet = getattr(getattr(torch.ops, namespace), name)
    return cast(OpOverload, getattr(packet, overload))


def call(op: Op, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The results of one op by tensor name; results that autograd alone reads (None) are left out."""
    args = map_refs(op.args, values.__getitem__)
    kwargs: dict[str, Any] = map_refs(dict(op.kwargs), values.__getitem__)
    results = resolve(op.target)(*args, **kwargs)
    if isinstance(results, torch.Tensor):
        results = (results,)
    return {name: result for name, result in zip(op.outputs, results, strict=True) if result is not None}


def run(graph: OpGraph, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of the graph, by name.

    `values` gives the inputs, the parameters and the buffers by tensor name; a buffer with a recorded value
    need not be given. Gradients flow as in any torch program. Raises `KeyError` for a tensor that is not
    given.
    """
    known = {buffer.tensor: buffer.value for buffer in graph.buffers if buffer.value is not None}
    known.update(values)
    for op in graph.ops:
        known.update(call(op, known))
    return known
