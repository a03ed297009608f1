"""Small captures and clusters that the search tests share."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

import graphs
import hardware_db
from graphs import Capture
from hardware_db import Cluster


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(nn.Module):
    """An embedding, equal layers, and a head with its loss."""

    def __init__(self, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


@cache
def tower(width: int = 512, depth: int = 6, vocabulary: int = 1024, sequence: int = 256) -> Capture:
    """The captured tower, on meta."""
    with torch.device("meta"):
        model = Tower(width, depth, vocabulary)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(batch, sequence, dtype=torch.long) for name in ("tokens", "labels")}

    return graphs.capture(model, inputs, name="tower")


def cluster(num_devices: int = 4, memory_bytes: float = 16e9, per_node: int = 4) -> Cluster:
    """Devices of our own, so that their memory can be as small as a test needs."""
    levels = [{"name": "links", "devices": min(per_node, num_devices), "bandwidth_bytes_per_s": 100e9,
               "latency_s": 2e-6}]  # fmt: skip
    if num_devices > per_node:
        levels.append(
            {"name": "network", "devices": num_devices, "bandwidth_bytes_per_s": 10e9, "latency_s": 1e-5}
        )
    efficiency = {
        "matmul": 0.5, "attention": 0.5, "memory": 0.5, "launch_overhead_s": 1e-6, "reserved_memory_bytes": 0,
    }  # fmt: skip
    device = {
        "name": "toy",
        "memory_bytes": memory_bytes,
        "memory_bandwidth_bytes_per_s": 1e12,
        "peak_flops_per_s": {"fp32": 50e12, "bf16": 100e12},
        "efficiency": efficiency,
    }
    return hardware_db.parse_cluster({"name": "toys", "device": device, "levels": levels})
