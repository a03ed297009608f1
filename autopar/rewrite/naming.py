"""What to call a tensor in the emitted source."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection, Iterable, Mapping

from autopar.localize import CAUSAL_ROWS
from graphs.ir import Op, OpGraph

_RUNTIME_NAMES = """
BatchNorm Border Container Parameters Placements Split StageMaker all_gather all_gather_replicated
all_reduce all_reduce_partial all_to_all batch_norm causal_attention copy cross_entropy
deferred_convolution deferred_grouped_mm deferred_linear deferred_matmul drawn_apart drawn_together embedding
exchange_counts first_grad first_only from_experts grouped_mm keep keep_matmuls keep_nothing recomputable
reduce_scatter saved_tensor shard shard_partial sharded_cross_entropy to_experts
"""
RUNTIME_NAMES = tuple(_RUNTIME_NAMES.split())
"""What `model.py` may need of the runtime, in the order of its import."""

_OTHERS = """
self mesh torch nn F layer layers number batch functools KEPT Tensor DeviceMesh BATCH TP DP CP EP
"""
RESERVED = frozenset(_OTHERS.split()) | frozenset(RUNTIME_NAMES)
"""Names that the source of a `forward` may need for what they stand for."""

_PASSING = """
to _to_copy reshape transpose contiguous unsqueeze squeeze expand clone permute slice dropout detach select
"""
PASSING = frozenset(_PASSING.split())
"""Ops whose result is still called what its operand is."""

_WEIGHTED = frozenset(
    {"linear", "mm", "matmul", "addmm", "embedding", "layer_norm", "conv1d", "conv2d", "conv3d"}
)
_ARITHMETIC = {"add": "total", "mul": "product", "sub": "difference", "div": "quotient"}
_PARTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})
_ORDERED = frozenset({"topk", "sort", "max", "min", "kthvalue"})
_SPOKEN = {
    "scaled_dot_product_attention": "attention",
    "cross_entropy_loss": "loss",
    "cross_entropy": "loss",
    "constant_pad_nd": "padded",
    "arange": "positions",
    "_grouped_mm": "grouped",
    "grouped_mm": "grouped",
    "grouped_mm_fallback": "grouped",
    "argsort": "order",
    "index": "rows",
    "batch_norm": "normalized",
    "cat": "joined",
    "where": "chosen",
    **{"eq": "equal", "ne": "unequal", "lt": "less", "gt": "greater", "le": "at_most", "ge": "at_least"},
}
_ATTENTION = {"aten.scaled_dot_product_attention.default", CAUSAL_ROWS}
_ROLES = ("query", "key", "value")
_ROLE_DISTANCE = 12
"""How many ops before an attention its operands are known as query, key and value."""


def makers(ops: Iterable[Op]) -> dict[str, Op]:
    """The op that makes each tensor."""
    return {name: op for op in ops for name in op.outputs}


def fresh(base: str, taken: Collection[str], separator: str = "_") -> str:
    """`base`, made an identifier that hides no builtin, with a number where it is taken."""
    base = base or "x"
    if keyword.iskeyword(base) or hasattr(builtins, base):
        base += "_"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}{separator}{number}", number + 1
    return name


class Names:
    """What to call each tensor, before numbers make it unique.

    `maker` gives the op that makes each tensor; `given` names come first: arguments, what a loop carries.
    """

    def __init__(self, graph: OpGraph, maker: Mapping[str, Op], given: Mapping[str, str]) -> None:
        self.graph = graph
        self.given = dict(given)
        self._maker = maker
        self._found = dict(given)

    def of(self, tensor: str) -> str:
        """The name of a tensor."""
        if tensor not in self._found:
            self._found[tensor] = self._find(tensor)
        return self._found[tensor]

    def _find(self, tensor: str) -> str:
        op = self._maker.get(tensor)
        if op is None:
            return tensor.rsplit(".", 1)[-1]
        name = op.target.split(".")[1]
        if op.target == "module.call" or name in _WEIGHTED:
            leaf = _snake(op.module.rpartition(".")[2])
            return leaf if leaf.isidentifier() else "x"
        if name in _SPOKEN:
            return _SPOKEN[name]
        operands = [read for read in op.inputs if read not in self.graph.parameter_tensors]
        if name == "broadcast_tensors":
            return self.of(op.inputs[op.outputs.index(tensor)])
        if name in _ORDERED and len(op.outputs) == 2:
            return ("values", "indices")[op.outputs.index(tensor)]
        if name == "exchange_counts":
            return ("ends", "routes")[op.outputs.index(tensor)]
        if name in _PARTS:
            return self._role(tensor) or "part"
        if operands and (name in PASSING or op.target.startswith("autopar.")):
            inner = self.of(operands[0])
            return f"{inner}_full" if name.startswith("all_gather") and not inner.endswith("_full") else inner
        shape = self.graph.tensors[tensor].shape
        alike = [read for read in operands if self.graph.tensors[read].shape == shape]
        if name in _ARITHMETIC and alike:
            return "x" if any(self.of(read) == "x" for read in alike) else self.of(alike[0])
        if name in _ARITHMETIC:
            return _ARITHMETIC[name]
        return name.strip("_")

    def _role(self, tensor: str) -> str | None:
        """`query`, `key` or `value` where that is what soon becomes of a tensor in its module."""
        module = self._maker[tensor].module
        reached = [tensor]
        for _ in range(_ROLE_DISTANCE):
            following: list[str] = []
            for name in reached:
                for index in self.graph.consumers.get(name, ()):
                    op = self.graph.ops[index]
                    if op.target in _ATTENTION and name in op.inputs[:3]:
                        return _ROLES[op.inputs.index(name)]
                    if op.module == module:
                        following += op.outputs
            reached = list(dict.fromkeys(following))
        return None


def _snake(name: str) -> str:
    """`LayerNorm` as `layer_norm`; names that are not in camel case stay as they are."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() if re.search(r"[a-z][A-Z]", name) else name
