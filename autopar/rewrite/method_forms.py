"""Ops that are written as operators, methods or subscripts of a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.rewrite.expressions import (
    AND,
    COMPARE,
    OR,
    POWER,
    PRODUCT,
    SUM,
    UNARY,
    Call,
    Expression,
    Writer,
    literal,
    tuple_of,
)
from graphs.ir import Ref


def _binary(symbol: str, level: int) -> Writer:
    def write(call: Call) -> Expression | None:
        if call.op.kwargs or len(call.op.args) != 2:
            return None
        # The right operand of a left-associative operator must bind more tightly than the operator itself.
        left, right = call.tensor(0, level), call.tensor(1, level - 1)
        return Expression(f"{left} {symbol} {right}", level)

    return write


def _comparison(symbol: str) -> Writer:
    return lambda call: Expression(f"{call.tensor(0, OR)} {symbol} {call.tensor(1, OR)}", COMPARE)


def _prefix(symbol: str) -> Writer:
    return lambda call: Expression(f"{symbol}{call.tensor(0, UNARY)}", UNARY)


def _method(name: str) -> Writer:
    return lambda call: Expression(f"{call.tensor(0)}.{name}({', '.join(call.rest(1))})")


def _sized_method(name: str, makes_shape: bool = False) -> Writer:
    """`x.name(sizes)`; where it makes that shape, sizes are the ones of the result."""

    def write(call: Call) -> Expression:
        sizes = call.sizes(call.op.output) if makes_shape else [str(size) for size in call.op.args[1]]
        return Expression(f"{call.tensor(0)}.{name}({', '.join(sizes) or '()'})")

    return write


def _new(name: str) -> Writer:
    def write(call: Call) -> Expression:
        texts = [tuple_of(call.sizes(call.op.output)), *call.rest(2)]
        return Expression(f"{call.tensor(0)}.{name}({', '.join(texts)})")

    return write


def _pow(call: Call) -> Expression | None:
    exponent = call.arg(1)
    if call.op.kwargs or not isinstance(call.arg(0), Ref):
        return None
    if isinstance(exponent, float) and exponent.is_integer() and call.dtype(0).is_floating_point:
        return Expression(f"{call.tensor(0)} ** {int(exponent)}", POWER)
    return Expression(f"{call.tensor(0)} ** {call.tensor(1)}", POWER)


def _reduction(name: str) -> Writer:
    def write(call: Call) -> Expression | None:
        if call.op.kwargs:
            return None
        dims = call.arg(1)
        texts = []
        if dims is not None:
            texts.append(
                str(dims[0]) if isinstance(dims, list) and len(dims) == 1 else literal(dims, call.values)
            )
        if call.arg(2):
            texts.append("keepdim=True")
        return Expression(f"{call.tensor(0)}.{name}({', '.join(texts)})") if len(call.op.args) <= 3 else None

    return write


def _to(call: Call) -> Expression | None:
    if call.op.target not in {"aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy.default"}:
        return None
    dtype = call.arg(1) if call.op.target == "aten.to.dtype" else call.op.kwargs.get("dtype")
    extra = len(call.op.args) - (2 if call.op.target == "aten.to.dtype" else 1)
    if dtype is None or extra > 0 or set(call.op.kwargs) - {"dtype"}:
        return None
    short = {torch.float32: "float", torch.int64: "long", torch.bool: "bool"}.get(dtype)
    return Expression(f"{call.tensor(0)}.{short}()" if short else f"{call.tensor(0)}.to({dtype})")


def _subscript(call: Call, dim: int, index: str) -> str:
    rank = len(call.tensors[call.op.inputs[0]].shape)
    after = rank - 1 - dim % rank
    if after < dim % rank and after < 2:
        return f"[..., {index}{', :' * after}]" if rank > 1 else f"[{index}]"
    return f"[{':, ' * (dim % rank)}{index}]"


def _slice(call: Call) -> Expression | None:
    dim, start, end, step = (
        call.arg(index, default) for index, default in ((1, 0), (2, None), (3, None), (4, 1))
    )
    if call.op.kwargs:
        return None
    extent = call.tensors[call.op.inputs[0]].shape[dim]
    low = "" if start in (None, 0) else str(start)
    high = "" if end is None or end >= extent else str(end)
    return Expression(
        f"{call.tensor(0)}{_subscript(call, dim, f'{low}:{high}' + (f':{step}' if step != 1 else ''))}"
    )


def _select(call: Call) -> Expression:
    return Expression(f"{call.tensor(0)}{_subscript(call, call.arg(1), str(call.arg(2)))}")


def _index(call: Call) -> Expression:
    indices = [":" if index is None else literal(index, call.values) for index in call.arg(1)]
    return Expression(f"{call.tensor(0)}[{', '.join(indices)}]")


def _clone(call: Call) -> Expression:
    """A copy that only changes the memory format is `contiguous`: no value of a graph is written to twice."""
    return Expression(f"{call.tensor(0)}.contiguous()")


def _split(call: Call) -> Expression:
    return Expression(f"{call.tensor(0)}.split({', '.join(call.rest(1))})")


METHOD_FORMS: Mapping[str, Writer] = {
    "add": _binary("+", SUM),
    "sub": _binary("-", SUM),
    "mul": _binary("*", PRODUCT),
    "div": _binary("/", PRODUCT),
    "floor_divide": _binary("//", PRODUCT),
    "mm": _binary("@", PRODUCT),
    "matmul": _binary("@", PRODUCT),
    "__and__": _binary("&", AND),
    "bitwise_and": _binary("&", AND),
    "__or__": _binary("|", OR),
    "bitwise_or": _binary("|", OR),
    "eq": _comparison("=="),
    "ne": _comparison("!="),
    "lt": _comparison("<"),
    "le": _comparison("<="),
    "gt": _comparison(">"),
    "ge": _comparison(">="),
    "neg": _prefix("-"),
    "bitwise_not": _prefix("~"),
    "pow": _pow,
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "transpose": _method("transpose"),
    "t": _method("t"),
    "permute": _sized_method("permute"),
    "unsqueeze": _method("unsqueeze"),
    "squeeze": _method("squeeze"),
    "contiguous": _clone,
    "detach": _method("detach"),
    "clone": _clone,
    "chunk": _method("chunk"),
    "reshape": _sized_method("reshape", makes_shape=True),
    "expand": _sized_method("expand", makes_shape=True),
    **{name: _new(name) for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
    "repeat": _sized_method("repeat"),
    "to": _to,
    "_to_copy": _to,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "split": _split,
    "split_with_sizes": _split,
}
"""By the name of the ATen op."""
