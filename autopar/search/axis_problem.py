"""The operator layer's data: what every op may do on one mesh axis, and the true price of each possibility.

Prices (`autopar.search.axis_prices`) are those of the local graph: an op alone is localized under each
strategy and priced. `block_ilp` chooses among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from autopar.localize import localize_op, splits_causal_rows
from autopar.op_kinds import kind_of
from autopar.placements import PR, RP, RR, Shard, State
from autopar.pricing import OpCost, total
from autopar.search.axis_prices import Prices
from autopar.strategies import Conversion, Offers, Strategy, conversion, natural_sections
from autopar.traffic import Traffic
from graphs.ir import Op, OpGraph

LOSS_STATES = (RR, PR)
"""What the loss may be: known to all, or a sum of terms. Either way its gradient is one on every rank."""


MOST_SECTIONS = 16
"""Into how many parts a dimension may be cut, each of them split: a fused projection has two or three, and a
dimension that needs hundreds (every head by itself, every sample) is not worth splitting."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A representative op that reads a tensor, and at which operand."""

    op: int
    position: int


@dataclass(frozen=True)
class TensorClass:
    """Tensors that are made and read alike.

    `name` is one of them; `producer` is the representative op and result that make it, None for what the
    graph starts from; `count` is how many they are, at full depth.
    """

    name: str
    producer: tuple[int, int] | None
    readers: tuple[Reader, ...]
    members: tuple[str, ...]
    count: int


class Custom(Protocol):
    """What is left to choose where a person has decided the rest."""

    def admitted(self, op: Op, offered: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        """Those of the strategies offered to an op that agree with the decision; at least one."""
        ...

    def admits_conversion(self, how: Conversion) -> bool:
        """Whether a change of placement may be used."""
        ...


@dataclass(frozen=True)
class All:
    """Several decisions at once."""

    customs: tuple[Custom, ...]

    @staticmethod
    def of(*customs: Custom | None) -> Custom | None:
        """Those of the decisions that there are; None for none."""
        made = tuple(custom for custom in customs if custom is not None)
        return made[0] if len(made) == 1 else All(made) if made else None

    def admitted(self, op: Op, offered: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        for custom in self.customs:
            offered = custom.admitted(op, offered)
        return offered

    def admits_conversion(self, how: Conversion) -> bool:
        return all(custom.admits_conversion(how) for custom in self.customs)


class AxisProblem:
    """The choice of strategies on one axis of `size` ranks for one graph; strategies and prices are worked
    out once.

    `graph` is local on all outer axes and knows its blocks. `counts` says for how many ops of a deeper model
    each op stands; `custom` narrows the choice.
    """

    def __init__(
        self,
        graph: OpGraph,
        axis: str,
        size: int,
        prices: Prices,
        counts: Sequence[int] | None = None,
        custom: Custom | None = None,
    ) -> None:
        self.graph = graph
        self.axis = axis
        self.size = size
        self.prices = prices
        self.custom = custom
        self.counts = tuple(counts) if counts is not None else (1,) * len(graph.ops)
        self.instances: dict[int, int] = {}
        for index, count in zip(graph.representative, self.counts, strict=True):
            self.instances[index] = self.instances.get(index, 0) + count
        distinct = replace(graph, ops=tuple(graph.ops[index] for index in self.instances), blocks=())
        sections = {
            size: tuple(cut for cut in cuts if len(cut) <= MOST_SECTIONS)
            for size, cuts in natural_sections(distinct, self.size, MOST_SECTIONS).items()
        }
        self.offers = Offers(graph, size, sections)
        self.offered = {index: self._offered(graph.ops[index]) for index in self.instances}
        self._move_s: dict[tuple[Conversion, int], float] = {}

    def _offered(self, op: Op) -> tuple[Strategy, ...]:
        found = tuple([strategy for strategy in self.offers.of(op) if not _is_shredded(strategy)])
        if self.graph.loss in op.outputs:
            position = op.outputs.index(self.graph.loss)
            found = tuple(strategy for strategy in found if strategy.results[position] in LOSS_STATES)
        found = self._splitting_weights(op, found)
        return found if self.custom is None else self.custom.admitted(op, found)

    def _splitting_weights(self, op: Op, offered: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        """Of a matrix product with a weight, the strategies that split the weight, where there are any.

        That is what tensor parallelism means to those who ask for it: with whole weights on every rank the
        axis would be sequence or context parallelism by another name.
        """
        if kind_of(op, self.graph.tensors) != "matmul":
            return offered
        weights = [index for index, name in enumerate(op.inputs) if name in self.graph.parameter_tensors]
        splitting = tuple(
            strategy
            for strategy in offered
            if all(isinstance(strategy.operands[index].value, Shard) for index in weights)
        )
        return splitting if weights and splitting else offered

    @cached_property
    def tensor_classes(self) -> tuple[TensorClass, ...]:
        """All tensors that some op reads, in order of first appearance."""
        return _tensor_classes(self.graph, self.counts)

    @cached_property
    def parameter_classes(self) -> tuple[TensorClass, ...]:
        """Those of them that are parameters."""
        return tuple(
            tensors for tensors in self.tensor_classes if tensors.name in self.graph.parameter_tensors
        )

    @cached_property
    def op_times_s(self) -> Mapping[int, tuple[float, ...]]:
        """Per representative op, the time of all its instances together under each of its strategies."""
        return {index: tuple([cost.total_s for cost in costs]) for index, costs in self.op_costs.items()}

    @cached_property
    def computed_s(self) -> Mapping[int, float]:
        """Per representative op, what all its instances compute at least, whatever that communicates."""
        return {index: min([cost.computed_s for cost in costs]) for index, costs in self.op_costs.items()}

    @cached_property
    def op_costs(self) -> Mapping[int, tuple[OpCost, ...]]:
        """Per representative op, what all its instances together cost under each of its strategies, but for
        what something hides.

        Instances differ only in which of their operands and results a fused chain keeps out of memory.
        """
        traffic = self.prices.traffic(self.graph)
        kinds: dict[int, dict[object, tuple[Op, int]]] = {index: {} for index in self.instances}
        for op, index, count in zip(self.graph.ops, self.graph.representative, self.counts, strict=True):
            storages = (self.graph.tensors[name].storage for name in (*op.inputs, *op.outputs))
            kind = tuple(traffic.is_read(storage) for storage in storages)
            one, others = kinds[index].get(kind, (op, 0))
            kinds[index][kind] = one, others + count
        return {
            index: tuple(self._costs(tuple(kinds[index].values()), offered, traffic))
            for index, offered in self.offered.items()
        }

    def _costs(
        self, kinds: tuple[tuple[Op, int], ...], offered: tuple[Strategy, ...], traffic: Traffic
    ) -> Iterator[OpCost]:
        """What ops that differ in their traffic alone, so many of each, cost under each strategy; it is the
        same under those that leave a rank the same work."""
        known: dict[object, OpCost] = {}
        for strategy in offered:
            work = self._work(kinds[0][0], strategy)
            if work not in known:
                parts = (
                    (localize_op(op, strategy, self.graph, self.axis, self.size), count)
                    for op, count in kinds
                )
                cost = total(self.prices.op(part, traffic).times(count) for part, count in parts)
                known[work] = self.prices.exposed(cost)
            yield known[work]

    def _work(self, op: Op, strategy: Strategy) -> object:
        """What a strategy leaves of an op to a rank: strategies for which this is equal cost the same."""
        if self._is_special(op, strategy):
            return strategy
        values = [state.value for state in (*strategy.operands, *strategy.results)]
        cut = tuple([value.dim if isinstance(value, Shard) else None for value in values])
        return strategy.factor is not None, cut

    def _is_special(self, op: Op, strategy: Strategy) -> bool:
        """Whether a rank does anything but the same op on its parts of the operands."""
        return strategy.implementation is not None or splits_causal_rows(op, strategy, self.graph)

    @cached_property
    def saved_bytes(self) -> Mapping[int, tuple[float, ...]]:
        """Per representative op, the bytes that all its instances keep for backward under each strategy, by
        what the software keeps (`autopar.search.needs`).

        A storage that several ops read then is shared among them. Whether an operand is gathered, and so kept
        as a part, or converted, and so perhaps kept twice, is not the op's to choose: it is counted once, in
        the state that the op asks.
        """
        needs = self.prices.needs(self.graph)
        need_of = {index: needs.need(op) for index, op in enumerate(self.graph.ops)}
        savers = Counter(storage for need in need_of.values() for storage in need.storages)

        def saved(index: int, strategy: Strategy) -> float:
            op, need = self.graph.ops[index], need_of[index]
            states = zip((*op.inputs, *op.outputs), (*strategy.operands, *strategy.results), strict=True)
            parts = {needs.kept_form(name): self.parts(state) for name, state in states}
            internal_parts = self.size if strategy.factor else 1
            if need.quantised is not None:
                internal_parts = self.parts(strategy.operands[op.inputs.index(need.quantised)])
            return need.internal_bytes / internal_parts + sum(
                self.graph.tensors[storage].num_bytes / parts[storage] / savers[storage]
                for storage in need.storages
            )

        return {
            index: tuple([self.instances[index] * saved(index, strategy) for strategy in offered])
            for index, offered in self.offered.items()
        }

    def result_bytes(self, index: int, strategy: Strategy) -> float:
        """What a rank's results of an op lie in."""
        sizes = (self.graph.tensors[name].num_bytes for name in self.graph.ops[index].outputs)
        return sum(size / self.parts(state) for size, state in zip(sizes, strategy.results, strict=True))

    def parts(self, state: State) -> int:
        """Into how many parts a tensor in this state is split."""
        return self.size if isinstance(state.value, Shard) else 1

    def conversion_s(self, name: str, source: State, target: State) -> float | None:
        """Time of the conversion of one tensor, None where there is none."""
        if source == target:
            return 0.0
        tensor = self.graph.tensors[name]
        how = self.conversion(source, target, tensor.requires_grad)
        return None if how is None else self.move_s(how, tensor.num_bytes)

    def conversion(self, source: State, target: State, requires_grad: bool) -> Conversion | None:
        """How a tensor may be brought from one state to another one, None where there is no way."""
        how = conversion(source, target, requires_grad)
        return how if how is None or self.custom is None or self.custom.admits_conversion(how) else None

    def move_s(self, how: Conversion, num_bytes: int) -> float:
        """Time of a conversion of a tensor of so many bytes."""
        if (how, num_bytes) not in self._move_s:
            self._move_s[how, num_bytes] = self.prices.conversion_s(how, num_bytes)
        return self._move_s[how, num_bytes]

    def conversion_again_s(self, name: str, source: State, target: State) -> float:
        """Time of the conversion's forward alone."""
        tensor = self.graph.tensors[name]
        how = conversion(source, target, tensor.requires_grad)
        assert how is not None, "it was priced"
        return self.move_s(Conversion(how.name, how.forward, None), tensor.num_bytes)

    def stored_states(self, tensors: TensorClass) -> tuple[State, ...]:
        """In what states a parameter may be stored: whole, or in the shards that some reader asks."""
        asked = (
            strategy.operands[reader.position]
            for reader in tensors.readers
            for strategy in self.offered[reader.op]
        )
        shards = (state for state in asked if isinstance(state.value, Shard))
        whole = (RR, RP) if self.graph.tensors[tensors.name].requires_grad else (RR,)
        return (*whole, *dict.fromkeys(shards))

    def reduction_s(self, name: str, state: State) -> float:
        """Time of summing a partial parameter gradient over the axis, once a step."""
        if state != RP:
            return 0.0
        return self.prices.reduction_s(self.graph.tensors[name].num_bytes)


def _is_shredded(strategy: Strategy) -> bool:
    """Whether some tensor would be split in more sections than is worth while."""
    values = (state.value for state in (*strategy.operands, *strategy.results))
    return any(
        isinstance(v, Shard) and v.sections is not None and len(v.sections) > MOST_SECTIONS for v in values
    )


def _tensor_classes(graph: OpGraph, counts: Sequence[int]) -> tuple[TensorClass, ...]:
    representative = graph.representative
    found: dict[object, list[str]] = {}
    parts: dict[object, tuple[tuple[int, int] | None, tuple[Reader, ...]]] = {}
    number: dict[object, int] = {}
    for name, consumers in graph.consumers.items():
        if not consumers:
            continue
        places = {(representative[index], graph.ops[index].inputs.index(name)) for index in consumers}
        readers = tuple(Reader(*place) for place in sorted(places))
        producer = None
        key: object = (name, readers)
        count = counts[consumers[0]]
        if name in graph.producer:
            op = graph.producer[name]
            producer = (representative[op], graph.ops[op].outputs.index(name))
            key = (producer, readers)
            count = counts[op]
        elif name in graph.parameter_tensors:
            tensor = graph.tensors[name]
            key = (tensor.shape, tensor.dtype, tensor.requires_grad, readers)
        found.setdefault(key, []).append(name)
        parts[key] = (producer, readers)
        number[key] = number.get(key, 0) + count
    return tuple(
        TensorClass(names[0], *parts[key], tuple(names), number[key]) for key, names in found.items()
    )
