"""Rows that a model sorts and puts back: found from the ops, and only where every one of them allows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphs import OpGraph, capture
from tests.models import case

NUM_EXPERTS, WIDTH = 4, 8


class Mixture(nn.Module):
    """One expert for each row; `back` puts the results of the sorted rows where the rows were."""

    def __init__(self, back: Callable[[Tensor, Tensor], Tensor], between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, WIDTH, dtype=torch.bfloat16))
        self.back, self.between = back, between

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        keys, order = torch.sort(expert)
        counts = torch.histc(keys.float(), NUM_EXPERTS, 0, NUM_EXPERTS - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        made = self.between(nn.functional.grouped_mm(self.between(x[order]), self.weight, offs=ends))
        return self.back(made, order).sum()


def by_inverse(rows: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return rows[inverse]


def by_adding(rows: Tensor, order: Tensor) -> Tensor:
    return torch.zeros(rows.shape, dtype=rows.dtype).index_add(0, order, rows)


def by_adding_elsewhere(rows: Tensor, order: Tensor) -> Tensor:
    return torch.zeros(2 * len(rows), WIDTH, dtype=rows.dtype).index_add(0, order, rows)


def not_at_all(rows: Tensor, order: Tensor) -> Tensor:
    return rows * order.unsqueeze(1)


def mixture(back: Callable[[Tensor, Tensor], Tensor], between: Callable[[Tensor], Tensor]) -> OpGraph:
    """The graph of a mixture for batches of eight rows a sample."""

    def inputs(batch: int) -> dict[str, Tensor]:
        rows = 8 * batch
        return {"x": torch.randn(rows, WIDTH, dtype=torch.bfloat16), "expert": torch.arange(rows) % 4}

    return capture(Mixture(back, between), inputs).at(2)


@pytest.mark.parametrize("back", [by_inverse, by_adding])
def test_rows_that_come_back_are_routed(back: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = mixture(back, torch.relu)
    rows = {op.target.split(".")[1]: op.rows for op in graph.ops if op.rows is not None}
    assert rows["sort"] == ("first", "own", "own")
    assert rows["relu"] == ("own", "own")
    assert rows["_grouped_mm"] == ("own", None, "counts", "own")
    last = next(op for op in reversed(graph.ops) if op.rows is not None)
    assert last.rows is not None
    assert last.rows[-1] == "first"


@pytest.mark.parametrize(
    ("back", "between"),
    [
        (not_at_all, torch.relu),
        (by_adding_elsewhere, torch.relu),
        (by_inverse, lambda x: x.softmax(0)),
        (by_inverse, lambda x: x.flip(0)),
        (by_inverse, lambda x: x + x.mean(0)),
    ],
    ids=["never back", "to other rows", "normalized over rows", "reversed", "with the mean of rows"],
)
def test_rows_that_meet_or_do_not_come_back_are_not(
    back: Callable[[Tensor, Tensor], Tensor], between: Callable[[Tensor], Tensor]
) -> None:
    assert all(op.rows is None for op in mixture(back, between).ops)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "deepseekv3"])
def test_models_that_route(name: str) -> None:
    model = case(name)
    graph = capture(model.build(), model.inputs).at(2)
    products = [op for op in graph.ops if "grouped_mm" in op.target]
    assert products
    assert all(op.rows is not None for op in products)
