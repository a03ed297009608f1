"""What the backward of every op reads, and where it lies: the facts of a local graph under one software.

What autograd saves (`Op.saved`) is the start. Software keeps less, or something else:

* unfused attention keeps its probabilities, and with dropout their mask and what is left of them, where flash
  attention keeps its output and a log-sum-exp (arXiv:2205.05198, section 4.1);
* an operand gathered over an axis is kept as the shard it was gathered from (the same, section 4.2.2);
* a product on 8 bits or fewer keeps its operand as it was quantised (Transformer Engine);
* a sum over ranks stays where its terms were, and a copy made for its layout is not kept beside its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from autopar.kernels import KernelMaker
from autopar.op_kinds import Kind, has_dropout, is_conversion, kind_of, short_name
from autopar.plan import RecomputeMode
from costmodel import Software
from graphs.ir import Op, OpGraph

_IN_PLACE = ("copy", "first_grad", "first_only", "all_reduce", "all_reduce_partial")
_FREE_CONVERSIONS = ("shard", "shard_partial", "copy")
_MASK_BYTES = 1
_LOG_SUM_EXP_BYTES = 4
_QUANTISED_BYTES = 1


class Need(NamedTuple):
    """What the backward of an op reads: storages, and bytes that are no tensor of the graph; where they are
    an operand in another format, that is `quantised`."""

    storages: tuple[str, ...]
    internal_bytes: int
    quantised: str | None = None


def _never(_: Op) -> bool:
    return False


class Needs:
    """The needs of one graph's ops under one software; products that `is_low` names run on 8 bits or less."""

    def __init__(self, graph: OpGraph, software: Software, is_low: Callable[[Op], bool] = _never) -> None:
        self.graph = graph
        self.is_low = is_low
        self.tensors = graph.tensors
        self.software = software
        # Parameters and the batch are in memory anyway.
        self.fixed = {*graph.parameter_tensors, *graph.inputs, *(buffer.tensor for buffer in graph.buffers)}
        self.kinds = tuple(kind_of(op, graph.tensors) for op in graph.ops)

    @cached_property
    def homes(self) -> Mapping[str, str]:
        """The storage in which each tensor really lies."""
        homes = {name: tensor.storage for name, tensor in self.tensors.items()}
        for op in self.graph.ops:
            if _stays_in_place(op) or (
                short_name(op) == "clone"
                and self.tensors[self.tensors[op.inputs[0]].storage].num_bytes
                == self.tensors[op.output].num_bytes
            ):
                homes[op.output] = homes[op.inputs[0]]
            else:
                homes.update((name, homes[self.tensors[name].storage]) for name in op.outputs)
        return homes

    @cached_property
    def shards(self) -> Mapping[str, str]:
        """The storages of gathered tensors, and those of the shards that they were gathered from."""
        return {
            op.output: self.homes[op.inputs[0]] for op in self.graph.ops if op.target == "autopar.all_gather"
        }

    @cached_property
    def last_reader(self) -> Mapping[str, int]:
        """The op that reads a storage last."""
        last: dict[str, int] = {}
        for index, op in enumerate(self.graph.ops):
            if self.kinds[index] != "view":
                last.update((self.homes[name], index) for name in op.inputs)
        return last

    @cached_property
    def outputs(self) -> frozenset[str]:
        """The storages of what the graph returns."""
        return frozenset(self.homes[name] for name in self.graph.outputs)

    @cached_property
    def readers(self) -> Mapping[str, frozenset[int]]:
        """All ops that read a storage, views left out."""
        found: dict[str, set[int]] = {}
        for index, op in enumerate(self.graph.ops):
            if self.kinds[index] != "view" and not _stays_in_place(op):
                for name in op.inputs:
                    found.setdefault(self.homes[name], set()).add(index)
        return {name: frozenset(indices) for name, indices in found.items()}

    def need(self, op: Op) -> Need:
        """What the backward of one op reads, if nothing is computed again."""
        if "scaled_dot_product" in op.target:
            return self._attention_need(op)
        if op.saved and self.software.keeps_quantised and self.is_low(op):
            return self._low_need(op)
        return Need(self._kept_forms(op.saved), op.saved_internal_bytes)

    def _low_need(self, op: Op) -> Need:
        """A product on 8 bits keeps its operand as it was quantised, once for all products that read it."""
        operand = op.inputs[0]
        kept = self.kept_form(operand)
        others = tuple(name for name in self._kept_forms(op.saved) if name != kept)
        readers = (self.graph.ops[index] for index in sorted(self.readers[self.homes[operand]]))
        first = next(reader for reader in readers if reader.saved and self.is_low(reader))
        is_first = kept is not None and first.name == op.name
        if kept is None or not is_first:
            return Need(others, 0)
        return Need(others, self.tensors[kept].num_elements * _QUANTISED_BYTES, operand)

    def kept_form(self, name: str) -> str | None:
        """The storage that holds a tensor until the backward, None for one that is there anyway."""
        home = self.homes[name]
        return None if home in self.fixed else self.shards.get(home, home)

    def _kept_forms(self, names: Iterable[str]) -> tuple[str, ...]:
        """The storages that hold these tensors until the backward."""
        forms = dict.fromkeys(map(self.kept_form, names))
        return tuple(form for form in forms if form is not None)

    def _attention_need(self, op: Op) -> Need:
        """What the accelerator's kernels keep, which those that measured the graph need not be."""
        if not self.tensors[op.outputs[0]].requires_grad:
            return Need((), 0)
        query, key = (self.tensors[name] for name in op.inputs[:2])
        rows = query.num_elements // query.shape[-1]
        inputs = self._kept_forms(op.inputs[:3])
        if self.software.attention != "unfused":
            return Need((*inputs, self.homes[op.outputs[0]]), rows * _LOG_SUM_EXP_BYTES)
        size = query.dtype.itemsize
        return Need(inputs, rows * key.shape[-2] * (2 * size + _MASK_BYTES if has_dropout(op) else size))

    def is_unfused_attention(self, op: Op) -> bool:
        """Whether the op is an attention whose probabilities stand in memory."""
        return self.software.attention == "unfused" and "scaled_dot_product" in op.target

    def runs_again(self, op: Op, kind: Kind, index: int, recompute: RecomputeMode) -> bool:
        """Whether a block's op, its `index`-th product, runs again under a recompute mode."""
        match recompute:
            case "none":
                return False
            case "attention":
                return self.is_unfused_attention(op)
            case "full":
                return True
            case "selective" | "alternate":
                if kind == "communication":  # what was received is kept
                    return short_name(op) in _FREE_CONVERSIONS
                is_second = recompute == "alternate" and kind == "matmul" and index % 2 == 1
                return kind not in ("matmul", "attention") or is_second


def needs_of(graph: OpGraph, maker: KernelMaker) -> Needs:
    """The needs of a graph whose kernels `maker` makes."""
    parameters = frozenset(graph.parameter_tensors)
    return Needs(graph, maker.software, lambda op: maker.is_low(op, parameters))


def _stays_in_place(op: Op) -> bool:
    return is_conversion(op) and short_name(op) in _IN_PLACE


def is_loss(op: Op) -> bool:
    """Whether an op is a loss over classes, which works on more than it keeps."""
    return "cross_entropy" in op.target
