"""What ops make a device do: shapes, bytes, FLOPs and launches of kernels under different software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from autopar.kernels import CONJUGATES, NOTHING, KernelMaker, Kernels, Move
from autopar.op_kinds import kind_of
from autopar.traffic import Traffic
from costmodel import Software, Work, software
from graphs.ir import Op, OpGraph, Ref, Tensor
from tests.autopar.graph_builder import GraphBuilder

FLASH = software("flash-2023")
B, S, H, OUT, E = 2, 16, 64, 48, 4
"""Batch, sequence, width, width of what products make, experts."""


def maker(era: Software = FLASH, **settings: Any) -> KernelMaker:
    return KernelMaker(era, {"tp": 4, "ep": 1}, **settings)


def kernels_of(graph: OpGraph, era: Software = FLASH, **settings: Any) -> dict[str, Kernels]:
    found = maker(era, **settings).graph(graph)
    return {op.name: kernels for op, kernels in zip(graph.ops, found, strict=True)}


def shapes(works: Sequence[Work]) -> list[tuple[int, ...]]:
    return [work.shape for work in works if work.kind == "matmul"]


# --- products -----------------------------------------------------------------------------------------------


class Products(nn.Module):
    """One product of each kind, all of their operands with a gradient."""

    ends: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, OUT)
        self.weight = nn.Parameter(torch.empty(H, OUT))
        self.bias = nn.Parameter(torch.empty(OUT))
        self.images = nn.Parameter(torch.empty(B, 3, 8, 8))
        self.conv = nn.Conv2d(3, 8, 5, padding=2)
        self.experts = nn.Parameter(torch.empty(E, H, OUT, dtype=torch.bfloat16))
        self.start = nn.Parameter(torch.empty(H))
        self.register_buffer("ends", torch.arange(1, E + 1, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x + self.start
        rows = x.flatten(0, 1)
        made = [
            self.linear(x),
            torch.mm(rows, self.weight),
            torch.addmm(self.bias, 2 * rows, self.weight),
            torch.bmm(x, (3 * x).transpose(1, 2)),
            torch.nn.functional.grouped_mm(rows.bfloat16(), self.experts, offs=self.ends * (B * S // E)),
            self.conv(self.images),
        ]
        return {"loss": torch.stack([each.float().sum() for each in made]).sum()}


@cache
def products() -> OpGraph:
    with torch.device("meta"):
        model = Products()
    model.ends = torch.arange(1, E + 1, dtype=torch.int32)
    return graphs.capture(model, lambda batch: {"x": torch.zeros(batch, S, H)}, name="products").at(B)


def product(part: str, number: int = 0) -> tuple[Op, Kernels]:
    graph = products()
    op = [op for op in graph.ops if part in op.target][number]
    return op, kernels_of(graph)[op.name]


@pytest.mark.parametrize(
    ("part", "number", "forward", "backward", "weight"),
    [
        ("linear", 0, (1, B * S, OUT, H), [(1, B * S, H, OUT)], [(1, H, OUT, B * S)]),
        ("aten.mm", 0, (1, B * S, OUT, H), [(1, B * S, H, OUT)], [(1, H, OUT, B * S)]),
        ("aten.mm", 1, (1, B * S, OUT, H), [(1, B * S, H, OUT)], [(1, H, OUT, B * S)]),  # addmm
        ("bmm", 0, (B, S, S, H), [(B, S, H, S), (B, H, S, S)], []),
        ("grouped_mm", 0, (E, B * S // E, OUT, H), [(E, B * S // E, H, OUT)], [(E, H, OUT, B * S // E)]),
        ("conv2d", 0, (1, B * 8 * 8, 8, 3 * 25), [], [(1, B * 64, 75, 8), (1, 75, 8, B * 64)]),
    ],
)
def test_a_product_has_one_for_the_gradient_of_each_operand(
    part: str,
    number: int,
    forward: tuple[int, ...],
    backward: list[tuple[int, ...]],
    weight: list[tuple[int, ...]],
) -> None:
    op, kernels = product(part, number)
    assert shapes(kernels.forward) == [forward]
    assert shapes(kernels.backward) == backward
    assert shapes(kernels.weight) == weight
    for work in (*kernels.forward, *kernels.backward, *kernels.weight):
        assert work.flops == op.flops == 2 * prod(work.shape)


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    _, kernels = product("linear")
    touched = 4 * (B * S * H + H * OUT + B * S * OUT)
    assert [work.bytes for work in (*kernels.forward, *kernels.backward, *kernels.weight)] == [touched] * 3


def test_gradients_that_are_added_up_where_they_are_made_read_and_write_their_sum() -> None:
    fused = replace(FLASH, fused_gradient_accumulation=True)
    graph = products()
    (op,) = (op for op in graph.ops if "linear" in op.target)
    plain, adding = kernels_of(graph)[op.name], kernels_of(graph, fused)[op.name]
    assert adding.forward == plain.forward
    assert adding.backward == plain.backward
    # An fp32 sum read and written, rather than a gradient of two bytes written.
    assert adding.weight[0].bytes - plain.weight[0].bytes == (4 + 4 - 2) * H * OUT


def test_an_operand_without_a_gradient_has_no_product() -> None:
    builder = GraphBuilder()
    first = builder.linear(builder.input(64, 32), 16)
    kernels = kernels_of(builder.graph(builder.sum(first)))[first]
    assert kernels.backward == ()
    assert shapes(kernels.weight) == [(1, 32, 16, 64)]


def test_groups_are_launched_one_by_one_where_the_library_does() -> None:
    graph = products()
    (op,) = (op for op in graph.ops if "grouped_mm" in op.target)
    for at_once, launches in ((True, 1), (False, E)):
        era = replace(FLASH, grouped_launches=not at_once)
        kernels = kernels_of(graph, era)[op.name]
        found = {work.num_launches for work in (*kernels.forward, *kernels.backward, *kernels.weight)}
        assert found == {launches}


# --- low precision ------------------------------------------------------------------------------------------


def test_low_precision_is_for_products_with_parameters_inside_of_blocks() -> None:
    builder = GraphBuilder(torch.bfloat16)
    x = builder.linear(builder.input(256, 128), 128)
    inside = builder.linear(x, 64)
    neighbour = builder.linear(inside, 64)
    head = builder.linear(neighbour, 512)
    modules = {inside: "layers.1.up", neighbour: "layers.10.up", head: "head"}
    graph = builder.graph(builder.sum(head))
    ops = tuple(replace(op, module=modules.get(op.name, "")) for op in graph.ops)
    kernels = kernels_of(replace(graph, ops=ops), low_precision="fp8", blocks=("layers.1",))
    for name in (x, neighbour, head):
        each = kernels[name]
        assert {work.dtype for work in (*each.forward, *each.backward, *each.weight)} == {"bf16"}
    low = kernels[inside]
    assert [work.dtype for work in (*low.forward, *low.backward, *low.weight) if work.flops] == ["fp8"] * 3
    # Both what enters and the gradient that comes back are read as two bytes and written twice as one.
    cast, cast_back = low.forward[0], low.backward[0]
    assert (cast.kind, cast.flops, cast.bytes) == ("memory", 0, 4 * 256 * 128)
    assert (cast_back.kind, cast_back.flops, cast_back.bytes) == ("memory", 0, 4 * 256 * 64)


# --- attention ----------------------------------------------------------------------------------------------

HEADS, QUERIES, KEYS, HEAD_DIM = 32, 1024, 2048, 128
SCORES = HEADS * QUERIES * KEYS
FLOPS = 4 * SCORES * HEAD_DIM


def attention(
    era: Software,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
    queries: int = QUERIES,
) -> Kernels:
    builder = GraphBuilder(torch.bfloat16)
    q = builder.parameter(1, HEADS, queries, HEAD_DIM)
    k, v = (builder.parameter(1, HEADS, KEYS, HEAD_DIM) for _ in range(2))
    builder.tensors["out"] = replace(builder.tensors[q], name="out", storage="out")
    args = (Ref(q), Ref(k), Ref(v), None, dropout, causal)
    target = "aten.scaled_dot_product_attention.default"
    flops = FLOPS * queries // QUERIES
    op = Op("out", target, args, {}, ("out",), "", flops, window=window)
    return maker(era).op(op, builder.tensors)


@pytest.mark.parametrize(("name", "kind"), [("flash-2023", "attention"), ("te-2024", "native_attention")])
def test_fused_attention_is_one_kernel_and_its_backward_does_five_products_for_two(
    name: str, kind: str
) -> None:
    era = software(name)
    kernels = attention(era)
    ((forward,), (backward,)) = kernels.forward, kernels.backward
    assert forward.kind == backward.kind == kind
    assert forward.shape == backward.shape == (HEADS, QUERIES, KEYS, HEAD_DIM)
    assert forward.flops == FLOPS
    assert backward.flops * era.attention_backward_share == pytest.approx(2.5 * FLOPS)
    assert forward.bytes == 2 * 2 * HEADS * (QUERIES + KEYS) * HEAD_DIM
    assert kernels.weight == ()


def test_a_causal_mask_halves_what_a_fused_kernel_does() -> None:
    for name in ("flash-2023", "te-2024"):
        whole, causal = attention(software(name)), attention(software(name), causal=True)
        assert causal.forward[0].flops == whole.forward[0].flops / 2
        assert causal.backward[0].flops == whole.backward[0].flops / 2
        assert causal.forward[0].bytes == whole.forward[0].bytes


@pytest.mark.parametrize("window", [1, 100, 1024, KEYS - 1])
def test_a_native_kernel_does_only_what_is_inside_the_window(window: int) -> None:
    """Query i of a causal window attends to min(i + 1, window) keys."""
    kernels = attention(software("te-2024"), window=window, queries=KEYS)
    attended = sum(min(query + 1, window) for query in range(KEYS)) / KEYS**2
    whole = attention(software("te-2024"), queries=KEYS)
    assert kernels.forward[0].flops == pytest.approx(attended * whole.forward[0].flops, rel=1e-3)


def test_torchs_own_kernel_takes_a_window_for_any_mask() -> None:
    assert attention(FLASH, window=100) == attention(FLASH)
    assert attention(software("te-2024"), window=KEYS) == attention(software("te-2024"))


def test_unfused_attention_writes_its_scores_and_reads_them_again() -> None:
    kernels = attention(software("unfused-2020"), causal=True)  # the mask saves nothing
    into, softmax, out = kernels.forward
    assert into.shape == (HEADS, QUERIES, KEYS, HEAD_DIM)
    assert out.shape == (HEADS, QUERIES, HEAD_DIM, KEYS)
    assert into.flops == out.flops == FLOPS / 2
    outer = HEADS * (QUERIES + KEYS) * HEAD_DIM
    assert into.bytes == out.bytes == 2 * (SCORES + outer)
    assert (softmax.kind, softmax.flops, softmax.bytes) == ("memory", 0, 2 * 2 * SCORES)  # read and written


def test_unfused_attentions_backward_is_four_products_and_a_softmax() -> None:
    backward = attention(software("unfused-2020")).backward
    assert [work.kind for work in backward].count("matmul") == 4
    assert sum(work.flops for work in backward) == 2 * FLOPS  # nothing is computed again
    (softmax,) = (work for work in backward if work.kind == "memory")
    assert (
        softmax.bytes == 3 * 2 * SCORES
    )  # reads probabilities and their gradient, writes that of the scores


def test_dropout_is_another_pass_over_unfused_scores_with_a_mask_of_bytes() -> None:
    era = software("unfused-2020")
    with_it, without = attention(era, dropout=0.1), attention(era)
    for name in ("forward", "backward"):
        dropped = sum(work.bytes for work in getattr(with_it, name))
        assert dropped - sum(work.bytes for work in getattr(without, name)) == (2 + 2 + 1) * SCORES
    assert attention(FLASH, dropout=0.1) == attention(FLASH)  # inside the kernel


# --- memory-bound ops and what they share -------------------------------------------------------------------

N = 1024 * 512
"""Elements of each value in the chain."""


def chain() -> tuple[OpGraph, list[str]]:
    """Three additions between two products, the last one in another module."""
    builder = GraphBuilder(torch.bfloat16)
    x = builder.linear(builder.input(1024, 512), 512)
    sums = [builder.add(x, x)]
    sums.append(builder.add(sums[0], x))
    sums.append(builder.add(sums[1], x))
    graph = builder.graph(builder.sum(builder.linear(sums[2], 512)))
    modules = {sums[0]: "one", sums[1]: "one", sums[2]: "two"}
    return replace(graph, ops=tuple(replace(op, module=modules.get(op.name, "")) for op in graph.ops)), sums


@pytest.mark.parametrize(
    ("fusion", "read_or_written"),
    [
        ("none", [2, 3, 3]),  # x and itself are read once
        ("module", [1, 2, 3]),
        ("chain", [1, 1, 2]),
    ],
)
def test_ops_that_share_a_kernel_pass_values_in_registers(fusion: Any, read_or_written: list[int]) -> None:
    graph, sums = chain()
    kernels = kernels_of(graph, replace(FLASH, fusion=fusion))
    for name, count in zip(sums, read_or_written, strict=True):
        assert sum(work.bytes for work in kernels[name].forward) == 2 * N * count


@pytest.mark.parametrize(("fusion", "launches"), [("none", 3), ("module", 2), ("chain", 1)])
def test_a_chain_is_one_launch(fusion: Any, launches: int) -> None:
    graph, sums = chain()
    kernels = kernels_of(graph, replace(FLASH, fusion=fusion))
    assert sum(work.num_launches for name in sums for work in kernels[name].forward) == launches
    assert sum(work.num_launches for name in sums for work in kernels[name].backward) >= launches


def test_a_value_with_two_readers_goes_through_memory() -> None:
    builder = GraphBuilder()
    x = builder.linear(builder.input(1024, 1024), 1024)
    shared = builder.add(x, x)
    rectified = builder.relu(shared)
    traffic = Traffic.of(builder.graph(builder.sum(builder.mul(rectified, shared))))
    assert traffic.is_read(shared)
    assert not traffic.is_read(rectified)
    assert traffic.is_read(x)  # a product made it


def test_each_reader_makes_a_constant_for_itself() -> None:
    """As a rank may that needs another part of it for each."""
    builder = GraphBuilder()
    x = builder.linear(builder.input(1024, 1024), 1024)
    builder.tensors["ones"] = Tensor("ones", (1024, 1024), torch.float32, False, "ones")
    builder.ops.append(Op("ones", "aten.ones.default", ([1024, 1024],), {}, ("ones",), ""))
    total = builder.add(builder.add(x, "ones"), "ones")
    assert not Traffic.of(builder.graph(builder.sum(total))).is_read("ones")
    product = builder.add(total, builder.linear("ones", 1024))
    assert Traffic.of(builder.graph(builder.sum(product))).is_read("ones")


def test_what_the_backward_needs_of_a_kernel_it_computes_again() -> None:
    """A rectifier inside a chain is saved, but never read: its backward touches the chain's ends."""
    builder = GraphBuilder(torch.bfloat16)
    x = builder.linear(builder.input(1024, 512), 512)
    rectified = builder.relu(x)
    out = builder.mul(rectified, x)
    kernels = kernels_of(builder.graph(builder.sum(builder.linear(out, 512))))
    assert sum(work.bytes for work in kernels[rectified].backward) == 2 * N  # the gradient of x
    # The gradient of the product's operand, that of x, and x itself.
    assert sum(work.bytes for work in kernels[out].backward) == 2 * N * 3


def test_a_lookup_reads_the_rows_it_takes_and_not_the_table() -> None:
    builder = GraphBuilder(torch.bfloat16)
    table, indices = builder.parameter(50000, 512), builder.input(1024)
    builder.tensors["out"] = Tensor("out", (1024, 512), torch.bfloat16, True, "out")
    op = Op("out", "aten.embedding.default", (Ref(table), Ref(indices)), {}, ("out",), "")
    (work,) = maker().op(op, builder.tensors).forward
    assert work.bytes <= 3 * 2 * N


def test_a_view_is_free() -> None:
    builder = GraphBuilder()
    x = builder.relu(builder.linear(builder.input(64, 64), 64))
    builder.tensors["view"] = replace(builder.tensors[x], name="view", shape=(4096,))
    op = Op("view", "aten.reshape.default", (Ref(x), [4096]), {}, ("view",), "")
    assert kind_of(op, builder.tensors) == "view"
    assert maker().op(op, builder.tensors) == NOTHING


# --- communication ------------------------------------------------------------------------------------------

WHOLE = (64, 1024)
PART = (16, 1024)
BYTES = 4 * prod(WHOLE)


@pytest.mark.parametrize(
    ("name", "before", "after", "forward", "backward"),
    [
        ("all_gather", PART, WHOLE, ("all_gather", BYTES), ("reduce_scatter", BYTES)),
        ("all_gather_replicated", PART, WHOLE, ("all_gather", BYTES), None),
        ("shard", WHOLE, PART, None, ("all_gather", BYTES)),
        ("shard_partial", WHOLE, PART, None, None),
        ("copy", WHOLE, WHOLE, None, ("all_reduce", BYTES)),
        ("all_reduce", WHOLE, WHOLE, ("all_reduce", BYTES), None),
        ("all_reduce_partial", WHOLE, WHOLE, ("all_reduce", BYTES), ("all_reduce", BYTES)),
        ("reduce_scatter", WHOLE, PART, ("reduce_scatter", BYTES), ("all_gather", BYTES)),
        ("all_to_all", PART, PART, ("all_to_all", BYTES / 4), ("all_to_all", BYTES / 4)),
        ("first_only", WHOLE, WHOLE, None, None),
        ("first_grad", WHOLE, WHOLE, None, None),
    ],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_change_of_placement_is_a_collective_and_its_conjugate(
    name: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    forward: tuple[Any, float] | None,
    backward: tuple[Any, float] | None,
    requires_grad: bool,
) -> None:
    tensors = {
        "x": Tensor("x", before, torch.float32, requires_grad, "x"),
        "y": Tensor("y", after, torch.float32, requires_grad, "y"),
    }
    op = Op("y", f"autopar.{name}", (Ref("x"),), {"axis": "tp"}, ("y",), "")
    kernels = maker().op(op, tensors)
    assert kernels.forward == kernels.backward == kernels.weight == ()
    assert kernels.forward_moves == ((Move(*forward, "tp"),) if forward else ())
    assert kernels.backward_moves == ((Move(*backward, "tp"),) if backward and requires_grad else ())


def test_every_change_of_placement_is_tested_above() -> None:
    marks = test_a_change_of_placement_is_a_collective_and_its_conjugate.pytestmark
    tested = {case[0] for mark in marks if mark.args[0] != "requires_grad" for case in mark.args[1]}
    assert tested == set(CONJUGATES)


def test_a_loss_over_split_classes_reduces_three_values_a_row() -> None:
    tensors = {
        "x": Tensor("x", (32, 1000), torch.bfloat16, True, "x"),
        "labels": Tensor("labels", (32,), torch.int64, False, "labels"),
        "loss": Tensor("loss", (), torch.bfloat16, True, "loss"),
    }
    op = Op("loss", "autopar.cross_entropy", (Ref("x"), Ref("labels")), {"class_axis": "tp"}, ("loss",), "")
    assert maker().op(op, tensors).forward_moves == (Move("all_reduce", 2 * 32, "tp"),) * 3
