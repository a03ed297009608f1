"""Ops that are written as functions of `torch.nn.functional`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autopar.rewrite.expressions import COMPARE, Call, Expression, Writer, literal
from graphs.ir import Op, Tensor


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


FUNCTION_FORMS: Mapping[str, Writer] = {
    "constant_pad_nd": _pad,
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
"""By the name of the ATen op."""
