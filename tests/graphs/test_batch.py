"""Other batch sizes by interpolation: counts agree with those of a graph measured at that size."""

from __future__ import annotations

import pytest

from graphs import capture, measured
from tests.models import case


@pytest.mark.parametrize("name", ["llama", "clip"])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_flops_at_another_batch_are_those_measured_there(name: str, batch: int) -> None:
    """CLIP's loss compares every image with every text: quadratic in the batch."""
    model_case = case(name)
    graph = capture(model_case.build(), model_case.inputs, name=name).at(batch)
    assert [op.flops for op in graph.ops] == [op.flops for op in measured(graph).ops]
