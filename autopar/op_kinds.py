"""What an op of a local graph is: what bounds it, and what its arguments say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from graphs.ir import Op, Tensor

Kind = Literal["matmul", "attention", "memory", "view", "communication"]

_MATMUL = (
    "linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "addbmm", "einsum", "bilinear", "_grouped_mm",
    "grouped_mm_fallback", "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_WITH_OWN_COLLECTIVES = ("autopar.embedding", "autopar.cross_entropy")


def short_name(op: Op) -> str:
    """`linear` of `aten.linear.default`."""
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_conversion(op: Op) -> bool:
    """Whether the op is a change of placement that `localize` inserted."""
    return op.target.startswith("autopar.") and op.target not in _WITH_OWN_COLLECTIVES


def is_causal(op: Op) -> bool:
    """Whether an attention op masks the future by itself."""
    return op.kwargs.get("is_causal") is True or (len(op.args) > 5 and op.args[5] is True)


def kind_of(op: Op, tensors: Mapping[str, Tensor]) -> Kind:
    """What bounds the op."""
    if is_conversion(op):
        return "communication"
    if op.outputs and all(tensors[name].storage != name for name in op.outputs):
        return "view"
    name = short_name(op)
    if "scaled_dot_product" in name:
        return "attention"
    if name in _MATMUL or op.flops:
        return "matmul"
    return "memory"


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
