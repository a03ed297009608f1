"""What a device does by itself: matrix products, memory traffic, attention, and ops that are all overhead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.calibrate.timing import on_fresh_operands, time_call
from hardware_db.profile import AttentionRate, LaunchOverhead, MatmulRate, MemoryRate
from hardware_db.schema import Dtype

TORCH_DTYPES: Final[Mapping[Dtype, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""What can be measured. Products of fp32 run as the process is set up to run them, by default in full."""
ROW_LENGTH = 256
"""Small ops in a row: so many that the ends of the row do not count."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A device to measure, for at most so many seconds each time."""

    device: torch.device
    limit_s: float

    def matmul(self, dtype: Dtype, m: int, n: int, k: int) -> MatmulRate:
        """The forward of a linear layer from k to n features on m tokens."""
        inputs, weight = self._random(dtype, m, k), self._random(dtype, n, k)
        with torch.no_grad():
            timing = time_call(on_fresh_operands(F.linear, inputs, weight), self.limit_s)
        rate = 2 * m * n * k / timing.seconds
        return MatmulRate(dtype=dtype, m=m, n=n, k=k, flops_per_s=rate, spread=timing.spread)

    def memory(self, num_bytes: int) -> MemoryRate:
        """The sum of two tensors into a third: two thirds of `num_bytes` are read, one is written."""
        terms = self._random("fp32", num_bytes // 12), self._random("fp32", num_bytes // 12)
        result = torch.empty_like(terms[0])
        add = on_fresh_operands(lambda a, b, out: torch.add(a, b, out=out), *terms, result)
        timing = time_call(add, self.limit_s)
        moved = 3 * result.nbytes
        return MemoryRate(bytes=moved, bytes_per_s=moved / timing.seconds, spread=timing.spread)

    def attention(
        self, dtype: Dtype, batch: int, heads: int, seq: int, head_dim: int, causal: bool
    ) -> AttentionRate:
        """Fused attention: two products of `[seq, seq, head_dim]` forward, five backward.

        Source of the counts: arXiv:2205.14135.
        """
        shape = (batch, heads, seq, head_dim)
        query, key, value = (self._random(dtype, *shape).requires_grad_() for _ in range(3))
        gradient = self._random(dtype, *shape)

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

        result = forward()

        def backward() -> object:
            return torch.autograd.grad(result, (query, key, value), gradient, retain_graph=True)

        there, back = time_call(forward, self.limit_s), time_call(backward, self.limit_s)
        product_flops = 2 * batch * heads * seq**2 * head_dim / (2 if causal else 1)
        return AttentionRate(
            dtype=dtype,
            batch=batch,
            heads=heads,
            seq=seq,
            head_dim=head_dim,
            causal=causal,
            forward_flops_per_s=2 * product_flops / there.seconds,
            backward_flops_per_s=5 * product_flops / back.seconds,
            spread=max(there.spread, back.spread),
        )

    def launch_overhead(self) -> LaunchOverhead:
        """A row of products of 16 numbers, and its backward."""
        leaf = torch.ones(16, device=self.device, requires_grad=True)
        ones = torch.ones(16, device=self.device)

        def forward() -> Tensor:
            value = leaf
            for _ in range(ROW_LENGTH):
                value = value * ones
            return value

        result = forward()
        there = time_call(forward, self.limit_s)
        back = time_call(lambda: torch.autograd.grad(result, leaf, ones, retain_graph=True), self.limit_s)
        return LaunchOverhead(
            forward_s=there.seconds / ROW_LENGTH,
            backward_s=back.seconds / ROW_LENGTH,
            device_s=self._recorded_s(forward) / ROW_LENGTH if self.device.type == "cuda" else None,
            spread=max(there.spread, back.spread),
        )

    def _recorded_s(self, row: Callable[[], object]) -> float:
        """Seconds of a recorded row, which the device runs without the host."""
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            row()
        return time_call(graph.replay, self.limit_s).seconds

    def _random(self, dtype: Dtype, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=TORCH_DTYPES[dtype], device=self.device)
