"""Models of two to five blocks, and a space small enough to price every plan in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, product
from math import comb, prod

import torch
from torch import Tensor, nn

import graphs
from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.local_programs import Program
from autopar.search.planner import Planner
from autopar.search.programs import MEMORY_PRICES
from graphs import Capture
from tests.autopar.small_models import Layer

VOCABULARY = 512


class SelfAttention(nn.Module):
    """Causal attention with a residual."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in self.qkv)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """A mixture of experts that every row visits in a fixed order: as many rows for each."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Parameter(torch.empty(experts, width, 2 * width))
        self.down = nn.Parameter(torch.empty(experts, 2 * width, width))
        self.ends = torch.arange(1, experts + 1, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, 1)
        ends = self.ends * (rows.shape[0] // len(self.ends))
        hidden = nn.functional.relu(nn.functional.grouped_mm(rows, self.up, offs=ends))
        return x + nn.functional.grouped_mm(hidden, self.down, offs=ends).view_as(x)


class Language(nn.Module):
    """An embedding, blocks, and a head with its loss; with `skip` the head also sees the first block's
    input."""

    def __init__(self, block: Callable[[int], nn.Module], width: int, depth: int, *, skip: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(block(width) for _ in range(depth))
        self.head = nn.Linear(2 * width if skip else width, VOCABULARY, bias=False)
        self.skip = skip

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        first = x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(torch.cat([x, first], -1) if self.skip else x)
        return {"loss": nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())}


class Images(nn.Module):
    """Convolutions with a residual each, all of one size, and a classifier."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return {"loss": nn.functional.cross_entropy(self.head(x.mean((2, 3))), labels)}


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": Layer, "skip": Layer, "attention": SelfAttention, "experts": Experts,
}  # fmt: skip
KINDS = (*BLOCKS, "conv")


@cache
def tiny(kind: str, width: int, depth: int, length: int) -> Capture:
    """The capture of a tiny model of one of `KINDS`, for sequences (or images) of that length."""
    if kind == "conv":
        model: nn.Module = Images(width, depth)
    else:
        model = Language(BLOCKS[kind], width, depth, skip=kind == "skip")
    model = model.bfloat16() if kind == "experts" else model

    def inputs(batch: int) -> dict[str, Tensor]:
        if kind == "conv":
            side = length // 8
            return {
                "images": torch.zeros(batch, 3, side, side),
                "labels": torch.zeros(batch, dtype=torch.long),
            }
        return {name: torch.zeros(batch, length, dtype=torch.long) for name in ("tokens", "labels")}

    return graphs.capture(model, inputs, name=kind)


def programs_of(planner: Planner, p: Parallelism) -> Iterator[Program]:
    """The programs that a way to run a layout may have."""
    for price in range(len(MEMORY_PRICES) if p.tp > 1 else 1):
        yield planner.programs.program(p, price)


def all_plans(planner: Planner) -> Iterator[Evaluated]:
    """Everything in the space, priced: every candidate with every program, all cuts into stages and all
    variants of every unit."""
    for p in planner.candidates():
        for program in programs_of(planner, p):
            table = planner.layer.table(program)
            for cuts in all_cuts(planner, program, p):
                for choices in product(*table.options):
                    yield planner.evaluator.evaluate(program.chain, p, cuts, choices)


def num_plans(planner: Planner) -> int:
    """How many those are."""
    found = 0
    for p in planner.candidates():
        program = planner.programs.program(p)
        options = planner.layer.table(program).options
        levels = len(MEMORY_PRICES) if p.tp > 1 else 1
        cuts = comb(len(options) - 1, p.pp - 1) if p.num_virtual_stages == 1 else 1
        found += levels * cuts * prod(map(len, options))
    return found


def all_cuts(planner: Planner, program: Program, p: Parallelism) -> Iterator[tuple[int, ...]]:
    """All cuts into one stage a rank; stages of schedules with several are as even as they can be."""
    num_units = len(program.chain.units)
    device = planner.programs.device(p.microbatch_size, p.ep)
    if p.num_virtual_stages == 1:
        yield from ((0, *cuts) for cuts in combinations(range(1, num_units), p.pp - 1))
    elif (even := planner.layer.even(device).cuts(p.pp * p.num_virtual_stages)) is not None:
        yield even
