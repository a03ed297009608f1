"""Which products of a stage leave the gradients of their weights for later.

A schedule that splits backwards (zero bubbles, arXiv:2401.10241) sends the gradients of activations on first,
and computes those of weights where a rank would wait. Products with a trained matrix are written as calls of
the runtime that leave the second part; all other ops compute both at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from autopar.rewrite.stages import Stage
from graphs.ir import Op, OpGraph, Ref
from graphs.rules.arguments import arguments

NAMESPACE = "deferred."
"""Before the name of a product that leaves its weight's gradient."""

_GROUPED = frozenset({"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"})
_NAMES = {
    "aten.linear.default": "linear",
    "aten.matmul.default": "matmul",
    "aten.mm.default": "matmul",
    **{f"aten.conv{dims}d.default": "convolution" for dims in (1, 2, 3)},
}


def defer_weights(stage: Stage, graph: OpGraph) -> Stage:
    """The stage with products that leave the gradients of their weights.

    A matrix that something else reads too, such as a table of embeddings, gets its gradient at once: torch
    tells that a gradient is complete when the first part of it arrives.
    """
    products = [op for op in stage.ops if _is_weight_product(op, graph)]
    others = {name for op in stage.ops if op not in products for name in op.inputs}
    deferred = {op.name for op in products if op.inputs[1] not in others}
    ops = (
        replace(op, target=NAMESPACE + _NAMES[op.target]) if op.name in deferred else op for op in stage.ops
    )
    return replace(stage, ops=tuple(_with_grouped(tuple(ops), graph)))


def _with_grouped(ops: Sequence[Op], graph: OpGraph) -> Iterator[Op]:
    """The ops with grouped products by the parameter itself, where they alone read it or its transpose, that
    leave its gradient."""
    readers = Counter(name for op in ops for name in op.inputs)
    views = {op.output: op for op in ops if op.target == "aten.transpose.int" and readers[op.output] == 1}
    found: dict[str, Op] = {}
    absorbed: set[str] = set()
    for op in ops:
        if not _is_plain_grouped(op):
            continue
        view = views.get(op.args[1].name)
        weight = view.inputs[0] if view else op.args[1].name
        turns = view is None or {dim % 3 for dim in view.args[1:]} == {1, 2}
        is_trained = weight in graph.parameter_tensors and graph.tensors[weight].requires_grad
        if is_trained and turns and readers[weight] == 1 and len(graph.tensors[weight].shape) == 3:
            args = (op.args[0], Ref(weight), arguments(op)["offs"], *((True,) if view else ()))
            found[op.name] = replace(op, target=f"{NAMESPACE}grouped_mm", args=args, kwargs={})
            absorbed |= {view.name} if view else set()
    return (found.get(op.name, op) for op in ops if op.name not in absorbed)


def _is_plain_grouped(op: Op) -> bool:
    """Whether an op multiplies rows by the matrices of their groups, without a bias or another dtype."""
    if op.target not in _GROUPED:
        return False
    given = {name for name, value in arguments(op).values.items() if value is not None}
    return "offs" in given and len(given) == 3


def _is_weight_product(op: Op, graph: OpGraph) -> bool:
    """Whether an op multiplies by a trained matrix, without a bias, or convolves with a trained kernel."""
    if op.target not in _NAMES or op.kwargs or op.inputs[1] not in graph.parameter_tensors:
        return False
    x, weight, *others = (graph.tensors[name] for name in op.inputs)
    if not weight.requires_grad:
        return False
    if _NAMES[op.target] == "convolution":
        return len(x.shape) == len(weight.shape) and not any(isinstance(arg, str) for arg in op.args)
    return len(weight.shape) == 2 and len(x.shape) > 1 and not others
