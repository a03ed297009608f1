"""Tensor parallelism as a person pins it: Megatron's columns and rows, whatever the model or the cluster.

Someone who asks for a degree means the customary split: every weight of a matrix product is split, by columns
and then by rows, tables by vocabulary, and the loss follows (arXiv:1909.08053). The rest of a layer, its
norms, dropout and residuals, is either whole on every rank or, with sequence parallelism, split along the
sequence (arXiv:2205.05198, section 4.2.2). `RegionRule` says which of the two; within it the operator layer's
problem is solved for the fewest bytes moved (`BytesMoved`), so the answer depends on no price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from autopar.data_parallel import data_parallel
from autopar.localize import Assignment
from autopar.op_kinds import kind_of
from autopar.placements import Shard
from autopar.pricing import DEFAULT_SOFTWARE, OpCost
from autopar.search.axis_problem import AxisProblem
from autopar.search.block_ilp import MANY_MICROBATCHES, AxisSolution, BlockIlp
from autopar.search.needs import Needs
from autopar.search.replicas import SEQUENCE, context_parallel
from autopar.search.shallow import local_counts
from autopar.strategies import Conversion, Strategy
from autopar.traffic import EVERYTHING_TOUCHES_MEMORY, Traffic
from costmodel import software
from graphs.ir import Op, OpGraph

BATCH = 0
"""The dimension of every input that holds samples."""

LOOKUP = "vocab_parallel_embedding"


REFERENCE_BATCH = 3
"""Samples of the graph that strategies are chosen on: with one, rows and positions look alike, and an even
number could be split where the sequence should be."""


class Degrees(NamedTuple):
    """What pinned strategies depend on; `data_size` only in so far as replicas compute together.

    `batch` is the microbatch size that they are chosen at: the reference, but with a context axis, which
    divides rows in another way for every microbatch size, the size that is asked for.
    """

    batch: int
    data_size: int
    cp: int
    tp: int
    sequence_parallel: bool

    @staticmethod
    def of(microbatch_size: int, data_size: int, cp: int, tp: int, sequence_parallel: bool) -> Degrees:
        """The degrees for a microbatch size."""
        batch = microbatch_size if cp > 1 else REFERENCE_BATCH
        return Degrees(batch, data_size, cp, tp, sequence_parallel)


class PinnedStrategies:
    """The strategies of one model, found once for a degree: they name dimensions and not sizes, so those of
    one microbatch size are those of another.

    `counts` says for how many ops of the model each op of its graphs stands, by name.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = counts
        self._solutions: dict[Degrees, AxisSolution] = {}

    def solution(self, graph: OpGraph, degrees: Degrees) -> AxisSolution:
        """The solution for a replica at these degrees; `graph` is its graph at `degrees.batch`."""
        if degrees not in self._solutions:
            problem = pinned_problem(
                graph,
                degrees.tp,
                local_counts(graph.ops, self.counts),
                sequence_parallel=degrees.sequence_parallel,
            )
            self._solutions[degrees] = BlockIlp(problem).solve(MANY_MICROBATCHES)
        return self._solutions[degrees]


def pinned_problem(
    graph: OpGraph, size: int, counts: Sequence[int] | None = None, *, sequence_parallel: bool
) -> AxisProblem:
    """The choice that is left on a tensor axis of `size` ranks; its seconds are bytes moved."""
    return AxisProblem(
        graph, "tp", size, BytesMoved(size), counts, RegionRule(graph, sequence_parallel=sequence_parallel)
    )


@dataclass(frozen=True)
class BytesMoved:
    """Prices of a machine that is all links: a byte sent takes a second.

    A ring sends and receives (N - 1)/N of a tensor in an all_gather or a reduce_scatter, twice that in an
    all_reduce, and 1/N of that in an all_to_all. What every rank computes for itself counts a little, by the
    bytes it touches and the operations it does, so that of two ways to send as much the better divided one
    is taken.
    """

    size: int

    def traffic(self, graph: OpGraph) -> Traffic:
        return EVERYTHING_TOUCHES_MEMORY

    def needs(self, graph: OpGraph) -> Needs:
        return Needs(graph, software(DEFAULT_SOFTWARE))  # of which nothing depends where bytes have no price

    def op(self, local: OpGraph, traffic: Traffic) -> OpCost:
        touched = sum(
            local.tensors[name].num_bytes
            for op in local.ops
            if kind_of(op, local.tensors) not in ("view", "communication")
            for name in dict.fromkeys((*op.inputs, *op.outputs))
        )
        return OpCost(LOCAL_WORK * (touched + sum(op.flops for op in local.ops)))

    def exposed(self, cost: OpCost) -> OpCost:
        return cost

    def conversion_s(self, how: Conversion, num_bytes: float) -> float:
        return sum(self._sent(kind, num_bytes) for kind in (how.forward, how.backward) if kind is not None)

    def reduction_s(self, num_bytes: float) -> float:
        return self._sent("all_reduce", num_bytes)

    def _sent(self, kind: str, num_bytes: float) -> float:
        share = {"all_reduce": 2.0, "all_to_all": 1 / self.size}.get(kind, 1.0)
        return share * num_bytes * (self.size - 1) / self.size


LOCAL_WORK = 1e-4
"""Seconds of a byte touched or an operation done: so few that they only decide between equals."""


@dataclass(frozen=True)
class RegionRule:
    """What lies between the split products of a layer is whole on every rank, or split along the sequence."""

    graph: OpGraph
    sequence_parallel: bool

    def admitted(self, op: Op, offered: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        """Strategies that split no samples, without sequence parallelism no tokens, and of all tables only
        those that are looked up with the model's inputs, by vocabulary."""
        names = (*op.inputs, *op.outputs)
        found = tuple(
            strategy
            for strategy in offered
            if not any(
                isinstance(state.value, Shard) and state.value.dim in self.whole_dims.get(name, ())
                for name, state in zip(names, (*strategy.operands, *strategy.results), strict=True)
            )
        )
        is_fed = any(name in self._fed for name in op.inputs)
        if any(strategy.implementation == LOOKUP for strategy in found):
            found = tuple(strategy for strategy in found if (strategy.implementation == LOOKUP) is is_fed)
        return found or offered

    def admits_conversion(self, how: Conversion) -> bool:
        """Without sequence parallelism every sum goes to all ranks at once, forward and backward."""
        return self.sequence_parallel or "reduce_scatter" not in (how.forward, how.backward)

    @cached_property
    def whole_dims(self) -> Mapping[str, frozenset[int]]:
        """Dimensions of each tensor that may not be split: those of the samples, and those of the tokens
        unless sequence parallelism splits them."""
        found: dict[str, frozenset[int]] = {}
        for dim in (BATCH,) if self.sequence_parallel else (BATCH, SEQUENCE):
            followed = _follow(self.graph, dim)
            if followed is None:
                continue
            for name in self.graph.tensors:
                value = followed.state_of(self.graph, name).value
                if isinstance(value, Shard):
                    found[name] = found.get(name, frozenset()) | {value.dim}
        return found

    @cached_property
    def _fed(self) -> frozenset[str]:
        """The inputs and whatever is computed from them."""
        found = set(self.graph.inputs)
        for op in self.graph.ops:
            if any(name in found for name in op.inputs):
                found.update(op.outputs)
        return frozenset(found)


def _follow(graph: OpGraph, dim: int) -> Assignment | None:
    """The way of a dimension of the inputs through the graph, None where there is nothing to split."""
    shapes = [graph.tensors[name].shape for name in graph.inputs]
    extent = max((shape[dim] for shape in shapes if len(shape) > dim), default=1)
    if extent == 1:
        return None
    parts = next(n for n in range(2, extent + 1) if extent % n == 0)
    return data_parallel(graph, parts) if dim == BATCH else context_parallel(graph, parts)
