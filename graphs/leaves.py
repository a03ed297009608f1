"""The tensors that a graph starts from: parameters and buffers of a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from graphs.ir import Buffer, ModuleInfo, OpGraph, Parameter, Tensor


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory behind it, so neither meta nor fake."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def parameters_of(model: nn.Module) -> tuple[Parameter, ...]:
    """Every parameter once, in the order of `named_parameters()`, with the other paths of tied ones."""
    first: dict[int, str] = {}
    others: dict[str, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        leader = first.setdefault(id(parameter), path)
        others.setdefault(leader, [])
        if path != leader:
            others[leader].append(path)
    return tuple(Parameter(path, path, tuple(aliases)) for path, aliases in others.items())


def buffers_of(model: nn.Module) -> tuple[Buffer, ...]:
    """Every buffer, those in the state dict marked persistent; the value is None where the model has none."""
    found = []
    for prefix, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None:
                path = f"{prefix}.{name}" if prefix else name
                persistent = name not in module._non_persistent_buffers_set
                found.append(Buffer(path, path, persistent, value.detach() if has_values(value) else None))
    return tuple(found)


def modules_of(model: nn.Module) -> dict[str, ModuleInfo]:
    """Every module by its path."""
    return {
        path: ModuleInfo(path, type(module).__name__, type(module).__module__)
        for path, module in model.named_modules()
    }


def with_leaves_of(graph: OpGraph, model: nn.Module) -> OpGraph:
    """The graph with all parameters and modules of a model, and those of its buffers that an op reads.

    Buffers of the graph that the model does not have (constants of its code) stay behind the model's own.
    """
    read = {name for op in graph.ops for name in op.inputs} | set(graph.outputs)
    own = {buffer.tensor: buffer for buffer in buffers_of(model)}
    constants = tuple(buffer for buffer in graph.buffers if buffer.tensor not in own)
    buffers = tuple(buffer for buffer in (*own.values(), *constants) if buffer.tensor in read)
    parameters, values = parameters_of(model), dict(model.named_parameters())
    tensors = {name: graph.tensors[name] for name in graph.inputs}
    tensors |= {item.tensor: _leaf(item.tensor, values[item.name]) for item in parameters}
    tensors |= {
        item.tensor: _leaf(item.tensor, model.get_buffer(item.name)) for item in buffers if item.tensor in own
    }
    tensors |= {item.tensor: graph.tensors[item.tensor] for item in buffers if item.tensor not in own}
    tensors |= {name: graph.tensors[name] for op in graph.ops for name in op.outputs}
    return replace(graph, tensors=tensors, parameters=parameters, buffers=buffers, modules=modules_of(model))


def _leaf(name: str, value: torch.Tensor) -> Tensor:
    return Tensor(name, tuple(value.shape), value.dtype, value.requires_grad, name)
