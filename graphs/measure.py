"""What each operator costs and keeps: floating-point operations, and what autograd saves for the backward.

The graph is run once on fake tensors, so shapes are followed exactly and nothing is computed. Where the
kernels of an accelerator keep something else than those of a cpu, `_as_on_accelerator` says what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from graphs.interpret import call, fake_tensors
from graphs.ir import Op, OpGraph, Tensor

_DROPOUT_MASK_BYTES = 1


def measured(graph: OpGraph) -> OpGraph:
    """The graph with its tensors as they turn out, and what every op costs and saves.

    FLOPs are those of the forward, as `torch.utils.flop_counter.FlopCounterMode` counts them. A storage that
    autograd keeps and that belongs to a tensor of the graph is listed in `saved` of every op that keeps it.
    """
    with (
        fake_tensors(),
        FlopCounterMode(display=False, custom_mapping=_flop_formulas()) as counter,
    ):
        values = _leaves(graph)
        owners = {value.untyped_storage()._cdata: name for name, value in values.items()}
        tensors = {name: graph.tensors[name] for name in values}
        ops = []
        total = 0
        for op in graph.ops:
            kept = _Saved()
            with kept:
                results = call(_as_on_accelerator(op, graph), values)
            for name, value in results.items():
                storage = owners.setdefault(value.untyped_storage()._cdata, name)
                tensors[name] = Tensor(name, tuple(value.shape), value.dtype, value.requires_grad, storage)
            values.update(results)
            saved = dict.fromkeys(owners[key] for key in kept.storages if key in owners)
            internal = sum(size for key, size in kept.storages.items() if key not in owners)
            internal += _hidden_masks_bytes(op, graph)
            counted = counter.get_total_flops()
            ops.append(replace(op, flops=counted - total, saved=tuple(saved), saved_internal_bytes=internal))
            total = counted
    return replace(graph, ops=tuple(ops), tensors=tensors)


class _Saved(saved_tensors_hooks):
    """Collects the storages that autograd saves, with their sizes in bytes."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage.nbytes()
        self._alive.append(tensor)
        return tensor


def _leaves(graph: OpGraph) -> dict[str, torch.Tensor]:
    names = [
        *graph.inputs,
        *(item.tensor for item in graph.parameters),
        *(item.tensor for item in graph.buffers),
    ]
    leaves = {}
    for name in names:
        spec = graph.tensors[name]
        leaves[name] = torch.empty(spec.shape, dtype=spec.dtype, requires_grad=spec.requires_grad)
    return leaves


def _as_on_accelerator(op: Op, graph: OpGraph) -> Op:
    """The op as it must run here to save what an accelerator's kernel saves.

    Fused attention keeps q, k, v, the output and the log-sum-exp there, with dropout too; the cpu kernel has
    no dropout. Dropout itself keeps a mask of one byte an element (`_hidden_masks_bytes`), not one of the
    operand's dtype.
    """
    if op.target == "aten.scaled_dot_product_attention.default" and len(op.args) > 4 and op.args[4] > 0:
        return replace(op, args=(*op.args[:4], 0.0, *op.args[5:]))
    if op.target == "aten.dropout.default" and graph.tensors[op.inputs[0]].requires_grad:
        return replace(op, target="aten.mul.Tensor", args=(op.args[0], 1.0))
    return op


def _hidden_masks_bytes(op: Op, graph: OpGraph) -> int:
    if op.target == "aten.dropout.default" and graph.tensors[op.inputs[0]].requires_grad:
        return graph.tensors[op.output].num_elements * _DROPOUT_MASK_BYTES
    return 0


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """The fused cpu attention, counted as its accelerator kernels are."""
    return int(sdpa_flop_count(query, key, value))


def _grouped_mm_flops(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Each row of `left` [tokens, k] meets one of the matrices of `right` [groups, k, n]."""
    *rows, inner = left
    return int(2 * prod(rows) * inner * right[-1])


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for the operators that torch's counter does not know."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
        torch.ops.aten._grouped_mm: _grouped_mm_flops,
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):  # there once `transformers` is imported
        formulas[torch.ops.transformers.grouped_mm_fallback] = _grouped_mm_flops
    return formulas
