"""What one op may do on one mesh axis, and what it costs to change a tensor's state between two ops.

A `Strategy` is read off the op's sharding rule. To split a factor over the axis means

* an operand or result that holds the factor is sharded along that dimension, value and gradient alike;
* an operand that lacks it is replicated and receives a *partial* gradient: every rank saw only its part of
the work;
* a result that lacks it is a *partial* value with a replicated gradient.

Besides splitting a factor an op may run whole on every rank, with replicated gradients (`replicate`) or with
partial ones (`replicate_partial_grad`: the backward of any op is linear in the incoming gradient), or on
partial values where it is linear in them (`partial`). Megatron's column and row parallelism, sequence
parallelism, vocabulary parallelism and data parallelism are combinations of these, found by the search and
not listed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.placements import PR, RP, RR, Own, Partial, Replicate, Shard, State, sharded
from graphs import rules
from graphs.ir import Op, OpGraph, RowOrder, Tensor
from graphs.rules.form import Call
from graphs.rules.rule import Place, Rule

Sections = tuple[int, ...]

REPLICATE = "replicate"
REPLICATE_PARTIAL_GRAD = "replicate_partial_grad"
PARTIAL = "partial"

ANY_SHARDS = frozenset({"mean", "cross_entropy_rows", "batch_norm_rows"})
"""Special local forms to which it is all the same which elements of a dimension a rank has."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an op on one axis.

    Attributes:
        key: a stable name: the factor (`o`, or `o|768,768,768` where its dimension is split by sections), or
        one of
            `replicate`, `replicate_partial_grad`, `partial:0,1`.
        operands, results: the state of every tensor operand (in the order of `Op.inputs`) and result.
        factor: the factor that is split, so whose work is divided over the axis; None where every rank does
        it all. implementation: name of the special local form that the factor needs, such as a
        vocabulary-parallel lookup.
    """

    key: str
    operands: tuple[State, ...]
    results: tuple[State, ...]
    factor: str | None = None
    implementation: str | None = None


def strategies(
    op: Op, graph: OpGraph, axis_size: int, sections: Mapping[int, Iterable[Sections]]
) -> tuple[Strategy, ...]:
    """All strategies of `op` on an axis of `axis_size` ranks, `replicate` first.

    `sections` (see `natural_sections`) tells into which parts a dimension of a given size may have to be cut.
    An op without a rule can only be replicated. The loss is whole or partial, with the whole gradient 1 on
    every rank.
    """
    operands = [graph.tensors[name] for name in op.inputs]
    results = [graph.tensors[name] for name in op.outputs]
    found = [Strategy(REPLICATE, (RR,) * len(operands), (RR,) * len(results))]
    if any(tensor.requires_grad for tensor in results):
        found.append(Strategy(REPLICATE_PARTIAL_GRAD, (RP,) * len(operands), (RP,) * len(results)))
    rule = rules.rule_for(op, graph)
    if rule is not None:
        for factor in rule.sizes:
            found.extend(_split(rule, factor, axis_size, sections))
        found.extend(_linear(rule))
    if op.rows is not None:
        found.extend(_routed(op, operands, results, axis_size, sections))
    grads = [tensor.requires_grad for tensor in operands], [tensor.requires_grad for tensor in results]
    makes_loss, is_repeated = graph.loss in op.outputs, len(set(op.inputs)) < len(op.inputs)
    unique: dict[tuple[tuple[State, ...], tuple[State, ...]], Strategy] = {}
    for strategy in found:
        settled = Strategy(
            strategy.key,
            tuple([settle(state, grad) for state, grad in zip(strategy.operands, grads[0], strict=True)]),
            tuple([settle(state, grad) for state, grad in zip(strategy.results, grads[1], strict=True)]),
            strategy.factor,
            strategy.implementation,
        )
        if is_repeated and not _agrees_on_repeated_operands(op, settled):
            continue
        if not (makes_loss and RP in settled.results):
            unique.setdefault((settled.operands, settled.results), settled)
    return tuple(unique.values())


class Offers:
    """The `strategies` of a graph's ops on an axis, those of ops that do the same worked out once."""

    def __init__(self, graph: OpGraph, axis_size: int, sections: Mapping[int, Iterable[Sections]]) -> None:
        self.graph = graph
        self.axis_size = axis_size
        self.sections = sections
        self._known: dict[tuple[Call, bool], tuple[Strategy, ...]] = {}

    def of(self, op: Op) -> tuple[Strategy, ...]:
        """The strategies of an op of the graph."""
        alike = Call.of(op, self.graph), self.graph.loss in op.outputs
        if alike not in self._known:
            self._known[alike] = strategies(op, self.graph, self.axis_size, self.sections)
        return self._known[alike]


def settle(state: State, requires_grad: bool) -> State:
    """The state, with the gradient half made canonical where the tensor has no gradient."""
    return state if requires_grad or state != RP else RR


MOST_PARTS = 1024
"""Dimensions cut into more parts go through samples and positions, of which ranks have whole ones."""


def natural_sections(
    graph: OpGraph, axis_size: int, most: int = MOST_PARTS
) -> Mapping[int, tuple[Sections, ...]]:
    """The ways in which some op of the graph cuts a dimension into parts, at `most` so many, by the size of
    the dimension.

    A projection whose output is later split into q, k and v must shard each of the three. It cannot know that
    from its own rule, so every op is offered the cuts that others of the graph need for dimensions of that
    size.
    """
    found: dict[int, dict[Sections, None]] = {}
    of_ops = (rules.rule_for(op, graph) for op in graph.ops)
    for rule in {id(rule): rule for rule in of_ops if rule is not None}.values():  # ops alike share theirs
        for factor in rule.sizes:
            if factor in rule.unsplittable:
                continue
            for place in rule.places[factor]:
                if place.major <= most:
                    cut = _own_sections(rule, factor, place)
                    if cut is not None and len(cut) > 1 and all(part % axis_size == 0 for part in cut):
                        found.setdefault(sum(cut), {})[cut] = None
    return {size: tuple(cuts) for size, cuts in found.items()}


def _split(
    rule: Rule, factor: str, axis_size: int, sections: Mapping[int, Iterable[Sections]]
) -> Iterator[Strategy]:
    if factor in rule.unsplittable:
        return
    size = rule.sizes[factor]
    natural = _states(rule, factor, axis_size, None)
    form = rule.implemented.get(factor)
    if natural is not None:
        yield Strategy(factor, *natural, factor=factor, implementation=form)
    if factor in rule.contiguous or (form is not None and form not in ANY_SHARDS):
        return
    for cut in sections.get(size, ()):
        states = _states(rule, factor, axis_size, cut)
        if states is not None:
            yield Strategy(f"{factor}|{_written(cut)}", *states, factor=factor, implementation=form)


def _written(cut: Sections) -> str:
    """The sizes of the parts, or their number and common size where they are many: every sample's, say."""
    if len(cut) > 8 and len(set(cut)) == 1:
        return f"{len(cut)}x{cut[0]}"
    return ",".join(map(str, cut))


def _states(
    rule: Rule, factor: str, axis_size: int, cut: Sections | None
) -> tuple[tuple[State, ...], tuple[State, ...]] | None:
    """States of operands and results when `factor` is split, or None where that is impossible."""
    places = rule.places[factor]
    if not places or len({(place.side, place.number) for place in places}) < len(places):
        return None  # a diagonal: the factor stands twice in one tensor
    if factor in rule.reductions:
        without = PR
    elif factor in rule.whole:
        without = RR
    else:
        without = None
    operands: list[State] = [RP] * len(rule.operands)
    results: list[State | None] = [without] * len(rule.results)
    for place in places:
        state = _natural(rule, factor, axis_size, place) if cut is None else _cut(rule, factor, place, cut)
        if state is None:
            return None
        if place.side == "operand":
            operands[place.number] = state
        else:
            results[place.number] = state
    if None in results:
        return None
    return tuple(operands), tuple([state for state in results if state is not None])


def _natural(rule: Rule, factor: str, axis_size: int, place: Place) -> State | None:
    """How a tensor lies where a factor is split as the rule has it."""
    if place.major > MOST_PARTS:
        return None
    divided = rule.sections.get(place.dimension, (rule.sizes[factor],))
    if any(part % axis_size for part in divided):
        return None
    return sharded(place.dim, _own_sections(rule, factor, place))


def _cut(rule: Rule, factor: str, place: Place, cut: Sections) -> State | None:
    """How a tensor lies where each part of a factor is split."""
    if place.names[0] != factor or place.dimension in rule.sections:
        return None
    return sharded(place.dim, tuple([part * place.minor for part in cut]))


def _own_sections(rule: Rule, factor: str, place: Place) -> Sections | None:
    """The parts into which splitting `factor` cuts a dimension by the rule itself; None for one contiguous
    part.
    """
    given = rule.sections.get(place.dimension)
    if given is not None:
        return given
    return None if place.major == 1 else (rule.sizes[factor] * place.minor,) * place.major


def _linear(rule: Rule) -> Iterator[Strategy]:
    for members in rule.linear:
        operands = tuple(PR if index in members else RP for index in range(len(rule.operands)))
        key = f"{PARTIAL}:{','.join(map(str, sorted(members)))}"
        yield Strategy(key, operands, (PR,) * len(rule.results))


def _routed(
    op: Op,
    operands: Sequence[Tensor],
    results: Sequence[Tensor],
    axis_size: int,
    sections: Mapping[int, Iterable[Sections]],
) -> Iterator[Strategy]:
    """Every rank routes rows of its own (`graphs.routing`): slices of the batch, or of each of its parts
    where rows of several samples share a dimension. Their number stays the same through all ops of a
    routing."""
    rows = list(zip((*operands, *results), op.rows or (), strict=True))
    extents = [tensor.shape[0] for tensor, order in rows if order in {"first", "own"}]
    equal_parts = {len(cut) for cuts in sections.values() for cut in cuts if len(set(cut)) == 1}
    form = "inverse_order" if op.target == "aten.index_put.default" else None
    for count in (1, *sorted(equal_parts)):
        if any(extent % (count * axis_size) for extent in extents):
            continue
        states = tuple(_row_state(order, tensor, count) for tensor, order in rows)
        key = "rows" if count == 1 else f"rows|{count}"
        yield Strategy(key, states[: len(operands)], states[len(operands) :], "rows", form)


def _row_state(order: RowOrder | None, tensor: Tensor, count: int) -> State:
    if order is None:
        return RP
    parts = None if count == 1 else count
    if order == "counts":
        return State(Own(parts), Own(parts))
    sections = None if parts is None else (tensor.shape[0] // count,) * count
    shard = Shard(0, sections, own=order == "own")
    return State(shard, shard)


def _agrees_on_repeated_operands(op: Op, strategy: Strategy) -> bool:
    """A tensor that stands twice among the operands can be in one state only."""
    states: dict[str, State] = {}
    return all(
        states.setdefault(name, state) == state
        for name, state in zip(op.inputs, strategy.operands, strict=True)
    )


# --- changes of state


class Conversion(NamedTuple):
    """A change of state of one tensor on one axis: what moves forward, and what moves backward.

    `name` is the function of the runtime that does it; `forward` and `backward` are the kinds of collective
    it costs (None where only local memory moves).
    """

    name: str
    forward: str | None
    backward: str | None


_REPLICATED_CONVERSIONS = {
    (RR, RP): Conversion("copy", None, "all_reduce"),
    (RP, RR): Conversion("first_grad", None, None),
    (RR, PR): Conversion("first_only", None, None),
    (PR, RR): Conversion("all_reduce", "all_reduce", None),
    (PR, RP): Conversion("all_reduce_partial", "all_reduce", "all_reduce"),
}


@lru_cache(maxsize=4096)
def conversion(source: State, target: State, requires_grad: bool) -> Conversion | None:
    """The runtime function that turns `source` into `target`, or None where there is no single one.

    For a tensor without gradient the backward costs nothing.
    """
    if _is_own(source) or _is_own(target):
        return None
    found = _conversion(source, target)
    if found is not None and not requires_grad:
        return Conversion(found.name, found.forward, None)
    return found


def _is_own(state: State) -> bool:
    return isinstance(state.value, Own) or (isinstance(state.value, Shard) and state.value.own)


def _conversion(source: State, target: State) -> Conversion | None:
    match source.value, target.value:
        case Shard(), Shard() as to:
            if source.value.sections or to.sections or source.value.dim == to.dim:
                return None
            return Conversion("all_to_all", "all_to_all", "all_to_all")
        case Shard(), Replicate():
            if target == RP:
                return Conversion("all_gather", "all_gather", "reduce_scatter")
            return Conversion("all_gather_replicated", "all_gather", None)
        case Replicate(), Shard():
            if source == RR:
                return Conversion("shard", None, "all_gather")
            return Conversion("shard_partial", None, None)
        case Partial(), Shard():
            return Conversion("reduce_scatter", "reduce_scatter", "all_gather")
        case _:
            return _REPLICATED_CONVERSIONS.get((source, target))


def stored_state(asked: Iterable[State]) -> State:
    """The state in which a parameter is stored, given what its consumers ask.

    It is sharded where all of them want the same shard, so that nothing moves. Any other is whole on every
    rank, with a partial gradient as soon as one consumer gives it one.
    """
    states = list(dict.fromkeys(asked))
    if len(states) == 1 and isinstance(states[0].value, Shard):
        return states[0]
    return RP if any(isinstance(state.grad, Partial) for state in states) else RR
