"""What the ops of a local graph cost on a cluster: seconds of computing and of communication, forward and
backward.

A local graph is the program of one rank (`autopar.localize`), so shapes and FLOPs are what the rank really
does and communication stands in it as ops of its own. Every op is one roofline `Work`:

* a matrix product or convolution reads its operands and writes its result; its backward is one such product
  for every operand that has a gradient;
* fused attention has a backward of 2.5 times its forward (five products for two, arXiv:2205.14135), and with
  a causal mask does half of what the FLOP counter counts;
* everything else is bound by memory: forward it reads its operands and writes its results, backward it reads
  the results' gradients and what autograd saved and writes the operands' gradients;
* a view costs nothing.

Chains of memory-bound ops are priced as the one kernel that a compiler makes of them: a value that only the
next such op reads never touches memory (see `Traffic`), and neither does its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from costmodel import Algorithm, CollectiveKind, Group, Work, algorithms, work_time_s
from graphs.ir import Op, OpGraph, Tensor
from hardware_db import Cluster

Kind = Literal["matmul", "attention", "memory", "view", "communication"]


class OpCost(NamedTuple):
    """Seconds of one op for one microbatch; costs add with `+` by `total`."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_communication_s: float = 0.0
    backward_communication_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self)

    @property
    def forward_total_s(self) -> float:
        """What running the forward again would take."""
        return self.forward_s + self.forward_communication_s


def total(costs: Iterable[OpCost]) -> OpCost:
    """The sum, field by field."""
    columns = list(zip(*costs, strict=True))
    return OpCost(*map(sum, columns)) if columns else OpCost()


# --- what an op is ------------------------------------------------------------------------------------------

_MATMUL = (
    "linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "addbmm", "einsum", "bilinear", "_grouped_mm",
    "grouped_mm_fallback", "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_LOOKUPS = ("embedding", "gather", "index", "index_select", "select_scatter")
_WITH_OWN_COLLECTIVES = ("autopar.embedding", "autopar.cross_entropy")

_CONJUGATES: Mapping[str, tuple[CollectiveKind | None, CollectiveKind | None]] = {
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


def short_name(op: Op) -> str:
    """`linear` of `aten.linear.default`."""
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_conversion(op: Op) -> bool:
    """Whether the op is a change of placement that `localize` inserted."""
    return op.target.startswith("autopar.") and op.target not in _WITH_OWN_COLLECTIVES


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


# --- which values touch memory ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Storages that a fused chain keeps in registers.

    `unread` ones go from one memory-bound op to another, their only reader; `unwritten` are those of them
    that autograd does not save either. Changes of placement and views on the way do not count as readers, so
    a graph and its local form agree on both. `root` maps the storage of a converted tensor to the one it was
    converted from.
    """

    unread: frozenset[str]
    unwritten: frozenset[str]
    root: Mapping[str, str]

    @staticmethod
    def of(graph: OpGraph) -> Traffic:
        tensors = graph.tensors
        root: dict[str, str] = {}
        made_by: dict[str, Kind] = {}
        readers: dict[str, list[Kind]] = {}
        saved: set[str] = set()
        for op in graph.ops:
            kind = kind_of(op, tensors)
            if kind == "communication":
                source = tensors[op.inputs[0]].storage
                root[op.output] = root.get(source, source)
                continue
            if kind != "view":
                made_by.update(dict.fromkeys(op.outputs, kind))
                for storage in {tensors[name].storage for name in op.inputs}:
                    readers.setdefault(root.get(storage, storage), []).append(kind)
            saved.update(root.get(storage, storage) for storage in op.saved)
        kept = {root.get(tensors[name].storage, tensors[name].storage) for name in graph.outputs}
        unread = frozenset(
            storage
            for storage, kinds in readers.items()
            if kinds == ["memory"] and made_by.get(storage) == "memory" and storage not in kept
        )
        return Traffic(unread, unread - saved, root)

    def is_read(self, storage: str) -> bool:
        """Whether reading the storage, or its gradient, goes to memory."""
        return self.root.get(storage, storage) not in self.unread

    def is_written(self, storage: str) -> bool:
        return self.root.get(storage, storage) not in self.unwritten

    def __or__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.unread | other.unread, self.unwritten | other.unwritten, {**self.root, **other.root}
        )


# --- prices -------------------------------------------------------------------------------------------------


class Pricer:
    """Prices the ops of local graphs on one cluster.

    `groups` says where the ranks of each mesh axis lie. Collectives' lines are kept, since a search asks for
    few kinds and many sizes.
    """

    def __init__(self, cluster: Cluster, groups: Mapping[str, Group]) -> None:
        self.cluster = cluster
        self.groups = dict(groups)
        self._lines: dict[tuple[str, Group], tuple[Algorithm, ...]] = {}

    def graph(self, graph: OpGraph) -> tuple[OpCost, ...]:
        """The cost of every op."""
        traffic = Traffic.of(graph)
        return tuple(self.op(op, graph.tensors, traffic) for op in graph.ops)

    def op(self, op: Op, tensors: Mapping[str, Tensor], traffic: Traffic) -> OpCost:
        """The cost of one op of a local graph."""
        kind = kind_of(op, tensors)
        match kind:
            case "view":
                return OpCost()
            case "communication":
                return self._conversion(op, tensors)
            case "matmul":
                return self._matmul(op, tensors)
            case "attention":
                return self._attention(op, tensors)
            case "memory":
                return self._memory(op, tensors, traffic)

    def conversion(self, name: str, num_bytes: float, axis: str, *, backward: bool) -> OpCost:
        """The cost of the change of placement `name` on a tensor of `num_bytes`, whole on the axis."""
        forward_kind, backward_kind = _CONJUGATES[name]
        size = self.groups[axis].size
        return OpCost(
            forward_communication_s=self._move_s(forward_kind, num_bytes, axis, size),
            backward_communication_s=self._move_s(backward_kind, num_bytes, axis, size) if backward else 0.0,
        )

    def bucketed_s(self, kind: CollectiveKind, num_bytes: float, group: Group) -> float:
        """Seconds that many small tensors add to a collective over flat buckets: bandwidth only, so linear in
        bytes."""
        return min((line.s_per_byte for line in self._lines_of(kind, group)), default=0.0) * num_bytes

    def collective_s(self, kind: CollectiveKind, num_bytes: float, group: Group) -> float:
        """Seconds of one collective; `num_bytes` as `costmodel.Collective` counts them."""
        if not num_bytes:
            return 0.0
        return min((line.time_s(num_bytes) for line in self._lines_of(kind, group)), default=0.0)

    def _lines_of(self, kind: CollectiveKind, group: Group) -> tuple[Algorithm, ...]:
        key = (kind, group)
        if key not in self._lines:
            self._lines[key] = algorithms(kind, group, self.cluster)
        return self._lines[key]

    def _move_s(self, kind: CollectiveKind | None, num_bytes: float, axis: str, size: int) -> float:
        if kind is None:
            return 0.0
        held = num_bytes / size if kind == "all_to_all" else num_bytes
        return self.collective_s(kind, held, self.groups[axis])

    def work_s(self, flops: float, num_bytes: float, dtype: torch.dtype, kind: Kind = "memory") -> float:
        """Seconds of one kernel."""
        assert kind in ("matmul", "attention", "memory"), kind
        return work_time_s(Work(flops, num_bytes, dtype_name(dtype), kind), self.cluster.device)

    def _conversion(self, op: Op, tensors: Mapping[str, Tensor]) -> OpCost:
        axis = op.kwargs["axis"]
        source, result = tensors[op.inputs[0]], tensors[op.output]
        name = op.target.removeprefix("autopar.")
        whole = max(source.num_bytes, result.num_bytes)
        if name == "all_to_all":
            whole = source.num_bytes * self.groups[axis].size
        return self.conversion(name, whole, axis, backward=source.requires_grad)

    def _matmul(self, op: Op, tensors: Mapping[str, Tensor]) -> OpCost:
        operands = [tensors[name] for name in dict.fromkeys(op.inputs)]
        result = tensors[op.outputs[0]]
        num_bytes = sum(tensor.num_bytes for tensor in (*operands, result))
        forward_s = self.work_s(op.flops, num_bytes, result.dtype, "matmul")
        num_products = sum(tensor.requires_grad for tensor in operands) if result.requires_grad else 0
        return OpCost(forward_s, num_products * forward_s)

    def _attention(self, op: Op, tensors: Mapping[str, Tensor]) -> OpCost:
        operands = [tensors[name] for name in dict.fromkeys(op.inputs)]
        result = tensors[op.outputs[0]]
        num_bytes = sum(tensor.num_bytes for tensor in (*operands, result))
        flops = op.flops / 2 if is_causal(op) else op.flops
        forward_s = self.work_s(flops, num_bytes, result.dtype, "attention")
        backward_s = self.work_s(2.5 * flops, 2 * num_bytes, result.dtype, "attention")
        return OpCost(forward_s, backward_s if result.requires_grad else 0.0)

    def _memory(self, op: Op, tensors: Mapping[str, Tensor], traffic: Traffic) -> OpCost:
        operands = {tensors[name].storage: tensors[name] for name in op.inputs}
        results = [tensors[name] for name in op.outputs]
        dtype = results[0].dtype
        written = sum(tensor.num_bytes for tensor in results if traffic.is_written(tensor.storage))
        read = sum(tensor.num_bytes for storage, tensor in operands.items() if traffic.is_read(storage))
        if short_name(op) in _LOOKUPS:
            read = min(read, 2 * sum(tensor.num_bytes for tensor in results))
        forward_s = self.work_s(0, read + written, dtype)
        backward_s = 0.0
        gradients = [t for storage, t in operands.items() if t.requires_grad and traffic.is_read(storage)]
        if any(tensor.requires_grad for tensor in results):
            num_bytes = sum(t.num_bytes for t in results if t.requires_grad and traffic.is_read(t.storage))
            num_bytes += sum(t.num_bytes for t in gradients)
            reachable = operands | {t.storage: t for t in results}
            num_bytes += op.saved_internal_bytes + sum(
                reachable[s].num_bytes for s in op.saved if s in reachable
            )
            backward_s = self.work_s(0, num_bytes, dtype)
        return OpCost(forward_s, backward_s, *self._own_collectives(op, tensors))

    def _own_collectives(self, op: Op, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
        """Communication inside an op that knows it is split: a vocabulary-parallel loss reduces three row
        vectors."""
        forward_s = backward_s = 0.0
        if op.target == "autopar.cross_entropy":
            rows = tensors[op.inputs[0]]
            num_bytes = rows.num_bytes / max(1, rows.shape[-1])
            if "class_axis" in op.kwargs:
                forward_s += 3 * self.collective_s(
                    "all_reduce", num_bytes, self.groups[op.kwargs["class_axis"]]
                )
            if "row_axis" in op.kwargs:
                forward_s += self.collective_s("all_reduce", 8, self.groups[op.kwargs["row_axis"]])
        return forward_s, backward_s


def is_causal(op: Op) -> bool:
    """Whether an attention op masks the future by itself."""
    return op.kwargs.get("is_causal") is True or (len(op.args) > 5 and op.args[5] is True)


def dtype_name(dtype: torch.dtype) -> str:
    """The cost model's name of a torch dtype; what has no arithmetic of its own counts as fp32."""
    return _DTYPE_NAMES.get(dtype, "fp32")


_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
