"""One op as a Python expression.

Common ops have a form a person would write (`x + y`, `x.transpose(1, 2)`, `F.silu(x)`). Every other op is
printed as a call of its ATen overload, which means exactly what was captured, so that no op is ever
unprintable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autopar.rewrite.expressions import Call, Expression, Values, Writer, arguments
from autopar.rewrite.function_forms import FUNCTION_FORMS
from autopar.rewrite.method_forms import METHOD_FORMS
from graphs.ir import Op, Tensor


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
    writer = _FORMS.get(name) if namespace == "aten" else _FOREIGN.get(f"{namespace}.{name}")
    if writer is not None:
        written = writer(Call(op, values, tensors, sizes))
        if written is not None:
            return written
    return _generic(op, values, sizes, device)


def _generic(op: Op, values: Values, sizes: Callable[[str], list[str]], device: str | None) -> Expression:
    namespace, name, _ = op.target.split(".", 2)
    texts = arguments(op.args, op.kwargs, values)
    if name in _SHAPED:
        texts[0] = f"[{', '.join(sizes(op.output))}]"
    if device is not None and not op.inputs:
        texts.append(f"device={device}")
    function = _RENAMED.get(op.target) or (f"torch.{name}" if name in _TORCH_FUNCTIONS else None)
    if namespace != "aten" or function is None:
        function = f"torch.ops.{op.target}"
    return Expression(f"{function}({', '.join(texts)})")


_SHAPED = frozenset({"full", "zeros", "ones", "empty", "rand", "randn"})
"""Ops that make a tensor without reading any; their first argument is its shape."""

_RENAMED = {"aten.min.other": "torch.minimum", "aten.max.other": "torch.maximum"}
"""ATen overloads whose function in `torch` has another name."""

_NAMES = """
    abs addcmul addmm all amax amin any arange argmax argsort baddbmm bmm cat ceil clamp complex cos
    cumsum diff div einsum empty_like erf exp expm1 eye flip floor full full_like gather histc index_add
    index_put index_select isinf isnan linspace log log1p log2 logical_and logical_not logical_or
    logsumexp masked_fill maximum minimum narrow ones ones_like outer polar reciprocal relu roll round
    rsqrt scatter scatter_add select_scatter sigmoid sign sin slice_scatter sort sqrt square stack tanh
    tile topk tril triu unbind where zeros zeros_like
"""
_TORCH_FUNCTIONS = frozenset(_NAMES.split())
"""ATen ops whose function of the same name in `torch` takes the same arguments."""


def _grouped(call: Call) -> Expression:
    """A function of the runtime."""
    return Expression(f"grouped_mm({', '.join(call.rest(0))})")


_FOREIGN: Mapping[str, Writer] = {"transformers.grouped_mm_fallback": _grouped}
"""Ops of other libraries, which a program cannot call without them."""

_FORMS: Mapping[str, Writer] = {**METHOD_FORMS, **FUNCTION_FORMS}
