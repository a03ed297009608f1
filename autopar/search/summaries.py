"""What a plan says of its model and of its cluster."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import prod

import torch

from autopar.op_kinds import dtype_name
from autopar.plan import ClusterSummary, ModelSummary
from graphs import Capture, CaptureError
from graphs.ir import OpGraph
from hardware_db import Cluster


def model_summary(capture: Capture) -> ModelSummary:
    graph = capture.graph
    shapes = _sample_shapes(capture)
    return ModelSummary(
        name=graph.name,
        fingerprint=fingerprint(graph),
        num_parameters=graph.num_parameters,
        dtype=dtype_name(main_dtype(graph)),
        input_shapes=shapes,
        tokens_per_sample=tokens_per_sample(capture),
        num_ops=len(graph.ops),
        flops_per_sample=graph.flops / 2,
    )


def cluster_summary(cluster: Cluster, capture: Capture) -> ClusterSummary:
    device = cluster.device
    return ClusterSummary(
        id=cluster.id,
        name=cluster.name,
        device=device.id,
        num_devices=cluster.num_devices,
        devices_per_node=cluster.devices_per_node,
        memory_bytes=device.memory_bytes,
        host_memory_bytes=cluster.host_memory_bytes_per_device,
        peak_flops_per_s=device.peak_flops_per_s(dtype_name(main_dtype(capture.graph))),
        price_usd_per_device_hour=cluster.price_usd_per_device_hour,
    )


def tokens_per_sample(capture: Capture) -> int:
    """Positions of the first integer input of a sample, which are its tokens; 1 for models that read none."""
    graph = capture.graph
    for name in graph.inputs:
        tensor = graph.tensors[name]
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool and len(tensor.shape) > 1:
            return prod(tensor.shape[1:])
    return 1


def main_dtype(graph: OpGraph) -> torch.dtype:
    """The dtype of most parameters."""
    counts: dict[torch.dtype, int] = {}
    for parameter in graph.parameters:
        tensor = graph.tensors[parameter.tensor]
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_elements
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def fingerprint(graph: OpGraph) -> str:
    """SHA-256 of the graph's text: equal for equal models, whatever their weights."""
    digest = hashlib.sha256()
    for tensor in graph.tensors.values():
        digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype} {tensor.requires_grad}\n".encode())
    for op in graph.ops:
        digest.update(f"{op.name} {op.target} {op.args} {sorted(op.kwargs.items())} {op.outputs}\n".encode())
    for parameter in graph.parameters:
        digest.update(f"{parameter.name} {parameter.tensor} {parameter.aliases}\n".encode())
    return digest.hexdigest()


def _sample_shapes(capture: Capture) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs at one sample; at the captured batch of a model that has no other."""
    inputs, other = _inputs_alone(capture.graph), capture.other
    if not isinstance(other, CaptureError):
        inputs = Capture(inputs, _inputs_alone(other)).at(1)
    return {name: tensor.shape for name, tensor in inputs.tensors.items()}


def _inputs_alone(graph: OpGraph) -> OpGraph:
    return replace(graph, tensors={name: graph.tensors[name] for name in graph.inputs}, ops=())
