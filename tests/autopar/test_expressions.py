"""What is printed for an op, evaluated, is what the op computes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from autopar.rewrite.expressions import AND, PRODUCT, SUM, Expression
from autopar.rewrite.op_expressions import expression_of
from graphs.ir import Op, Ref, Tensor
from tests.graphs.rule_cases import CASES
from tests.graphs.rule_harness import Case, record

UNPREDICTABLE = {"empty", "rand", "randn", "new_empty", "empty_like"}


@pytest.mark.parametrize("op_case", CASES, ids=str)
def test_printed_ops_compute_what_was_captured(op_case: Case) -> None:
    torch.manual_seed(0)
    call = record(op_case)
    if call.op.target.split(".")[1] in UNPREDICTABLE or "dropout" in call.op.target:
        return
    values = {name: Expression(name) for name in call.op.inputs}
    sizes = {name: [str(size) for size in tensor.shape] for name, tensor in call.graph.tensors.items()}
    text = expression_of(call.op, values, call.graph.tensors, sizes.__getitem__, None).text
    scope = dict(zip(call.op.inputs, call.operands, strict=True))
    made = eval(text, {"torch": torch, "F": F, "grouped_mm": _grouped_mm}, scope)
    results = (made,) if isinstance(made, torch.Tensor) else tuple(made)
    for found, wanted in zip(results, call.results, strict=True):
        assert found.dtype == wanted.dtype, text
        low = wanted.dtype == torch.bfloat16
        torch.testing.assert_close(
            found, wanted, equal_nan=True, atol=0.1 if low else None, rtol=0.05 if low else None
        )


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    from autopar.runtime.experts import grouped_mm

    return grouped_mm(x, weight, ends)


def _text(target: str, *args: object, shapes: Mapping[str, tuple[int, ...]], **kwargs: object) -> str:
    tensors = {name: Tensor(name, shape, torch.float32, True, name) for name, shape in shapes.items()}
    op = Op("op", target, args, kwargs, ("y",), "")
    values = {name: Expression(name) for name in shapes}
    return expression_of(op, values, tensors, lambda _: ["BATCH", "16 // TP"], "x.device").text


X = Ref("x")
MATRIX = {"x": (4, 8)}
HEADS = {"q": (2, 4, 16, 64), "k": (2, 4, 16, 64), "few": (2, 2, 16, 64)}


def test_common_ops_read_like_handwritten_code() -> None:
    assert _text("aten.add.Tensor", X, X, shapes=MATRIX) == "x + x"
    assert _text("aten.pow.Tensor_Scalar", X, 2.0, shapes=MATRIX) == "x ** 2"
    assert _text("aten.slice.Tensor", X, 1, 2, 9223372036854775807, shapes=MATRIX) == "x[..., 2:]"
    assert _text("aten.select.int", X, 0, -1, shapes=MATRIX) == "x[-1]"
    assert _text("aten.mean.dim", X, [-1], True, shapes=MATRIX) == "x.mean(-1, keepdim=True)"
    assert _text("aten.to.dtype", X, torch.float32, shapes=MATRIX) == "x.float()"


def test_sizes_are_named_and_new_tensors_are_made_where_the_others_are() -> None:
    assert _text("aten.reshape.default", X, [2, 8], shapes=MATRIX) == "x.reshape(BATCH, 16 // TP)"
    assert _text("aten.new_zeros.default", X, [2, 8], shapes=MATRIX) == "x.new_zeros((BATCH, 16 // TP))"
    assert _text("aten.arange.default", 8, shapes={}) == "torch.arange(8, device=x.device)"


def test_attention_leaves_out_what_is_the_default() -> None:
    q, k, few = Ref("q"), Ref("k"), Ref("few")
    attention = "aten.scaled_dot_product_attention.default"
    plain = _text(attention, q, k, k, None, 0.0, True, shapes=HEADS, scale=0.125, enable_gqa=True)
    assert plain == "F.scaled_dot_product_attention(q, k, k, is_causal=True)"
    grouped = _text(attention, q, few, few, shapes=HEADS, scale=1.0, enable_gqa=True)
    assert grouped == "F.scaled_dot_product_attention(q, few, few, scale=1.0, enable_gqa=True)"


def test_an_op_without_a_form_of_its_own_is_its_overload() -> None:
    assert _text("aten.cummax.default", X, 1, shapes=MATRIX) == "torch.ops.aten.cummax.default(x, 1)"


@pytest.mark.parametrize(("level", "wanted"), [(PRODUCT, "(a + b)"), (SUM, "a + b"), (AND, "a + b")])
def test_parentheses_stand_where_the_operator_around_binds_more_tightly(level: int, wanted: str) -> None:
    assert Expression("a + b", SUM).within(level) == wanted
