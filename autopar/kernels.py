"""What the ops of a local graph make a device do: kernels and collectives, forward and backward.

A local graph is the program of one rank (`autopar.localize`), so shapes and FLOPs are what the rank really
does and communication stands in it as ops of its own.

* A matrix product or convolution reads its operands and writes its result; its backward is one such product
  for every operand that has a gradient.
* Fused attention has a backward of five products for the forward's two (arXiv:2205.14135), and with a causal
  mask does half of what the FLOP counter counts. Unfused, it writes and reads the scores for every product,
  the softmax and the dropout.
* Everything else is bound by memory: forward it reads its operands and writes its results, backward it reads
  the results' gradients and what autograd saved and writes the operands' gradients.
* A view costs nothing.

Memory-bound ops that share a kernel (`Traffic`) keep what passes between them in registers, and so its
gradient; what the backward needs of it, it computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from autopar.op_kinds import dtype_name, has_dropout, is_causal, kind_of, short_name
from autopar.traffic import EVERYTHING_TOUCHES_MEMORY, Traffic
from costmodel import CollectiveKind, Software, Work
from graphs.ir import Op, OpGraph, Tensor


class Move(NamedTuple):
    """One collective over a mesh axis; `num_bytes` as `costmodel.Collective` counts them."""

    kind: CollectiveKind
    num_bytes: float
    axis: str


class Kernels(NamedTuple):
    """What one op makes a rank do for one microbatch; `weight` makes parameters' gradients, `backward` all
    others."""

    forward: tuple[Work, ...] = ()
    backward: tuple[Work, ...] = ()
    forward_moves: tuple[Move, ...] = ()
    backward_moves: tuple[Move, ...] = ()
    weight: tuple[Work, ...] = ()


NOTHING = Kernels()

_LOOKUPS = ("embedding", "gather", "index", "index_select", "select_scatter")

CONJUGATES: Mapping[str, tuple[CollectiveKind | None, CollectiveKind | None]] = {
    "all_gather": ("all_gather", "reduce_scatter"),
    "all_gather_replicated": ("all_gather", None),
    "shard": (None, "all_gather"),
    "shard_partial": (None, None),
    "copy": (None, "all_reduce"),
    "all_reduce": ("all_reduce", None),
    "all_reduce_partial": ("all_reduce", "all_reduce"),
    "reduce_scatter": ("reduce_scatter", "all_gather"),
    "all_to_all": ("all_to_all", "all_to_all"),
    "first_only": (None, None),
    "first_grad": (None, None),
}
"""Conversion op -> the collectives of its forward and backward."""


def conversion_moves(
    name: str, num_bytes: float, axis: str, size: int, *, backward: bool
) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
    """The collectives of the change of placement `name` of a tensor of `num_bytes`, whole on the axis of
    `size` ranks: forward, and backward where there is a gradient."""
    forward_kind, backward_kind = CONJUGATES[name]

    def moves(kind: CollectiveKind | None) -> tuple[Move, ...]:
        if kind is None:
            return ()
        return (Move(kind, num_bytes / size if kind == "all_to_all" else num_bytes, axis),)

    return moves(forward_kind), moves(backward_kind) if backward else ()


@dataclass(frozen=True)
class KernelMaker:
    """Makes the kernels of ops under one software.

    `low_precision` is the format that products with parameters inside repeated blocks (`blocks`, module
    paths) run in, if not their own; `axis_sizes` are the ranks on each mesh axis.
    """

    software: Software
    axis_sizes: Mapping[str, int]
    low_precision: str | None = None
    blocks: tuple[str, ...] = ()

    def graph(self, graph: OpGraph) -> tuple[Kernels, ...]:
        """The kernels of every op."""
        traffic = Traffic.of(graph, self.software.fusion)
        parameters = frozenset(graph.parameter_tensors)
        return tuple(self.op(op, graph.tensors, traffic, parameters) for op in graph.ops)

    def op(
        self,
        op: Op,
        tensors: Mapping[str, Tensor],
        traffic: Traffic = EVERYTHING_TOUCHES_MEMORY,
        parameters: frozenset[str] = frozenset(),
    ) -> Kernels:
        """The kernels of one op of a local graph."""
        match kind_of(op, tensors):
            case "view":
                return NOTHING
            case "communication":
                return self._conversion(op, tensors)
            case "matmul":
                return self._matmul(op, tensors, parameters)
            case "attention":
                return self._attention(op, tensors)
            case "memory":
                return self._memory(op, tensors, traffic)

    def _conversion(self, op: Op, tensors: Mapping[str, Tensor]) -> Kernels:
        axis = op.kwargs["axis"]
        size = self.axis_sizes[axis]
        source, result = tensors[op.inputs[0]], tensors[op.output]
        name = op.target.removeprefix("autopar.")
        whole = max(source.num_bytes, result.num_bytes)
        if name == "all_to_all":
            whole = source.num_bytes * size
        forward, backward = conversion_moves(name, whole, axis, size, backward=source.requires_grad)
        return Kernels(forward_moves=forward, backward_moves=backward)

    # --- products -------------------------------------------------------------------------------------------

    def _matmul(self, op: Op, tensors: Mapping[str, Tensor], parameters: frozenset[str]) -> Kernels:
        operands = [tensors[name] for name in dict.fromkeys(op.inputs)]
        result = tensors[op.outputs[0]]
        shape = self._product_shape(op, tensors)
        batch, m, n, k = shape
        num_bytes = sum(tensor.num_bytes for tensor in (*operands, result))
        dtype, casts = dtype_name(result.dtype), 0.0
        if self.low_precision and self.is_low(op, parameters):
            dtype = self.low_precision
            casts = _CAST_BYTES * tensors[op.inputs[0]].num_elements
        one_by_one = self.software.grouped_launches and "grouped_mm" in short_name(op)
        launches = batch if one_by_one else 1
        forward = [Work(op.flops, num_bytes, dtype, "matmul", shape, launches)]
        backward: list[Work] = []
        weight: list[Work] = []
        shapes = ((batch, m, k, n), (batch, k, n, m))
        for name, turned in zip(op.inputs[:2], shapes, strict=False):
            if result.requires_grad and tensors[name].requires_grad:
                is_weight = name in parameters
                adds = is_weight and self.software.fused_gradient_accumulation
                added = _ADDING_BYTES * tensors[name].num_elements if adds else 0
                work = Work(op.flops, num_bytes + added, dtype, "matmul", turned, launches)
                (weight if is_weight else backward).append(work)
        if casts:
            forward.insert(0, Work(0, casts, "bf16", "memory", (), launches))
            if result.requires_grad:
                casts = _CAST_BYTES * result.num_elements
                backward.insert(0, Work(0, casts, "bf16", "memory", (), launches))
        return Kernels(tuple(forward), tuple(backward), weight=tuple(weight))

    def _product_shape(self, op: Op, tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
        """`(batch, m, n, k)` of the product; a convolution is the product of its patches and its filters."""
        result = tensors[op.outputs[0]]
        operands = [tensors[name] for name in op.inputs[:2]]
        columns = result.shape[-1] if result.shape else 1
        batch = 1
        name = short_name(op)
        if "conv" in name:
            columns = result.shape[1]
        elif "grouped_mm" in name:
            batch = max(1, operands[1].shape[0] // self.axis_sizes.get("ep", 1))
        elif len(operands) > 1 and all(len(tensor.shape) > 2 for tensor in operands):
            for extent in result.shape[:-2]:
                batch *= extent
        rows = max(1, result.num_elements // max(1, columns * batch))
        depth = max(1, round(op.flops / max(1, 2 * batch * rows * columns)))
        return batch, rows, columns, depth

    def is_low(self, op: Op, parameters: frozenset[str]) -> bool:
        """Whether the op is a product with a parameter, inside a block, that runs in `low_precision`."""
        if self.low_precision is None or not op.flops or len(op.inputs) < 2:
            return False
        inside = any(op.module == path or op.module.startswith(f"{path}.") for path in self.blocks)
        return inside and ("grouped_mm" in op.target or any(one in parameters for one in op.inputs[:2]))

    # --- attention ------------------------------------------------------------------------------------------

    def _attention(self, op: Op, tensors: Mapping[str, Tensor]) -> Kernels:
        query, key, value = (tensors[name] for name in op.inputs[:3])
        result = tensors[op.outputs[0]]
        heads = query.num_elements // (query.shape[-1] * query.shape[-2])
        shape = (heads, query.shape[-2], key.shape[-2], query.shape[-1])
        if self.software.attention == "unfused":
            return self._unfused_attention(op, shape, dtype_name(result.dtype), result.requires_grad)
        num_bytes = query.num_bytes + key.num_bytes + value.num_bytes + result.num_bytes
        flops = op.flops * self._attended(op, shape)
        kind: Literal["attention", "native_attention"] = (
            "native_attention" if self.software.attention == "native" else "attention"
        )
        dtype = dtype_name(result.dtype)
        forward = (Work(flops, num_bytes, dtype, kind, shape),)
        slower = 2.5 / self.software.attention_backward_share
        backward = (Work(slower * flops, 2 * num_bytes, dtype, kind, shape),) if result.requires_grad else ()
        return Kernels(forward, backward)

    def _attended(self, op: Op, shape: tuple[int, int, int, int]) -> float:
        """The share of the scores that a kernel computes: a causal mask halves them, and kernels written for
        the device skip what is outside a window, which torch's own take as any mask."""
        keys = shape[2]
        if op.window is not None and op.window < keys and self.software.attention == "native":
            return op.window / keys * (1 - op.window / (2 * keys))
        return 0.5 if is_causal(op) else 1.0

    def _unfused_attention(
        self, op: Op, shape: tuple[int, int, int, int], dtype: str, requires_grad: bool
    ) -> Kernels:
        heads, queries, keys, head_dim = shape
        scores = heads * queries * keys
        outer = heads * (queries + keys) * head_dim
        flops = op.flops / 2  # of one product
        into_scores = Work(flops, 2 * (scores + outer), dtype, "matmul", (heads, queries, keys, head_dim))
        from_scores = Work(flops, 2 * (scores + outer), dtype, "matmul", (heads, queries, head_dim, keys))
        softmax = Work(0, 4 * scores, dtype, "memory")
        softmax_backward = Work(0, 6 * scores, dtype, "memory")
        dropout = (Work(0, 5 * scores, dtype, "memory"),) if has_dropout(op) else ()  # with a mask of bytes
        forward = (into_scores, softmax, *dropout, from_scores)
        backward = (into_scores, *(from_scores,) * 3, *dropout, softmax_backward) if requires_grad else ()
        return Kernels(forward, backward)

    # --- bound by memory ------------------------------------------------------------------------------------

    def _memory(self, op: Op, tensors: Mapping[str, Tensor], traffic: Traffic) -> Kernels:
        operands = {tensors[name].storage: tensors[name] for name in op.inputs}
        results = [tensors[name] for name in op.outputs]
        dtype = dtype_name(results[0].dtype)
        fetched = [tensor for storage, tensor in operands.items() if traffic.is_read(storage)]
        stored = [tensor for tensor in results if traffic.is_read(tensor.storage)]
        read, written = _bytes(fetched), _bytes(stored)
        if short_name(op) in _LOOKUPS:
            read = min(read, 2 * _bytes(results))
        forward = _kernel(read + written, dtype, launched=written > 0)
        backward: tuple[Work, ...] = ()
        if any(tensor.requires_grad for tensor in results):
            gradients = _bytes([tensor for tensor in fetched if tensor.requires_grad])
            num_bytes = gradients + op.saved_internal_bytes
            num_bytes += _bytes([tensor for tensor in stored if tensor.requires_grad])
            reachable = operands | {tensor.storage: tensor for tensor in results}
            num_bytes += _bytes([reachable[s] for s in op.saved if s in reachable and traffic.is_read(s)])
            backward = _kernel(num_bytes, dtype, launched=gradients > 0)
        return Kernels(forward, backward, *self._own_moves(op, tensors))

    def _own_moves(self, op: Op, tensors: Mapping[str, Tensor]) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
        """Communication inside an op that knows it is split, forward and backward: a vocabulary-parallel loss
        reduces three row vectors, a batch norm gathers two channel vectors and reduces two."""
        if op.target == "autopar.batch_norm":
            return self._norm_moves(op, tensors[op.inputs[0]])
        if op.target != "autopar.cross_entropy":
            return (), ()
        rows = tensors[op.inputs[0]]
        moves: tuple[Move, ...] = ()
        if "class_axis" in op.kwargs:
            num_bytes = rows.num_bytes / max(1, rows.shape[-1])
            moves += (Move("all_reduce", num_bytes, op.kwargs["class_axis"]),) * 3
        return moves + tuple(Move("all_reduce", 8, axis) for axis in op.kwargs.get("row_axes", ())), ()

    def _norm_moves(self, op: Op, x: Tensor) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
        """Mean and variance of every rank's rows, and sums over the gradient's rows."""
        axis, vectors_bytes = op.kwargs["row_axis"], 2 * x.shape[1] * max(x.dtype.itemsize, 4)
        gathered = Move("all_gather", vectors_bytes * self.axis_sizes[axis], axis)
        return (gathered,), (Move("all_reduce", vectors_bytes, axis),) if x.requires_grad else ()


_CAST_BYTES = 4
"""Of quantising an element of two bytes: read it, write it as a byte, and transposed as another."""


_ADDING_BYTES = 6
"""Reading and writing an fp32 sum rather than writing a gradient of two bytes."""


def _kernel(num_bytes: float, dtype: str, *, launched: bool) -> tuple[Work, ...]:
    return (Work(0, num_bytes, dtype, "memory", (), int(launched)),) if num_bytes else ()


def _bytes(tensors: Iterable[Tensor]) -> float:
    return sum([tensor.num_bytes for tensor in tensors])
