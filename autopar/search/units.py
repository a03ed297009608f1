"""A local graph as a chain of units: what stages are made of.

A unit is a run of ops that stays on one pipeline stage: one repeated block, or a stretch between blocks that
may not be cut further. Everything a stage costs is a sum, or a union, over its units.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from autopar.localize import Localized
from autopar.placements import RP
from autopar.plan import Recompute
from autopar.pricing import OpCost, Pricer, is_conversion, kind_of, total
from graphs.ir import Block, Op, OpGraph, Tensor

RECOMPUTE_MODES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Saved:
    """What a unit keeps from forward to backward: storages by name, so that a stage counts each once."""

    storages: Mapping[str, int]
    internal_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(self.storages.values()) + self.internal_bytes


@dataclass(frozen=True)
class Unit:
    """One unit, for one microbatch on one rank.

    Attributes:
        first_op: name of its first op, conversions that were inserted for it apart.
        modules: the modules its ops belong to; of a block, the block alone.
        is_block: whether it is a repeated block, so whether it may be recomputed.
        cost: of all its ops.
        recompute_s: what its backward runs again under each recompute mode.
        saved: what it keeps under each recompute mode.
        working_bytes: operands, results and gradients of its hungriest op.
        parameters: names of the parameter tensors that it reads.
        received_bytes: activations that enter it from earlier units, so what a cut before it sends.
    """

    first_op: str
    modules: tuple[str, ...]
    is_block: bool
    cost: OpCost
    recompute_s: Mapping[Recompute, float]
    saved: Mapping[Recompute, Saved]
    working_bytes: int
    parameters: tuple[str, ...]
    received_bytes: int


@dataclass(frozen=True)
class ParameterShard:
    """The part of a parameter that one rank computes with.

    `is_partial` if its gradient is summed over `tp`; `is_expert` if it is dealt out over `ep`, so that only
    `dp / ep` ranks hold it.
    """

    num_elements: int
    num_bytes: int
    is_partial: bool
    is_expert: bool = False


@dataclass(frozen=True)
class Chain:
    """The whole local program: units in order, and the parameters they share."""

    units: tuple[Unit, ...]
    parameters: Mapping[str, ParameterShard]


def build_chain(
    whole: OpGraph,
    local: Localized,
    pricer: Pricer,
    repeats: Mapping[str, int] | None = None,
    axis: str = "tp",
) -> Chain:
    """The chain of a local graph, whose blocks are those of the graph `whole` that it was made from.

    `repeats` has the paths of blocks that stand for several in a row, and for how many.
    """
    graph = local.graph
    builder = _Builder(graph, pricer.graph(graph))
    stretches = [*_stretches(whole, graph)]
    crossings = _crossing_bytes(graph, [start for start, _, _ in stretches])
    parameters = {}
    for parameter in graph.parameters:
        tensor = graph.tensors[parameter.tensor]
        state = local.states.get(parameter.tensor, {}).get(axis)
        parameters[parameter.tensor] = ParameterShard(tensor.num_elements, tensor.num_bytes, state == RP)
    units = []
    for (start, stop, block), crossing in zip(stretches, crossings, strict=True):
        unit = builder.unit(start, stop, block, crossing)
        units.append(unit)
        for number in range(1, (repeats or {}).get(block or "", 1)):
            units.append(builder.copy(unit, number))
            parameters |= {f"{name}#{number}": parameters[name] for name in unit.parameters}
    return Chain(tuple(units), parameters)


Stretch = tuple[int, int, str | None]
"""Ops `[start, stop)` and the path of the block that they are, if they are one."""


def _stretches(whole: OpGraph, graph: OpGraph) -> Iterator[Stretch]:
    """Where every unit of a local graph begins and ends: at the same ops as in the graph it was made from.

    Ops that localization inserted stand just before the op that needs them and belong to its unit, but sums
    of
    partial values to the unit that made those: a stage sends sums, not terms.
    """
    block_at = {block.start: block for block in whole.blocks}
    opens = {whole.ops[start].name: block_at.get(start) for start in unit_starts(whole)}
    start = end = 0
    current: Block | None = None
    for index, op in enumerate(graph.ops):
        if op.name in opens:
            begin = index
            while begin > end and not _reduces(graph.ops[begin - 1]):
                begin -= 1
            if begin > start:
                yield start, begin, None if current is None else current.path
            start, current = begin, opens[op.name]
        if not is_conversion(op):
            end = index + 1
    yield start, len(graph.ops), None if current is None else current.path


def _reduces(op: Op) -> bool:
    return op.target in ("autopar.all_reduce", "autopar.all_reduce_partial", "autopar.reduce_scatter")


def unit_starts(graph: OpGraph) -> tuple[int, ...]:
    """The ops at which a unit begins: blocks, what follows them, and between blocks wherever the module
    changes and a single activation crosses."""
    found = {0}
    inside: set[int] = set()
    for block in graph.blocks:
        found.update((block.start, block.stop))
        inside.update(range(block.start, block.stop))
    live: set[str] = set()
    for index, op in enumerate(graph.ops):
        is_border = index not in inside and index and op.module != graph.ops[index - 1].module
        if is_border and len(live) == 1 and kind_of(op, graph.tensors) != "view":
            found.add(index)
        alive = (name for name in (*op.inputs, *op.outputs) if name in graph.producer)
        for name in alive:
            tensor, readers = graph.tensors[name], graph.consumers[name]
            if tensor.requires_grad and readers and readers[-1] > index:
                live.add(name)
            else:
                live.discard(name)
    found.discard(len(graph.ops))
    return tuple(sorted(found))


def _crossing_bytes(graph: OpGraph, starts: Sequence[int]) -> list[int]:
    """Bytes of the values with a gradient that are alive at each of the boundaries `starts`."""
    change = [0] * (len(starts) + 1)
    for name, index in graph.producer.items():
        readers = graph.consumers[name]
        if graph.tensors[name].requires_grad and readers:
            change[bisect_right(starts, index)] += graph.tensors[name].num_bytes
            change[bisect_right(starts, readers[-1])] -= graph.tensors[name].num_bytes
    return list(accumulate(change[:-1]))


class _Builder:
    """Makes units of a priced local graph."""

    def __init__(self, graph: OpGraph, costs: Sequence[OpCost]) -> None:
        self.graph = graph
        self.tensors: Mapping[str, Tensor] = graph.tensors
        self.costs = costs
        self.made_in_blocks: set[str] = set()
        # Parameters and the batch are in memory anyway.
        self.fixed = {*graph.parameter_tensors, *graph.inputs, *(buffer.tensor for buffer in graph.buffers)}

    def unit(self, start: int, stop: int, block: str | None, received_bytes: int) -> Unit:
        ops = self.graph.ops[start:stop]
        cost = total(self.costs[start:stop])
        saved: dict[Recompute, Saved] = dict.fromkeys(RECOMPUTE_MODES, self._saved(ops))
        again: dict[Recompute, float] = dict.fromkeys(RECOMPUTE_MODES, 0.0)
        if block is not None:
            self.made_in_blocks.update(name for op in ops for name in op.outputs)
            entering = self._entering(ops)
            kept = [
                (op, price)
                for op, price in zip(ops, self.costs[start:stop], strict=True)
                if self._is_kept(op)
            ]
            results = {name: self.tensors[name].num_bytes for op, _ in kept for name in op.outputs}
            internal_bytes = sum(op.saved_internal_bytes for op, _ in kept)
            saved |= {"selective": Saved(entering | results, internal_bytes), "full": Saved(entering)}
            again["full"] = cost.forward_total_s
            again["selective"] = cost.forward_total_s - sum(price.forward_total_s for _, price in kept)
        return Unit(
            first_op=next((op.name for op in ops if not is_conversion(op)), ops[0].name),
            modules=(block,) if block is not None else tuple(dict.fromkeys(op.module for op in ops)),
            is_block=block is not None,
            cost=cost,
            recompute_s=again,
            saved=saved,
            working_bytes=max((self._working_bytes(op) for op in ops), default=0),
            parameters=tuple(
                dict.fromkeys(
                    name for op in ops for name in op.inputs if name in self.graph.parameter_tensors
                )
            ),
            received_bytes=received_bytes,
        )

    def copy(self, unit: Unit, number: int) -> Unit:
        """The same block once more: what blocks make and own is its own, what they share is shared."""

        def own(saved: Saved) -> Saved:
            storages = {
                f"{name}#{number}" if name in self.made_in_blocks else name: size
                for name, size in saved.storages.items()
            }
            return replace(saved, storages=storages)

        return replace(
            unit,
            saved={mode: own(saved) for mode, saved in unit.saved.items()},
            parameters=tuple(f"{name}#{number}" for name in unit.parameters),
        )

    def _saved(self, ops: Sequence[Op]) -> Saved:
        """What autograd keeps of a run of ops."""
        storages = {s: self.tensors[s].num_bytes for op in ops for s in op.saved if s not in self.fixed}
        return Saved(storages, sum(op.saved_internal_bytes for op in ops))

    def _entering(self, ops: Sequence[Op]) -> dict[str, int]:
        """Storages of the activations that a run of ops reads from before it."""
        inside = {name for op in ops for name in op.outputs}
        read = dict.fromkeys(
            self.tensors[name].storage
            for op in ops
            for name in op.inputs
            if name not in inside and self.tensors[name].dtype.is_floating_point
        )
        return {storage: self.tensors[storage].num_bytes for storage in read if storage not in self.fixed}

    def _is_kept(self, op: Op) -> bool:
        """Whether selective recomputation keeps the op's results: products, attention, and what was
        communicated."""
        if is_conversion(op):
            return op.target not in ("autopar.shard", "autopar.shard_partial", "autopar.copy")
        return kind_of(op, self.tensors) in ("matmul", "attention")

    def _working_bytes(self, op: Op) -> int:
        if kind_of(op, self.tensors) == "view":
            return 0
        results = sum(self.tensors[name].num_bytes for name in op.outputs)
        operands = (self.tensors[name] for name in dict.fromkeys(op.inputs) if name not in self.fixed)
        return results + sum(tensor.num_bytes for tensor in operands if tensor.requires_grad)
