"""What an op of a local graph is: what bounds it, and what its arguments say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch

from graphs.ir import Op, Tensor

Kind = Literal["matmul", "attention", "memory", "view", "communication"]

_MATMUL = (
    "linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "addbmm", "einsum", "bilinear", "_grouped_mm",
    "grouped_mm_fallback", "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
EXCHANGES = ("autopar.exchange_counts", "autopar.to_experts", "autopar.from_experts")
"""What carries rows to their experts and back."""

CONSTANTS = frozenset({"aten.full.default", "aten.zeros.default", "aten.ones.default"})
"""Ops that make a tensor of one value, of the shape that is their first argument."""

_SPLIT_OPS = (
    "autopar.embedding", "autopar.cross_entropy", "autopar.batch_norm",
    "autopar.scaled_dot_product_attention", *EXCHANGES,
)  # fmt: skip
"""Ops that know that they are split: a change of placement is none of these."""


def short_name(op: Op) -> str:
    """`linear` of `aten.linear.default`."""
    return _short_name(op.target)


def _short_name(target: str) -> str:
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_conversion(op: Op) -> bool:
    """Whether the op is a change of placement that `localize` inserted."""
    return _is_conversion(op.target)


def _is_conversion(target: str) -> bool:
    return target.startswith("autopar.") and target not in _SPLIT_OPS


def is_causal(op: Op) -> bool:
    """Whether an attention op masks the future by itself."""
    return op.kwargs.get("is_causal") is True or (len(op.args) > 5 and op.args[5] is True)


def without_order(op: Op) -> Op:
    """The op as if its rows were independent, as a context axis splits it: attention without its causal mask,
    a loss that counts its own rows."""
    if "scaled_dot_product" in op.target and is_causal(op):
        args = (*op.args[:5], False, *op.args[6:]) if len(op.args) > 5 else op.args
        kwargs = {**op.kwargs, "is_causal": False} if "is_causal" in op.kwargs else op.kwargs
        return replace(op, args=args, kwargs=kwargs)
    if op.target == "autopar.cross_entropy":
        kwargs = {name: value for name, value in op.kwargs.items() if name != "row_axes"}
        target = op.target if "class_axis" in kwargs else "aten.cross_entropy_loss.default"
        return replace(op, target=target, kwargs=kwargs)
    return op


def kind_of(op: Op, tensors: Mapping[str, Tensor]) -> Kind:
    """What bounds the op."""
    kind = _kind_by_name(op.target)
    if kind == "communication":
        return kind
    if op.outputs and all(tensors[name].storage != name for name in op.outputs):
        return "view"
    return "matmul" if kind == "memory" and op.flops else kind


@lru_cache(maxsize=1024)
def _kind_by_name(target: str) -> Kind:
    """What bounds ops that are called so, unless they are views, or products under another name."""
    if _is_conversion(target):
        return "communication"
    name = _short_name(target)
    if "scaled_dot_product" in name:
        return "attention"
    return "matmul" if name in _MATMUL else "memory"


def has_dropout(op: Op) -> bool:
    """Whether an attention op drops probabilities."""
    probability = op.kwargs.get("dropout_p", op.args[4] if len(op.args) > 4 else 0.0)
    return isinstance(probability, int | float) and probability > 0


def dtype_name(dtype: torch.dtype) -> str:
    """The cost model's name of a torch dtype; what has no arithmetic of its own counts as fp32."""
    return _DTYPE_NAMES.get(dtype, "fp32")


_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
