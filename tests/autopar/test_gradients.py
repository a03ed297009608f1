"""Gradients of replicas: which are summed, when, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.runtime.gradients import GradientBuckets

WIDTH, DEPTH = 16, 6
LAYER_BYTES = 4 * WIDTH * WIDTH


@dataclass
class Wire:
    """A network of `num_ranks` ranks that all have the same gradients: doubles stand for sums."""

    num_ranks: int = 2
    sent: list[Tensor] = field(default_factory=list)

    def all_reduce(self, tensor: Tensor, group: object, async_op: bool) -> Wire:
        assert async_op
        self.sent.append(tensor)
        return self

    def wait(self) -> None:
        self.sent[-1 - self.num_waited].mul_(self.num_ranks)
        self.num_waited += 1

    num_waited: int = 0


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    made = Wire()
    monkeypatch.setattr(dist, "all_reduce", made.all_reduce)
    return made


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))


def buckets_of(layers: nn.Module, num_microbatches: int, num_bytes: int = 2 * LAYER_BYTES) -> GradientBuckets:
    group: dist.ProcessGroup = None  # type: ignore[assignment]  # the wire does not ask
    return GradientBuckets(layers.parameters(), group, num_microbatches, num_bytes)


def step(layers: nn.Module, buckets: GradientBuckets, wire: Wire, num_microbatches: int) -> int:
    """Leave summed gradients; returns how many buckets were under way when the backward ended."""
    wire.sent, wire.num_waited = [], 0
    for parameter in layers.parameters():
        parameter.grad = None  # as an optimizer leaves them
    buckets.clear()
    for index in range(num_microbatches):
        layers(torch.full((2, WIDTH), 1.0 + index)).sum().backward()
        if index < num_microbatches - 1:
            assert not wire.sent, "gradients that are not complete"
    started = len(wire.sent)
    buckets.reduce()
    return started


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_buckets_leave_while_the_backward_runs(wire: Wire, num_microbatches: int) -> None:
    layers, plain = model(), model()
    buckets = buckets_of(layers, num_microbatches)
    for index in range(num_microbatches):
        plain(torch.full((2, WIDTH), 1.0 + index)).sum().backward()
    for number in range(3):
        started = step(layers, buckets, wire, num_microbatches)
        assert started == (0 if number == 0 else 3), "the first step only finds out the order"
        for found, wanted in zip(layers.parameters(), plain.parameters(), strict=True):
            assert found.grad is not None
            assert wanted.grad is not None
            torch.testing.assert_close(found.grad, 2 * wanted.grad)
    last = layers.get_parameter(f"{DEPTH - 1}.weight")
    assert last in buckets.buckets[0].views, "what the backward makes first is sent first"
    assert [bucket.flat.nbytes for bucket in buckets.buckets] == [2 * LAYER_BYTES] * 3


def test_what_has_no_gradient_stays_without(wire: Wire) -> None:
    layers = model()
    layers.register_parameter("unused", nn.Parameter(torch.ones(3)))
    layers[0].requires_grad_(False)
    buckets = buckets_of(layers, 1)
    for _ in range(2):
        step(layers, buckets, wire, 1)
        assert layers.get_parameter("unused").grad is None
        assert layers[0].weight.grad is None
        assert layers[1].weight.grad is not None


def test_gradients_of_half_precision_add_up_in_single(wire: Wire) -> None:
    """1 + 256 times 2**-9 is 1.5; in bf16 each of them is rounded away."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    holder = nn.ParameterList([weight])
    buckets = buckets_of(holder, 257)
    for _ in range(2):
        wire.sent, wire.num_waited, weight.grad = [], 0, None
        buckets.clear()
        for index in range(257):
            (weight * (1.0 if index == 0 else 2.0**-9)).sum().backward()
        buckets.reduce()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert weight.grad.item() == 2 * 1.5


def test_gradients_of_several_dtypes_are_sent_apart(wire: Wire) -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64)])
    buckets = buckets_of(layers, 1, 2**20)
    for _ in range(2):
        wire.sent, wire.num_waited = [], 0
        buckets.clear()
        x = torch.ones(1, 2)
        (layers[1](layers[0](x).double())).sum().backward()
        buckets.reduce()
        assert sorted(str(each.dtype) for each in wire.sent) == ["torch.float32", "torch.float64"]
