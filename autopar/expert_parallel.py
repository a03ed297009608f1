"""Expert parallelism: each rank of `ep` holds some of the experts, and rows travel to those of theirs.

Ranks of `ep` are data-parallel ranks, so every activation of the local graph is of a rank's own rows already.
What is added is an exchange around the products of each mixture layer (GShard, arXiv:2006.16668), without a
capacity: as many rows as there are for each expert.

    counts of every rank's rows by expert      autopar.exchange_counts
    rows, to the ranks of their experts        autopar.to_experts
    products, and what is done row by row in between
    rows, back in the order in which they were sent      autopar.from_experts

Nothing is recognised by name: products are those whose rows a routing sorts (`graphs.routing`), and an expert
is what their second operand has along its first dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.errors import RewriteError
from autopar.localize import Localized
from autopar.op_kinds import is_conversion
from autopar.placements import sharded
from autopar.size_arguments import SIZE_ARGUMENTS
from graphs import rules
from graphs.ir import Op, OpGraph, Ref, Tensor, map_refs

GROUPED = "grouped_mm"
AXIS = "ep"


def expert_parallel(local: Localized, size: int) -> Localized:
    """What one of `size` ranks runs that share the experts of every layer.

    Raises RewriteError where rows cannot be followed to a product, or experts do not divide.
    """
    graph = local.graph
    layers = _layers(graph)
    if not layers:
        raise RewriteError(
            f"ep={size}, but {graph.name} has no experts (no grouped matrix product); use ep=1"
        )
    tensors, states = dict(graph.tensors), dict(local.states)
    for name in dict.fromkeys(name for layer in layers for name in layer.weights):
        tensor = tensors[name]
        if tensor.shape[0] % size:
            raise RewriteError(f"ep={size} does not divide the {tensor.shape[0]} experts of {name}")
        tensors[name] = replace(tensor, shape=(tensor.shape[0] // size, *tensor.shape[1:]))
        states[name] = {**states.get(name, {}), AXIS: sharded(0)}
    exchanges = [_Exchange(layer, tensors, size) for layer in layers]
    around = {index: exchange for exchange in exchanges for index in exchange.layer.inside}
    ops: list[Op] = []
    for index, op in enumerate(graph.ops):
        ops += [op] if index not in around else around[index].ops(index, op)
    for exchange in exchanges:
        states |= {name: states.get(source, {}) for name, source in exchange.made.items()}
    return Localized(replace(graph, tensors=tensors, ops=tuple(ops), blocks=()), states)


@dataclass(frozen=True)
class Layer:
    """The products of one mixture layer and what is between them.

    `counts` is the tensor by which rows are told apart, `inside` are the ops that run where the experts are,
    `entering` the rows that they read and `leaving` those that others read of them; `weights` are the
    parameters of the experts with all that is made of them on the way to a product.
    """

    counts: str
    inside: tuple[int, ...]
    entering: tuple[str, ...]
    leaving: tuple[str, ...]
    weights: tuple[str, ...]


def _layers(graph: OpGraph) -> tuple[Layer, ...]:
    products: dict[str, list[int]] = {}
    for index, op in enumerate(graph.ops):
        if GROUPED not in op.target:
            continue
        if op.rows is None:
            raise RewriteError(
                f"the rows of {op.name} ({op.target}, module {op.module or 'root'}) are not sorted in a way "
                "that could be followed, so they cannot be sent to their experts; use ep=1"
            )
        products.setdefault(op.inputs[2], []).append(index)
    return tuple(_layer(graph, counts, indices) for counts, indices in products.items())


def _layer(graph: OpGraph, counts: str, products: Sequence[int]) -> Layer:
    after = _reached(graph, products, products[-1])
    before = _leading(graph, products, products[0])
    inside = tuple(sorted({*products, *(after & before)}))
    made = {name for index in inside for name in graph.ops[index].outputs}
    entering: dict[str, None] = {}
    for index in inside:
        op = graph.ops[index]
        _check_rows(op)
        orders = op.rows or ("own",)
        entering |= dict.fromkeys(
            name
            for name, order in zip(op.inputs, orders, strict=False)
            if order == "own" and name not in made
        )
    leaving = [name for name in made if not set(graph.consumers[name]) <= set(inside)]
    (num_experts,) = graph.tensors[counts].shape
    weights = dict.fromkeys(
        name for index in products for name in _weights(graph, graph.ops[index], num_experts)
    )
    return Layer(counts, inside, tuple(entering), tuple(sorted(leaving)), tuple(weights))


def _reached(graph: OpGraph, starts: Iterable[int], last: int) -> set[int]:
    """The ops up to `last` that read what these make, directly or through others."""
    found: set[int] = set()
    waiting = list(starts)
    while waiting:
        read = {reader for name in graph.ops[waiting.pop()].outputs for reader in graph.consumers[name]}
        new = {index for index in read if index <= last} - found
        found |= new
        waiting += new
    return found


def _leading(graph: OpGraph, ends: Iterable[int], first: int) -> set[int]:
    """The ops from `first` on that the rows of these products are made by."""
    found: set[int] = set()
    waiting = [graph.ops[index].inputs[0] for index in ends]
    while waiting:
        index = graph.producer.get(waiting.pop(), -1)
        if index >= first and index not in found:
            found.add(index)
            waiting += graph.ops[index].inputs
    return found


def _check_rows(op: Op) -> None:
    """What is done between the products must not depend on how many rows there are."""
    is_told_rows = op.target in SIZE_ARGUMENTS and op.target not in _BY_COLUMNS
    moves_rows = 0 in op.args[1:] if is_conversion(op) else op.rows is None
    if moves_rows or is_told_rows:
        raise RewriteError(
            f"{op.name} ({op.target}, module {op.module or 'root'}) stands between the products of experts "
            "and depends on the number of rows, which ep makes differ from step to step; use ep=1"
        )


_BY_COLUMNS = {"aten.split.Tensor", "aten.split_with_sizes.default", "aten.slice.Tensor"}


def _weights(graph: OpGraph, product: Op, num_experts: int) -> Iterator[str]:
    """The parameter of a product, and what is made of it on the way there, expert by expert."""
    name = product.inputs[1]
    while len(graph.consumers[name]) == 1 and graph.tensors[name].shape[0] == num_experts:
        yield name
        if name in graph.parameter_tensors:
            return
        op = graph.ops[graph.producer[name]] if name in graph.producer else None
        rule = rules.rule_for(op, graph) if op is not None and len(op.inputs) == 1 else None
        if op is None or rule is None or rule.operands[0][:1] != rule.results[0][:1]:
            break
        name = op.inputs[0]
    raise RewriteError(
        f"the matrices of {product.name} (module {product.module or 'root'}) are not those of a parameter "
        f"with all {num_experts} experts along its first dimension, so they cannot be dealt out; use ep=1, "
        "or split another dimension of it on the other axes"
    )


class _Exchange:
    """The ops of one layer with the exchange around them; adds the tensors that they need to `tensors`."""

    def __init__(self, layer: Layer, tensors: dict[str, Tensor], size: int) -> None:
        self.layer = layer
        self.made: dict[str, str] = {}
        self.sent: set[str] = set()
        self.tensors = tensors
        counts = tensors[layer.counts]
        experts = counts.shape[0] // size
        self.ends = self._define(layer.counts, f"{layer.counts}__{AXIS}_0", (experts,))
        self.routes = self._define(layer.counts, f"{layer.counts}_routes", (2, size, experts))
        self.there = {
            name: self._define(name, f"{name}__{AXIS}_0", tensors[name].shape)
            for name in (*layer.entering, *layer.leaving)
        }

    def _define(self, source: str, name: str, shape: tuple[int, ...]) -> str:
        self.tensors[name] = replace(self.tensors[source], name=name, shape=shape, storage=name)
        self.made[name] = source
        return name

    def ops(self, index: int, op: Op) -> Iterator[Op]:
        """What runs in place of an op inside the layer."""
        if index == self.layer.inside[0]:
            yield self._op("exchange_counts", (self.layer.counts,), (self.ends, self.routes), op.module)
        for name in self.layer.entering:
            if name in op.inputs and name not in self.sent:
                self.sent.add(name)
                yield self._op("to_experts", (name, self.routes), (self.there[name],), op.module)
        here: Mapping[str, str] = self.there | {self.layer.counts: self.ends}
        args, kwargs = map_refs((op.args, dict(op.kwargs)), lambda name: Ref(here.get(name, name)))
        outputs = tuple(here.get(name, name) for name in op.outputs)
        yield replace(op, args=args, kwargs=kwargs, outputs=outputs)
        for name in op.outputs:
            if name in self.layer.leaving:
                yield self._op("from_experts", (self.there[name], self.routes), (name,), op.module)

    def _op(self, target: str, inputs: Sequence[str], outputs: tuple[str, ...], module: str) -> Op:
        args = tuple(map(Ref, inputs))
        name = f"{outputs[0]}__{target}"  # what rows return as has the name of the op that made them there
        return Op(name, f"autopar.{target}", args, {"axis": AXIS}, outputs, module)
