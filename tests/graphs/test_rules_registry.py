"""Finding and registering rules, and the rules of ops that run on ranks only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import prod

import pytest
import torch

from graphs import rules
from graphs.ir import Op, OpGraph, Ref, Tensor
from graphs.rules import Dim, registry
from tests.graphs.rule_harness import Case, record, run_split, shards_of, splittable, unshard


def graph_of(op: Op, **tensors: Tensor) -> OpGraph:
    return OpGraph("call", tensors, (op,), (), (), (), op.outputs, op.outputs, None, {})


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Tensor(name, shape, dtype, dtype.is_floating_point, name)


def rule_of(
    target: str, args: tuple[object, ...], operands: list[Tensor], result: Tensor, **kwargs: str
) -> rules.Rule | None:
    op = Op("op", target, args, kwargs, (result.name,), "")
    return rules.rule_for(op, graph_of(op, **{t.name: t for t in (*operands, result)}))


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    """Operators of a user's library."""
    with torch.library._scoped_library("rules_test", "DEF") as library:
        library.define("scale_rows(Tensor x, Tensor scale) -> Tensor")
        library.define("gate(Tensor x, Tensor y) -> Tensor", tags=(torch.Tag.pointwise,))
        registry._is_pointwise.cache_clear()
        yield library


SCALE_ROWS = "rules_test.scale_rows.default"


@pytest.fixture
def _unregistered() -> Iterator[None]:
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def scale_rows_rule() -> rules.Rule | None:
    operands = [tensor("x", 4, 6), tensor("scale", 4)]
    return rule_of(SCALE_ROWS, (Ref("x"), Ref("scale")), operands, tensor("y", 4, 6))


def test_an_unknown_op_has_no_rule(library: torch.library.Library) -> None:
    assert scale_rows_rule() is None


@pytest.mark.usefixtures("library")
def test_the_pointwise_tag_is_rule_enough() -> None:
    operands = [tensor("x", 4, 6), tensor("y", 6)]
    rule = rule_of("rules_test.gate.default", (Ref("x"), Ref("y")), operands, tensor("z", 4, 6))
    assert rule is not None
    assert rule.operands == ((("d0",), ("d1",)), (("d1",),))
    assert rule.linear == ()


@pytest.mark.usefixtures("library")
def test_a_wrong_pointwise_tag_is_not_believed() -> None:
    operands = [tensor("x", 4, 6), tensor("y", 5)]
    assert rule_of("rules_test.gate.default", (Ref("x"), Ref("y")), operands, tensor("z", 4, 6)) is None


@pytest.mark.usefixtures("_unregistered")
def test_a_user_registers_a_rule() -> None:
    matrix = (("r",), ("c",))

    @rules.register(SCALE_ROWS)
    def scale_rows(op: Op, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> rules.Rule:
        rows, columns = operands[0].shape
        return rules.Rule({"r": rows, "c": columns}, (matrix, (("r",),)), (matrix,))

    rule = scale_rows_rule()
    assert rule is not None
    assert rule.sizes == {"r": 4, "c": 6}


@pytest.mark.usefixtures("_unregistered")
def test_ops_that_do_the_same_share_a_rule() -> None:
    asked = []

    @rules.register(SCALE_ROWS)
    def scale_rows(op: Op, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        asked.append(op.name)

    def ask(name: str, x: Tensor, scale: Tensor, *more: object) -> None:
        op = Op(name, SCALE_ROWS, (Ref(x.name), Ref(scale.name), *more), {}, ("y",), "")
        rules.rule_for(op, graph_of(op, **{x.name: x, scale.name: scale, "y": tensor("y", 4, 4)}))

    x, scale = tensor("x", 4, 4), tensor("scale", 4, 4)
    ask("first", x, scale)
    ask("renamed", tensor("a", 4, 4), tensor("b", 4, 4))
    assert asked == ["first"]
    ask("repeated", x, x)
    ask("wider", x, tensor("scale", 4, 1))
    ask("exact", x, tensor("scale", 4, 4, dtype=torch.int64))
    ask("by a number", x, scale, 1)
    ask("by a flag", x, scale, True)
    assert asked == ["first", "repeated", "wider", "exact", "by a number", "by a flag"]


@pytest.mark.usefixtures("_unregistered")
@pytest.mark.parametrize(
    ("sizes", "operands", "problem"),
    [
        ({"r": 4, "c": 6}, ((("r",), ("c",)),), "it has 2 operands, the rule 1"),
        ({"r": 4, "c": 6}, ((("r",), ("c",)), (("r",), ())), "scale[4]: the rule gives it 2 dimensions"),
        ({"r": 4, "c": 5}, ((("r",), ("c",)), (("r",),)), "x[4, 6]: dimension 1 is not c=5"),
        ({"r": 4}, ((("r",), ("c",)), (("r",),)), "the rule gives no size to factor c"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(
    sizes: dict[str, int], operands: tuple[tuple[Dim, ...], ...], problem: str
) -> None:
    rules.register(SCALE_ROWS)(lambda *_: rules.Rule(sizes, operands, ((("r",), ("c",)),)))
    with pytest.raises(rules.RuleError, match=r"sharding rule of rules_test\.scale_rows") as raised:
        scale_rows_rule()
    assert problem in str(raised.value)


def test_indexing_by_a_mask_has_no_rule() -> None:
    operands = [tensor("x", 4, 6), tensor("m", 4, dtype=torch.bool)]
    assert rule_of("aten.index.Tensor", (Ref("x"), [Ref("m")]), operands, tensor("y", 3, 6)) is None


# --- ops of localized graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dims", "shape", "splits"),
    [
        ("all_gather", (1,), (4, 16, 6), {"d0", "d2"}),
        ("all_gather", (1, (8, 8)), (4, 16, 6), {"d0", "d2"}),
        ("reduce_scatter", (0,), (2, 8, 6), {"d1", "d2"}),
        ("all_to_all", (1, 2), (4, 16, 3), {"d0"}),
        ("all_reduce", (), (4, 8, 6), {"d0", "d1", "d2"}),
        ("copy", (), (4, 8, 6), {"d0", "d1", "d2"}),
    ],
)
def test_a_collective_is_the_identity_elsewhere(
    name: str, dims: tuple[object, ...], shape: tuple[int, ...], splits: set[str]
) -> None:
    rule = rule_of(
        f"autopar.{name}", (Ref("x"), *dims), [tensor("x", 4, 8, 6)], tensor("y", *shape), axis="dp"
    )
    assert rule is not None
    assert set(splittable(rule)) == splits
    assert rule.operands == rule.results
    assert rule.linear == (frozenset({0}),)


def test_a_split_lookup_is_not_split_by_words_again() -> None:
    operands = [tensor("w", 8, 6), tensor("i", 2, 4, dtype=torch.int64)]
    result = tensor("y", 2, 4, 6)
    rule = rule_of("autopar.embedding", (Ref("w"), Ref("i")), operands, result, vocab_axis="tp")
    assert rule is not None
    assert set(splittable(rule)) == {"h", "d0", "d1"}
    assert not rule.implemented


@pytest.mark.parametrize(("axis", "left"), [("row_axes", {"c"}), ("class_axis", {"d0"})])
def test_a_split_loss_can_be_split_the_other_way(axis: str, left: set[str]) -> None:
    operands = [tensor("x", 8, 6), tensor("t", 8, dtype=torch.int64)]
    rule = rule_of("autopar.cross_entropy", (Ref("x"), Ref("t")), operands, tensor("loss"), **{axis: "dp"})
    assert rule is not None
    assert set(splittable(rule)) == left == rule.implemented.keys()


# --- reshapes of any shapes --------------------------------------------------------------------------------


def _shapes_of(number: int, source: random.Random) -> list[int]:
    shape = []
    while number > 1:
        size = source.choice([d for d in range(2, number + 1) if number % d == 0])
        shape.append(size)
        number //= size
    for _ in range(source.randint(0, 2)):
        shape.insert(source.randint(0, len(shape)), 1)
    return shape


@pytest.mark.parametrize("seed", range(60))
def test_any_reshape_splits_as_it_says(seed: int) -> None:
    source = random.Random(seed)
    number = source.choice([12, 24, 36, 48, 60, 64, 96])
    first, second = _shapes_of(number, source), _shapes_of(number, source)
    whole = torch.arange(number).reshape(first)
    call = record(Case("aten.reshape.default", (whole, second), ""))
    for factor in splittable(call.rule):
        parts = [results[0] for results in run_split(call, factor, shards_of(call, factor))]
        assert unshard(call.rule, "result", 0, parts, factor).equal(whole.reshape(second)), (
            first,
            second,
            factor,
        )
    for dims, shape in zip((*call.rule.operands, *call.rule.results), (first, second), strict=True):
        assert [prod(call.rule.sizes[name] for name in dim) for dim in dims] == shape


def test_heads_and_batch_survive_reshapes() -> None:
    """What tensor and data parallelism stand on: the factors of `[b, s, h * d] -> [b, s, h, d]`."""
    rule = record(Case("aten.reshape.default", (torch.zeros(2, 6, 32), [2, 6, 4, 8]), "")).rule
    assert rule.operands == ((("d0",), ("d1",), ("d2", "d3")),)
    assert rule.results == ((("d0",), ("d1",), ("d2",), ("d3",)),)
    assert rule.sizes == {"d0": 2, "d1": 6, "d2": 4, "d3": 8}


def test_experts_split_their_columns_and_sum_their_rows() -> None:
    pytest.importorskip("transformers.integrations.moe")
    x, w = torch.randn(8, 6, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    call = record(Case("transformers.grouped_mm_fallback.default", (x, w, offsets), ""))
    assert set(splittable(call.rule)) == {"k", "n"}
    for factor in ("k", "n"):
        parts = [results[0] for results in run_split(call, factor, shards_of(call, factor))]
        made = torch.stack(parts).sum(0) if factor == "k" else unshard(call.rule, "result", 0, parts, factor)
        torch.testing.assert_close(made, call.results[0])
