"""The program of one rank: a graph, split over one mesh axis.

`localize` takes a graph and a strategy for every op on one axis and returns the graph that each rank of the
axis runs: local shapes, size arguments rewritten, and an explicit conversion wherever a tensor is needed in
another state than the one it was made in. The result is an ordinary `OpGraph`, so axes compose: localize over
the data axis, decide the tensor axis on what is left, localize again.

A conversion is an op `autopar.<name>` with the tensor, the dimension(s) and sections as arguments and the
axis as a keyword; `autopar.strategies.conversion` says which one stands between two states.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from autopar.local_forms import LOCAL_FORMS
from autopar.op_kinds import CONSTANTS, is_causal
from autopar.placements import RR, Partial, Shard, State
from autopar.size_arguments import SIZE_ARGUMENTS, Sizes
from autopar.strategies import Conversion, Strategy, conversion, settle
from graphs.ir import Block, Op, OpGraph, Ref, Tensor, map_refs

CAUSAL_ROWS = "autopar.scaled_dot_product_attention"
"""Attention that knows at which positions its queries stand: theirs are split, and its mask is causal."""


@dataclass(frozen=True)
class Assignment:
    """What every op does on one mesh axis, and how what it starts from lies there.

    `choice` has one strategy per op of the graph; `sources` the state of every input, parameter and buffer.
    """

    axis: str
    size: int
    choice: tuple[Strategy, ...]
    sources: Mapping[str, State]

    def state_of(self, graph: OpGraph, tensor: str) -> State:
        """The state in which a tensor is made, before any conversion."""
        index = graph.producer.get(tensor)
        if index is None:
            return self.sources.get(tensor, RR)
        return self.choice[index].results[graph.ops[index].outputs.index(tensor)]


@dataclass(frozen=True)
class Localized:
    """A local graph, and for each of its tensors the state it has on each axis localized so far."""

    graph: OpGraph
    states: Mapping[str, Mapping[str, State]]

    @staticmethod
    def of(graph: OpGraph) -> Localized:
        """The whole program on one device."""
        return Localized(graph, {})


def localize(whole: Localized, assignment: Assignment) -> Localized:
    """What one rank of `assignment.axis` runs."""
    return _Localizer(whole, assignment).run()


def localize_op(op: Op, strategy: Strategy, graph: OpGraph, axis: str, size: int) -> OpGraph:
    """What one rank of an axis of `size` runs for one op of a graph, as a graph of its own whose inputs are
    already in the states that the strategy asks."""
    states = zip((*op.inputs, *op.outputs), (*strategy.operands, *strategy.results), strict=True)
    tensors = {name: _local_tensor(graph.tensors[name], state, size) for name, state in states}
    ranks, versions = _Ranks(graph, axis, size, tensors), {name: name for name in op.inputs}
    ops = tuple(_local_ops(op, strategy, ranks, versions))
    for name in [name for local in ops for name in local.outputs if name not in tensors]:
        tensors[name] = tensors[op.output].renamed(name, name)  # a step on the way to the op's result
    inputs = tuple(dict.fromkeys(op.inputs))
    return OpGraph(op.name, tensors, ops, (), (), inputs, op.outputs, op.outputs, None, {})


class _Inserted(NamedTuple):
    """An op that localization puts beside another: which of the operands and results of that one it is for,
    how that was made and is needed, and, where it is a constant made anew, what says which."""

    place: int
    made: State
    needed: State
    constant: str = ""


class _Localizer:
    def __init__(self, whole: Localized, assignment: Assignment) -> None:
        self.graph = whole.graph
        self.outer_states = whole.states
        self.assignment = assignment
        self.axis, self.size = assignment.axis, assignment.size
        self.tensors: dict[str, Tensor] = {}
        self.ranks = _Ranks(self.graph, self.axis, self.size, self.tensors)
        self.states: dict[str, dict[str, State]] = {}
        self.ops: list[list[Op]] = [[] for _ in self.graph.ops]
        self.inserted: list[list[_Inserted]] = [[] for _ in self.graph.ops]
        self.versions: dict[str, dict[State, str]] = {}

    def run(self) -> Localized:
        for name, tensor in self.graph.tensors.items():
            if name not in self.graph.producer:
                self._define(tensor, settle(self.assignment.sources.get(name, RR), tensor.requires_grad))
        for index, (op, strategy) in enumerate(zip(self.graph.ops, self.assignment.choice, strict=True)):
            versions = {
                name: self._in_state(name, needed, index)
                for name, needed in zip(op.inputs, strategy.operands, strict=True)
            }
            for name, state in zip(op.outputs, strategy.results, strict=True):
                tensor = self.graph.tensors[name]
                self._define(tensor, state, storage=self.ranks.storage(tensor.storage, versions))
            for local in _local_ops(op, strategy, self.ranks, versions):
                self.ops[index].append(local)
                for name in local.outputs:
                    if name not in self.tensors:  # a step on the way to the op's result
                        self._define(self.graph.tensors[op.output], strategy.results[0], name)
        ops, blocks = tuple(op for group in self.ops for op in group), tuple(self._blocks())
        return Localized(replace(self.graph, tensors=self.tensors, ops=ops, blocks=blocks), self.states)

    def _blocks(self) -> Iterator[Block]:
        """The blocks where their ops are now. Those of one class stay so whose ops have the same strategies
        and stand beside the same inserted ones: nothing else tells them apart."""
        starts = [0, *accumulate(map(len, self.ops))]
        classes: dict[Hashable, int] = {}
        for block in self.graph.blocks:
            inside = slice(block.start, block.stop)
            keys = tuple([strategy.key for strategy in self.assignment.choice[inside]])
            inserted = tuple(map(tuple, self.inserted[inside]))
            number = classes.setdefault((block.block_class, keys, inserted), len(classes))
            yield replace(block, block_class=number, start=starts[block.start], stop=starts[block.stop])

    def _define(
        self, tensor: Tensor, state: State, name: str | None = None, storage: str | None = None
    ) -> None:
        """Add the local tensor of `tensor` in `state`: one with a `name` and memory of its own, or else the
        version that needs no conversion, with the memory of `storage` if that is another."""
        part = _local_tensor(tensor, state, self.size)
        local = name or tensor.name
        if name is not None or (storage is not None and storage != tensor.storage):
            part = part.renamed(local, storage or local)
        self.tensors[local] = part
        self.states[local] = {**self.outer_states.get(tensor.name, {}), self.axis: state}
        self.versions.setdefault(tensor.name, {}).setdefault(state, local)

    def _in_state(self, name: str, needed: State, consumer: int) -> str:
        """The name of the version of a tensor that is in state `needed`, converting it on first need.

        A partial sum is reduced where it is made; everything else is converted before its first consumer.
        Either way the conversion belongs to a block of its own and repeated blocks stay alike.
        """
        tensor = self.graph.tensors[name]
        needed = settle(needed, tensor.requires_grad)
        versions = self.versions[name]
        if needed in versions:
            return versions[needed]
        made = settle(self.assignment.state_of(self.graph, name), tensor.requires_grad)
        how = conversion(made, needed, tensor.requires_grad)
        assert how is not None, f"{self.graph.ops[consumer].name} needs {name} as {needed}, made as {made}"
        local = f"{name}__{self.axis}_{len(versions)}"
        self._define(tensor, needed, local)
        beside = self.graph.producer[name] if isinstance(made.value, Partial) else consumer
        neighbour = self.graph.ops[beside]
        place = (*neighbour.inputs, *neighbour.outputs).index(name)
        maker = self.graph.ops[self.graph.producer[name]] if name in self.graph.producer else None
        if maker is not None and maker.target in CONSTANTS and isinstance(needed.value, Shard):
            text = f"{maker.target}{maker.args[1:]}{maker.kwargs}"
            self.inserted[consumer].append(_Inserted(place, made, needed, text))
            self.ops[consumer].append(self._constant(maker, local))
            return local
        self.inserted[beside].append(_Inserted(place, made, needed))
        self.ops[beside].append(
            Op(
                name=local,
                target=f"autopar.{how.name}",
                args=(Ref(versions[made]), *conversion_dims(how, made, needed)),
                kwargs={"axis": self.axis, **zigzag_argument(made, needed)},
                outputs=(local,),
                module=neighbour.module,
            )
        )
        return local

    def _constant(self, op: Op, local: str) -> Op:
        """A part of a tensor all of whose elements are the same is made where it is needed."""
        shape = list(self.tensors[local].shape)
        return replace(op, name=local, args=(shape, *op.args[1:]), outputs=(local,))


@dataclass(frozen=True)
class _Ranks:
    """The ranks of an axis that share a graph, with the local `tensors` of one of them."""

    graph: OpGraph
    axis: str
    size: int
    tensors: Mapping[str, Tensor]

    def storage(self, storage: str, versions: Mapping[str, str]) -> str:
        """The local tensor behind a storage of the whole graph: the converted version where an op reads one,
        `versions` being the names of what it reads."""
        for name, local in versions.items():
            if self.graph.tensors[name].storage == storage:
                return self.tensors[local].storage
        return storage


def _local_ops(op: Op, strategy: Strategy, ranks: _Ranks, versions: Mapping[str, str]) -> Iterator[Op]:
    """What a rank runs for an op of the whole graph, on these `versions` of its operands."""
    size = ranks.size if strategy.factor is not None else 1
    args, kwargs = op.args, op.kwargs
    if any(name != local for name, local in versions.items()):
        args, kwargs = map_refs((args, dict(kwargs)), lambda name: Ref(versions[name]))
    flops, internal_bytes = op.flops // size, op.saved_internal_bytes // size
    saved = tuple([ranks.storage(name, versions) for name in op.saved])
    local = op
    after = args, kwargs, flops, saved, internal_bytes
    if after != (op.args, op.kwargs, op.flops, op.saved, op.saved_internal_bytes):
        local = Op(
            op.name, op.target, args, kwargs, op.outputs, op.module, flops, saved, internal_bytes,
            op.window, op.rows,
        )  # fmt: skip
    if strategy.implementation is not None:
        yield from LOCAL_FORMS[strategy.implementation](local, ranks.axis, ranks.size)
        return
    if splits_causal_rows(op, strategy, ranks.graph):
        kwargs = {**local.kwargs, "row_axis": ranks.axis, **zigzag_argument(strategy.results[0])}
        yield replace(local, target=CAUSAL_ROWS, kwargs=kwargs)
        return
    resize = SIZE_ARGUMENTS.get(op.target)
    if resize is not None:
        local = resize(local, Sizes(op, strategy, ranks.tensors, ranks.size))
    yield local


def _local_tensor(tensor: Tensor, state: State, size: int) -> Tensor:
    """One rank's part of a tensor."""
    if not isinstance(state.value, Shard):
        return tensor
    shape = local_shape(tensor.shape, state, size)
    return Tensor(tensor.name, shape, tensor.dtype, tensor.requires_grad, tensor.storage)


def splits_causal_rows(op: Op, strategy: Strategy, graph: OpGraph) -> bool:
    """Whether the queries of an attention are split that derives its mask from their positions."""
    if "scaled_dot_product" not in op.target or not is_causal(op):
        return False
    attended, positions = strategy.results[0].value, len(graph.tensors[op.outputs[0]].shape) - 2
    return isinstance(attended, Shard) and attended.dim == positions


def local_shape(shape: tuple[int, ...], state: State, size: int) -> tuple[int, ...]:
    """The shape of one rank's part of a tensor."""
    if not isinstance(state.value, Shard):
        return shape
    dim = state.value.dim
    assert shape[dim] % size == 0, f"dimension {dim} of {shape} does not divide by {size}"
    return (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])


def conversion_dims(how: Conversion, made: State, needed: State) -> tuple[Any, ...]:
    """The arguments of a conversion after the tensor: the dimension that is gathered or cut, and its
    sections.
    """
    source, target = made.value, needed.value
    if isinstance(source, Shard) and isinstance(target, Shard):
        return (source.dim, target.dim)
    for shard in (source, target):
        if isinstance(shard, Shard):
            return (shard.dim,) if shard.sections is None else (shard.dim, shard.sections)
    return ()


def zigzag_argument(*states: State) -> dict[str, Any]:
    """The keyword argument of an op that deals a dimension out in zigzag; of a change from one dimension to
    another, which of them."""
    shards = [state.value for state in states if isinstance(state.value, Shard)]
    dims = tuple(shard.dim for shard in shards if shard.zigzag)
    return {"zigzag": dims if len(shards) > 1 else True} if dims else {}
