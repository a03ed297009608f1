"""Batch norms of programs: the same values and running statistics as torch's, and names that are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.errors import RewriteError
from autopar.op_kinds import short_name
from autopar.placements import Shard
from autopar.plan import Parallelism
from autopar.rewrite.program import rewrite
from autopar.runtime.batch_norm import BatchNorm
from autopar.strategies import strategies
from graphs import capture
from tests.autopar.random_plans import plan_of, random_plan


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


class Slimmed(Normed):
    """A batch norm whose weight has a penalty (arXiv:1708.06519), which reads it whole."""

    def __init__(self) -> None:
        super().__init__(keeps=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm.weight.abs().sum()


def test_parameters_that_are_split_otherwise_than_the_channels_have_their_own_sizes() -> None:
    captured = capture(Slimmed(), lambda batch: {"x": torch.randn(batch, 3, 8, 8)})
    graph = captured.at(2)
    keys = {op.name: "replicate" for op in graph.ops}
    norm = next(op for op in graph.ops if short_name(op) == "batch_norm")
    keys[norm.name] = next(
        each.key for each in strategies(norm, graph, 2, {}) if each.operands[0].value == Shard(1)
    )
    plan = plan_of(captured.graph, Parallelism(tp=2, microbatch_size=2), {"tp": keys})
    source = rewrite(captured, plan).source
    assert "self.norm = BatchNorm(4 // TP, eps=1e-05, momentum=0.1, num_weights=4)" in source
    assert '"norm.bias": {"tp": Split(0)}' in source
    assert '"norm.weight"' not in source.partition("PARTIAL_GRADIENTS")[0].rpartition("PLACEMENTS")[2]
    ours = BatchNorm(2, eps=1e-5, momentum=0.1, num_weights=4)
    assert {name: tuple(each.shape) for name, each in ours.state_dict().items()} == {
        "weight": (4,),
        "bias": (2,),
        "running_mean": (2,),
        "running_var": (2,),
        "num_batches_tracked": (),
    }
