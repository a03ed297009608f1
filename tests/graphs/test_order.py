"""Calls of a module that a model makes in any order are captured in one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphs import OpGraph, capture


class Tables(nn.Module):
    """Makes tables of several kinds, as rotary embeddings do, and may draw random numbers for them."""

    def __init__(self, *, is_random: bool) -> None:
        super().__init__()
        self.is_random = is_random
        self.sliding, self.full = nn.Buffer(torch.ones(8)), nn.Buffer(torch.zeros(8))

    def forward(self, kind: str, x: Tensor) -> Tensor:
        table = torch.cos(getattr(self, kind) * x.mean())
        return table * torch.rand(8) if self.is_random else table


class Kinds(nn.Module):
    """Asks for tables in some order, and reads them in another."""

    def __init__(self, *kinds: str, is_random: bool = False) -> None:
        super().__init__()
        self.kinds = kinds
        self.tables, self.layer = Tables(is_random=is_random), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tables: Mapping[str, Tensor] = {kind: self.tables(kind, x) for kind in self.kinds}
        return (self.layer(x + tables["full"]) * tables["sliding"]).sum()


def captured(model: Kinds) -> OpGraph:
    return capture(model, lambda batch: {"x": torch.ones(batch, 8)}, name="kinds").graph


def test_independent_calls_stand_in_the_order_in_which_they_are_read() -> None:
    one, other = captured(Kinds("sliding", "full")), captured(Kinds("full", "sliding"))
    assert one.ops == other.ops
    assert one.tensors == other.tensors
    first, second = (op for op in one.ops if op.module == "tables" and op.target == "aten.cos.default")
    assert (first.name, second.name) == ("cos", "cos_1")
    read = {name: op for op in one.ops for name in op.inputs}
    assert one.ops.index(read["cos"]) < one.ops.index(read["cos_1"])


def test_calls_that_draw_random_numbers_stay_as_they_are() -> None:
    one, other = (
        captured(Kinds(*kinds, is_random=True)) for kinds in (("sliding", "full"), ("full", "sliding"))
    )
    assert [op.inputs for op in one.ops] != [op.inputs for op in other.ops]
    assert {op.module for op in one.ops} == {"", "tables", "layer"}
