"""One op as a Python expression.

Common ops have a form a person would write (`x + y`, `x.transpose(1, 2)`, `F.silu(x)`). Every other op is
printed as a call of its ATen overload, which means exactly what was captured, so that no op is ever
unprintable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    sizes: Callable[[str], list[str]],
    device: str | None,
) -> Expression:
    """The expression that computes `op`.

    `values` are the expressions of its `tensors`; `sizes` gives the shape of a tensor as text, so that the
    size arguments of ops like `reshape` can be named; `device` is the expression of the device on which ops
    without tensors make theirs.
    """
    namespace, name, _ = op.target.split(".", 2)
    writer = _WRITERS.get(name) if namespace == "aten" else _FOREIGN.get(f"{namespace}.{name}")
    if writer is not None:
        written = writer(Call(op, values, tensors, sizes))
        if written is not None:
            return written
    return _generic(op, values, sizes, device)


@dataclass(frozen=True)
class Call:
    """An op with its arguments as text."""

    op: Op
    values: Values
    tensors: Mapping[str, Tensor]
    sizes: Callable[[str], list[str]]

    def tensor(self, index: int, level: int = ATOM) -> str:
        return _operand(self.op.args[index], self.values, level)

    def arg(self, index: int, default: Any = None) -> Any:
        return self.op.args[index] if index < len(self.op.args) else default

    def dtype(self, index: int) -> torch.dtype:
        return self.tensors[self.op.args[index].name].dtype

    def rest(self, start: int) -> list[str]:
        """Arguments from `start` on, and the keyword ones."""
        return _arguments(self.op.args[start:], self.op.kwargs, self.values)


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


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
    return [literal(arg, values) for arg in args] + [
        f"{key}={literal(arg, values)}" for key, arg in kwargs.items()
    ]


def _generic(op: Op, values: Values, sizes: Callable[[str], list[str]], device: str | None) -> Expression:
    namespace, name, _ = op.target.split(".", 2)
    arguments = _arguments(op.args, op.kwargs, values)
    if name in _SHAPE_ARGUMENT:
        arguments[_SHAPE_ARGUMENT[name]] = f"[{', '.join(sizes(op.output))}]"
    if device is not None and not op.inputs:
        arguments.append(f"device={device}")
    function = _RENAMED.get(op.target) or (f"torch.{name}" if name in _TORCH_FUNCTIONS else None)
    if namespace != "aten" or function is None:
        function = f"torch.ops.{op.target}"
    return Expression(f"{function}({', '.join(arguments)})")


_SHAPE_ARGUMENT = {
    **dict.fromkeys(("full", "zeros", "ones", "empty", "rand", "randn"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 1),
}
"""Where ops that make a tensor are told its shape."""

_RENAMED = {"aten.min.other": "torch.minimum", "aten.max.other": "torch.maximum"}
"""ATen overloads whose function in `torch` has another name."""

_NAMES = """
    abs addcmul addmm all amax amin any arange argmax argsort baddbmm bmm cat ceil clamp complex cos cumsum
    diff div einsum erf exp expm1 eye flip floor full full_like gather histc index_add index_select isinf
    isnan linspace log log1p log2 logical_and logical_not logical_or logsumexp masked_fill maximum minimum
    narrow ones ones_like outer polar reciprocal relu roll round rsqrt scatter scatter_add select_scatter
    sigmoid sign sin slice_scatter sort sqrt square stack tanh tile topk tril triu unbind where zeros
    zeros_like
"""
_TORCH_FUNCTIONS = frozenset(_NAMES.split())
"""ATen ops whose function of the same name in `torch` takes the same arguments."""

Writer = Callable[[Call], Expression | None]


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


def _sized_method(name: str, shape_argument: int | None = None) -> Writer:
    """`x.name(sizes)`; with the shape argument at that place, sizes are the ones of the result."""

    def write(call: Call) -> Expression:
        sizes = call.sizes(call.op.output) if shape_argument else [str(size) for size in call.op.args[1]]
        return Expression(f"{call.tensor(0)}.{name}({', '.join(sizes) or '()'})")

    return write


def _new(name: str) -> Writer:
    def write(call: Call) -> Expression:
        texts = [_tuple(call.sizes(call.op.output)), *call.rest(2)]
        return Expression(f"{call.tensor(0)}.{name}({', '.join(texts)})")

    return write


def _functional(name: str, *keywords: str, start: int = 1) -> Writer:
    """`F.name(x, ...)`: the first `start` arguments stand by position, the following ones by these
    keywords."""

    def write(call: Call) -> Expression | None:
        args = call.op.args
        if len(args) > start + len(keywords):
            return None
        texts = [literal(arg, call.values) for arg in args[:start]]
        texts += [
            f"{key}={literal(arg, call.values)}" for key, arg in zip(keywords, args[start:], strict=False)
        ]
        texts += [f"{key}={literal(arg, call.values)}" for key, arg in call.op.kwargs.items()]
        return Expression(f"F.{name}({', '.join(texts)})")

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


def _attention(call: Call) -> Expression:
    texts = [literal(arg, call.values) for arg in call.op.args[:3]]
    options = attention_options(call.op, call.tensors)
    texts += [f"{name}={literal(arg, call.values)}" for name, arg in options.items()]
    return Expression(f"F.scaled_dot_product_attention({', '.join(texts)})")


def attention_options(op: Op, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of an attention that differ from their defaults: a mask, dropout, a scale other
    than one over the root of the head size."""
    query, key = (tensors[op.inputs[index]] for index in (0, 1))
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), op.args[3:], strict=False)) | dict(op.kwargs)
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    if given.get("scale") is not None and math.isclose(
        given["scale"], query.shape[-1] ** -0.5, rel_tol=1e-12
    ):
        del given["scale"]
    if len(query.shape) == 4 and query.shape[-3] == key.shape[-3]:
        given.pop("enable_gqa", None)
    return {name: value for name, value in given.items() if name in defaults and value != defaults[name]}


def _cross_entropy(call: Call) -> Expression | None:
    if call.arg(2) is not None:
        return None
    texts = [call.tensor(0, COMPARE), call.tensor(1, COMPARE), *cross_entropy_options(call.op)]
    return Expression(f"F.cross_entropy({', '.join(texts)})")


REDUCTIONS = ("none", "mean", "sum")
"""torch's names of the reductions, by its numbers."""


def cross_entropy_options(op: Op) -> list[str]:
    """The keyword arguments of a cross-entropy that differ from their defaults."""
    given = dict(zip(("reduction", "ignore_index", "label_smoothing"), op.args[3:], strict=False))
    reduction: int = given.get("reduction", 1)
    ignore_index: int = given.get("ignore_index", -100)
    smoothing: float = given.get("label_smoothing", 0.0)
    texts = [] if reduction == 1 else [f'reduction="{REDUCTIONS[reduction]}"']
    texts += [] if ignore_index == -100 else [f"ignore_index={ignore_index}"]
    return texts + ([] if smoothing == 0.0 else [f"label_smoothing={smoothing}"])


def _loss(name: str) -> Writer:
    """A loss of two tensors and a reduction."""

    def write(call: Call) -> Expression | None:
        if len(call.op.args) > 3 or call.op.kwargs.keys() - {"reduction"}:
            return None
        number: int = call.arg(2, call.op.kwargs.get("reduction", 1))
        reduction = REDUCTIONS[number]
        texts = [literal(arg, call.values) for arg in call.op.args[:2]]
        texts += [] if reduction == "mean" else [f'reduction="{reduction}"']
        return Expression(f"F.{name}({', '.join(texts)})")

    return write


def _compact(value: Any) -> str:
    """A size for every spatial dimension: one number where all are the same."""
    return str(value[0]) if isinstance(value, list) and len(set(value)) == 1 else literal(value, {})


def _convolution(name: str) -> Writer:
    def write(call: Call) -> Expression | None:
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given = dict(zip(defaults, call.op.args[3:], strict=False))
        if call.op.kwargs or isinstance(given.get("padding"), str):
            return None
        texts = [literal(arg, call.values) for arg in call.op.args[:3] if arg is not None]
        texts += [
            f"{key}={_compact(value)}"
            for key, value in given.items()
            if _compact(value) != str(defaults[key])
        ]
        return Expression(f"F.{name}({', '.join(texts)})")

    return write


def _max_pool(call: Call) -> Expression:
    """The stride is the size of the window unless given."""
    texts = [call.tensor(0, COMPARE), _compact(call.arg(1))]
    defaults = {"stride": (texts[1], "[]"), "padding": ("0",), "dilation": ("1",), "ceil_mode": ("False",)}
    given = dict(zip(defaults, call.op.args[2:], strict=False))
    texts += [
        f"{key}={_compact(value)}" for key, value in given.items() if _compact(value) not in defaults[key]
    ]
    return Expression(f"F.max_pool2d({', '.join(texts)})")


def _batch_norm(call: Call) -> Expression:
    """`F` wants the running statistics before weight and bias."""
    x, weight, bias, mean, variance, training, momentum, eps = (
        literal(arg, call.values) for arg in call.op.args[:8]
    )
    options = f"weight={weight}, bias={bias}, training={training}, momentum={momentum}, eps={eps}"
    return Expression(f"F.batch_norm({x}, {mean}, {variance}, {options})")


def _broadcast(call: Call) -> Expression:
    return Expression(
        f"torch.broadcast_tensors({', '.join(literal(arg, call.values) for arg in call.arg(0))})"
    )


def _group_norm(call: Call) -> Expression:
    texts = [literal(arg, call.values) for arg in call.op.args[:4]]
    texts += [f"eps={call.op.args[4]}"] if len(call.op.args) > 4 and call.op.args[4] != 1e-5 else []
    return Expression(f"F.group_norm({', '.join(texts)})")


def _pad(call: Call) -> Expression:
    value = call.arg(2, 0)
    integral = not call.tensors[call.op.inputs[0]].dtype.is_floating_point and float(value).is_integer()
    text = f", value={int(value) if integral else value}" if value else ""
    return Expression(f"F.pad({call.tensor(0, COMPARE)}, {literal(tuple(call.arg(1)), call.values)}{text})")


def _clone(call: Call) -> Expression:
    """A copy that only changes the memory format is `contiguous`: no value of a graph is written to twice."""
    return Expression(f"{call.tensor(0)}.contiguous()")


def _split(call: Call) -> Expression:
    return Expression(f"{call.tensor(0)}.split({', '.join(call.rest(1))})")


def _grouped(call: Call) -> Expression:
    return Expression(f"grouped_mm({', '.join(call.rest(0))})")


_FOREIGN: Mapping[str, Writer] = {"transformers.grouped_mm_fallback": _grouped}
"""Ops of other libraries, which a program cannot call without them."""

_WRITERS: Mapping[str, Writer] = {
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
    "constant_pad_nd": _pad,
    "chunk": _method("chunk"),
    "reshape": _sized_method("reshape", 1),
    "expand": _sized_method("expand", 1),
    **{name: _new(name) for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
    "repeat": _sized_method("repeat"),
    "to": _to,
    "_to_copy": _to,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "split": _split,
    "split_with_sizes": _split,
    "linear": _functional("linear", start=3),
    "_grouped_mm": _functional("grouped_mm", "offs", start=2),
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
    **{name: _loss(name) for name in ("mse_loss", "l1_loss", "soft_margin_loss")},
    **{name: _convolution(name) for name in ("conv1d", "conv2d", "conv3d")},
    "max_pool2d": _max_pool,
    "batch_norm": _batch_norm,
    "broadcast_tensors": _broadcast,
    "adaptive_avg_pool2d": lambda call: Expression(
        f"F.adaptive_avg_pool2d({call.tensor(0, COMPARE)}, {_compact(call.arg(1))})"
    ),
    "group_norm": _group_norm,
}
