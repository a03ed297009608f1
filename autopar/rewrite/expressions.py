"""One op as a Python expression.

Common ops have a form a person would write (`x + y`, `x.transpose(1, 2)`, `F.silu(x)`). Every other op is printed as a
call of its ATen overload, which means exactly what was captured, so that no op is ever unprintable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphs.ir import Op, Ref, Tensor

ATOM, POWER, UNARY, PRODUCT, SUM, SHIFT, AND, XOR, OR, COMPARE = range(10)
"""Binding strength, tightest first."""


@dataclass(frozen=True, slots=True)
class Expression:
    """Source text and how tightly its outermost operator binds."""

    text: str
    level: int = ATOM

    def within(self, level: int) -> str:
        """The text, in parentheses where it binds less tightly than `level` wants."""
        return self.text if self.level <= level else f"({self.text})"


Values = Mapping[str, Expression]


def expression_of(
    op: Op,
    values: Values,
    tensors: Mapping[str, Tensor],
    sizes: Callable[[Op], list[str] | None],
    device: str | None,
) -> Expression:
    """The expression that computes `op`.

    `values` are the expressions of its `tensors`; `sizes` gives the size argument of ops like `reshape` as text, so
    that sizes can be named; `device` is the expression of the device on which ops without tensors make theirs.
    """
    namespace, name, overload = op.target.split(".", 2)
    writer = _WRITERS.get(name) if namespace == "aten" else _FOREIGN.get(f"{namespace}.{name}")
    if writer is not None:
        written = writer(_Call(op, values, tensors, sizes(op)))
        if written is not None:
            return written
    return _generic(op, values, device, namespace, name, overload)


@dataclass(frozen=True)
class _Call:
    """An op with its arguments as text."""

    op: Op
    values: Values
    tensors: Mapping[str, Tensor]
    sizes: list[str] | None

    def tensor(self, index: int, level: int = ATOM) -> str:
        return _operand(self.op.args[index], self.values, level)

    def arg(self, index: int, default: Any = None) -> Any:
        return self.op.args[index] if index < len(self.op.args) else default

    def rest(self, start: int) -> list[str]:
        """Arguments from `start` on, and the keyword ones."""
        return _arguments(self.op.args[start:], self.op.kwargs, self.values)


def literal(value: Any, values: Values) -> str:
    """A Python argument as source."""
    if isinstance(value, Ref):
        return values[value.name].text
    if isinstance(value, (list, tuple)):
        items = ", ".join(literal(item, values) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'"{value}"'
    return str(value) if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) else repr(value)


def _operand(value: Any, values: Values, level: int) -> str:
    if isinstance(value, Ref):
        return values[value.name].within(level)
    text = literal(value, values)
    return f"({text})" if text.startswith("-") and level < SUM else text


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Values) -> list[str]:
    return [literal(arg, values) for arg in args] + [f"{key}={literal(arg, values)}" for key, arg in kwargs.items()]


def _generic(op: Op, values: Values, device: str | None, namespace: str, name: str, overload: str) -> Expression:
    arguments = _arguments(op.args, op.kwargs, values)
    if device is not None and not op.inputs:
        arguments.append(f"device={device}")
    if namespace == "aten" and name in _TORCH_FUNCTIONS:
        return Expression(f"torch.{name}({', '.join(arguments)})")
    return Expression(f"torch.ops.{op.target}({', '.join(arguments)})")


_TORCH_FUNCTIONS = frozenset(
    {
        *("abs", "amax", "amin", "arange", "argmax", "bmm", "cat", "ceil", "clamp", "cos", "cumsum", "div", "erf"),
        *("exp", "eye", "flip", "floor", "full", "full_like", "gather", "index_select", "isinf", "isnan", "linspace"),
        *("log", "log1p", "logical_and", "logical_not", "logical_or", "logsumexp", "masked_fill", "maximum"),
        *("minimum", "ones", "ones_like", "reciprocal", "relu", "roll", "round", "rsqrt", "sigmoid", "sign", "sin"),
        *("sqrt", "stack", "square", "tanh", "topk", "tril", "triu", "unbind", "where", "zeros", "zeros_like"),
        *("log2", "expm1", "sort", "outer", "diff", "any", "all", "tile", "narrow", "scatter", "scatter_add"),
    }
)
"""ATen ops whose function of the same name in `torch` takes the same arguments."""

Writer = Callable[[_Call], Expression | None]


def _binary(symbol: str, level: int) -> Writer:
    def write(call: _Call) -> Expression | None:
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


def _sized_method(name: str) -> Writer:
    def write(call: _Call) -> Expression:
        sizes = call.sizes if call.sizes is not None else [str(size) for size in call.op.args[1]]
        return Expression(f"{call.tensor(0)}.{name}({', '.join(sizes)})")

    return write


def _functional(name: str, *keywords: str, start: int = 1) -> Writer:
    """`F.name(x, ...)`: the first `start` arguments stand by position, the following ones by these keywords."""

    def write(call: _Call) -> Expression | None:
        args = call.op.args
        if len(args) > start + len(keywords):
            return None
        texts = [literal(arg, call.values) for arg in args[:start]]
        texts += [f"{key}={literal(arg, call.values)}" for key, arg in zip(keywords, args[start:], strict=False)]
        texts += [f"{key}={literal(arg, call.values)}" for key, arg in call.op.kwargs.items()]
        return Expression(f"F.{name}({', '.join(texts)})")

    return write


def _pow(call: _Call) -> Expression | None:
    return Expression(f"{call.tensor(0)} ** {call.tensor(1)}", POWER) if not call.op.kwargs else None


def _reduction(name: str) -> Writer:
    def write(call: _Call) -> Expression | None:
        if call.op.kwargs:
            return None
        dims = call.arg(1)
        texts = []
        if dims is not None:
            texts.append(str(dims[0]) if isinstance(dims, list) and len(dims) == 1 else literal(dims, call.values))
        if call.arg(2):
            texts.append("keepdim=True")
        return Expression(f"{call.tensor(0)}.{name}({', '.join(texts)})") if len(call.op.args) <= 3 else None

    return write


def _to(call: _Call) -> Expression | None:
    if call.op.target not in {"aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy.default"}:
        return None
    dtype = call.arg(1) if call.op.target == "aten.to.dtype" else call.op.kwargs.get("dtype")
    extra = len(call.op.args) - (2 if call.op.target == "aten.to.dtype" else 1)
    if dtype is None or extra > 0 or set(call.op.kwargs) - {"dtype"}:
        return None
    short = {torch.float32: "float", torch.int64: "long", torch.bool: "bool"}.get(dtype)
    return Expression(f"{call.tensor(0)}.{short}()" if short else f"{call.tensor(0)}.to({dtype})")


def _subscript(call: _Call, dim: int, index: str) -> str:
    rank = len(call.tensors[call.op.inputs[0]].shape)
    after = rank - 1 - dim % rank
    if after < dim % rank and after < 2:
        return f"[..., {index}{', :' * after}]" if rank > 1 else f"[{index}]"
    return f"[{':, ' * (dim % rank)}{index}]"


def _slice(call: _Call) -> Expression | None:
    dim, start, end, step = (call.arg(index, default) for index, default in ((1, 0), (2, None), (3, None), (4, 1)))
    if call.op.kwargs:
        return None
    extent = call.tensors[call.op.inputs[0]].shape[dim]
    low = "" if start in (None, 0) else str(start)
    high = "" if end is None or end >= extent else str(end)
    return Expression(f"{call.tensor(0)}{_subscript(call, dim, f'{low}:{high}' + (f':{step}' if step != 1 else ''))}")


def _select(call: _Call) -> Expression:
    return Expression(f"{call.tensor(0)}{_subscript(call, call.arg(1), str(call.arg(2)))}")


def _index(call: _Call) -> Expression:
    indices = [":" if index is None else literal(index, call.values) for index in call.arg(1)]
    return Expression(f"{call.tensor(0)}[{', '.join(indices)}]")


def _attention(call: _Call) -> Expression:
    names = ("attn_mask", "dropout_p", "is_causal")
    texts = [literal(arg, call.values) for arg in call.op.args[:3]]
    defaults = (None, 0.0, False)
    for name, default, arg in zip(names, defaults, call.op.args[3:], strict=False):
        if arg != default:
            texts.append(f"{name}={literal(arg, call.values)}")
    texts += [f"{key}={literal(arg, call.values)}" for key, arg in call.op.kwargs.items()]
    return Expression(f"F.scaled_dot_product_attention({', '.join(texts)})")


def _cross_entropy(call: _Call) -> Expression | None:
    if call.arg(2) is not None:
        return None
    texts = [call.tensor(0, COMPARE), call.tensor(1, COMPARE), *cross_entropy_options(call.op)]
    return Expression(f"F.cross_entropy({', '.join(texts)})")


def cross_entropy_options(op: Op) -> list[str]:
    """The keyword arguments of a cross-entropy that differ from their defaults."""
    _, _, _, reduction, ignore_index, smoothing = (*op.args, *(None, 1, -100, 0.0)[max(0, len(op.args) - 2) :])
    texts = [] if reduction == 1 else [f'reduction="{("none", "mean", "sum")[reduction]}"']
    texts += [] if ignore_index == -100 else [f"ignore_index={ignore_index}"]
    return texts + ([] if smoothing == 0.0 else [f"label_smoothing={smoothing}"])


def _pad(call: _Call) -> Expression:
    value = call.arg(2, 0)
    integral = not call.tensors[call.op.inputs[0]].dtype.is_floating_point and float(value).is_integer()
    text = f", value={int(value) if integral else value}" if value else ""
    return Expression(f"F.pad({call.tensor(0, COMPARE)}, {literal(tuple(call.arg(1)), call.values)}{text})")


def _clone(call: _Call) -> Expression:
    """A copy that only changes the memory format is `contiguous`: no value of a graph is written to twice."""
    return Expression(f"{call.tensor(0)}.contiguous()")


def _split(call: _Call) -> Expression:
    return Expression(f"{call.tensor(0)}.split({', '.join(call.rest(1))})")


def _grouped(call: _Call) -> Expression:
    return Expression(f"grouped_mm({', '.join(call.rest(0))})")


_FOREIGN: Mapping[str, Writer] = {"transformers.grouped_mm_fallback": _grouped}
"""Ops of other libraries, which a program cannot call without them."""

_WRITERS: Mapping[str, Writer] = {
    "add": _binary("+", SUM),
    "sub": _binary("-", SUM),
    "mul": _binary("*", PRODUCT),
    "div": _binary("/", PRODUCT),
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
    "permute": _method("permute"),
    "unsqueeze": _method("unsqueeze"),
    "squeeze": _method("squeeze"),
    "contiguous": _clone,
    "detach": _method("detach"),
    "clone": _clone,
    "constant_pad_nd": _pad,
    "chunk": _method("chunk"),
    "reshape": _sized_method("reshape"),
    "expand": _sized_method("expand"),
    "repeat": _sized_method("repeat"),
    "to": _to,
    "_to_copy": _to,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "split": _split,
    "split_with_sizes": _split,
    "linear": _functional("linear", start=3),
    "silu": _functional("silu"),
    "gelu": _functional("gelu"),
    "softplus": _functional("softplus", "beta", "threshold"),
    "leaky_relu": _functional("leaky_relu", "negative_slope"),
    "dropout": _functional("dropout", "p", "training"),
    "softmax": _functional("softmax", "dim", "dtype"),
    "log_softmax": _functional("log_softmax", "dim", "dtype"),
    "layer_norm": _functional("layer_norm", "weight", "bias", "eps", start=2),
    "scaled_dot_product_attention": _attention,
    "cross_entropy_loss": _cross_entropy,
}
