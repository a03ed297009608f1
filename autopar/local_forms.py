"""Local forms of ops that a split factor makes into another op: the `implementation` of a strategy.

Each is given the op with local operands, the axis and its size, and yields what a rank runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from graphs.ir import Op, Ref


def _mean(op: Op, axis: str, size: int) -> Iterator[Op]:
    """A mean over a split dimension: the local mean, divided by the number of shards, is this rank's term."""
    inner = f"{op.output}__local"
    yield replace(op, name=inner, outputs=(inner,))
    yield Op(op.name, "aten.div.Tensor", (Ref(inner), size), {}, op.outputs, op.module)


def _on_axis(target: str, keyword: str) -> Callable[[Op, str, int], Iterator[Op]]:
    """The same op as a function of the runtime that is told on which axis it is split."""

    def rewrite(op: Op, axis: str, size: int) -> Iterator[Op]:
        yield replace(op, target=target, kwargs={**op.kwargs, keyword: axis})

    return rewrite


def _loss_rows(op: Op, axis: str, size: int) -> Iterator[Op]:
    """A loss whose rows are split, over one axis or over several one after the other."""
    axes = (*op.kwargs.get("row_axes", ()), axis)
    yield replace(op, target="autopar.cross_entropy", kwargs={**op.kwargs, "row_axes": axes})


def _inverse_order(op: Op, axis: str, size: int) -> Iterator[Op]:
    """0, 1, 2, ... placed where a permutation says is its inverse; each rank has numbers of its own rows."""
    order = op.args[1][0]
    rows = None if op.rows is None else (op.rows[op.inputs.index(order.name)], op.rows[-1])
    yield replace(op, target="aten.argsort.default", args=(order,), kwargs={}, rows=rows)


LOCAL_FORMS: Mapping[str, Callable[[Op, str, int], Iterator[Op]]] = {
    "mean": _mean,
    "vocab_parallel_embedding": _on_axis("autopar.embedding", "vocab_axis"),
    "cross_entropy_rows": _loss_rows,
    "batch_norm_rows": _on_axis("autopar.batch_norm", "row_axis"),
    "inverse_order": _inverse_order,
    "vocab_parallel_cross_entropy": _on_axis("autopar.cross_entropy", "class_axis"),
}
