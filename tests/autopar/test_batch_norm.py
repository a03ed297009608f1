"""Batch norms of programs: the same values and running statistics as torch's, and names that are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.errors import RewriteError
from autopar.plan import Parallelism
from autopar.rewrite.program import rewrite
from autopar.runtime.batch_norm import BatchNorm
from graphs import capture
from tests.autopar.random_plans import random_plan


@pytest.mark.parametrize("again", [False, True])
def test_running_statistics_are_those_of_torch(again: bool) -> None:
    torch.manual_seed(0)
    original, ours = nn.BatchNorm2d(4, momentum=0.3), BatchNorm(4, eps=1e-5, momentum=0.3)
    ours.load_state_dict(original.state_dict())

    for _ in range(3):
        x = torch.randn(5, 4, 3, 3, requires_grad=True)
        expected = original(x)
        found = checkpoint(ours, x, use_reentrant=False) if again else ours(x)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()  # where it is computed again, and not noted again
    for name, buffer in original.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


class Normed(nn.Module):
    """A convolution and a batch norm, which keeps statistics or does not."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=keeps)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.norm(self.conv(x)).square().mean()
        return loss


class OwnStatistics(Normed):
    """The same with statistics that no module of torch's keeps."""

    def __init__(self) -> None:
        super().__init__(keeps=False)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("spread", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.get_buffer("average"), self.get_buffer("spread")
        return F.batch_norm(self.conv(x), *kept, training=True).square().mean()


def source_of(model: nn.Module) -> str:
    captured = capture(model, lambda batch: {"x": torch.randn(batch, 3, 8, 8)})
    return rewrite(captured, random_plan(captured, Parallelism(microbatch_size=2), seed=0)).source


def test_only_statistics_that_the_model_keeps_are_kept() -> None:
    assert "self.norm = BatchNorm(4, eps=1e-05, momentum=0.1)" in source_of(Normed(keeps=True))
    assert "self.norm(F.conv2d(" in source_of(Normed(keeps=True))
    assert "BatchNorm(" not in source_of(Normed(keeps=False))


def test_statistics_under_unknown_names_are_refused() -> None:
    with pytest.raises(
        RewriteError, match=r"batch_norm, module root\) updates running statistics .* use that"
    ):
        source_of(OwnStatistics())
