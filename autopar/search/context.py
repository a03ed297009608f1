"""The context axis: the sequence of every input is split, and attention gets what it needs of other ranks.

Weights stay whole, samples stay together, and every product divides its work. Within that the strategies are
found at their prices, by the program of the tensor axis (`autopar.search.block_ilp`): keys and values are
gathered where they are smallest (Llama 3, arXiv:2407.21783, section 3.3.2), or positions are exchanged for
heads and back (Ulysses, arXiv:2309.14509, section 3), each attention for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.localize import Assignment
from autopar.op_kinds import without_order
from autopar.placements import Shard
from autopar.pricing import Pricer
from autopar.search.axis_prices import Prices
from autopar.search.axis_problem import LOSS_STATES, AxisProblem
from autopar.search.block_ilp import MANY_MICROBATCHES, BlockIlp
from autopar.search.cut import cheapest_cut
from autopar.search.effort import Effort
from autopar.search.replicas import Samples
from autopar.strategies import Strategy
from graphs.ir import Op, OpGraph

ROWS = -2
"""The dimension of attention's operands that holds positions."""


class ContextProblem(AxisProblem):
    """The choice on a context axis of `size` ranks.

    `whole_heads` leaves heads to a tensor axis: no exchange is written for those that both would split.
    """

    def __init__(
        self,
        graph: OpGraph,
        size: int,
        prices: Prices,
        counts: Sequence[int],
        *,
        whole_heads: bool,
        samples: Samples,
    ) -> None:
        self._samples = samples
        self._whole_heads = whole_heads
        super().__init__(graph, "cp", size, prices, counts)

    def solution(self, effort: Effort) -> Assignment:
        """The cheapest assignment. Gradients of weights are summed once a step, with the data axes."""
        return BlockIlp(self, effort).solve(MANY_MICROBATCHES).assignment

    def _offered(self, op: Op) -> tuple[Strategy, ...]:
        offered = self.offers.of(without_order(op))
        found = [strategy for strategy in offered if self._is_context(op, strategy)]
        divided = [strategy for strategy in found if strategy.factor is not None]
        return tuple(divided if op.flops and divided else found)

    def _is_context(self, op: Op, strategy: Strategy) -> bool:
        """Whether weights stay whole and samples together."""
        split = {
            name: state.value
            for name, state in zip(
                (*op.inputs, *op.outputs), (*strategy.operands, *strategy.results), strict=True
            )
            if isinstance(state.value, Shard)
        }
        if self._samples.are_split(op, strategy) or split.keys() & self.graph.parameter_tensors.keys():
            return False
        if self.graph.loss in op.outputs:
            return strategy.results[op.outputs.index(self.graph.loss)] in LOSS_STATES
        if self._whole_heads and is_attention(op):
            positions = len(self.graph.tensors[op.outputs[0]].shape) + ROWS
            return all(value.dim == positions for name, value in split.items() if name in op.outputs)
        return True


def is_attention(op: Op) -> bool:
    """Whether the op is attention as one kernel."""
    return "scaled_dot_product" in op.target


def exchange_floor_s(op: Op, graph: OpGraph, pricer: Pricer, tp: int) -> float:
    """No context axis moves less for one attention: the cheaper of gathering its keys and values, and of
    exchanging positions for heads and back; in one message each way, where values are smallest, and divided
    over the `tp` ranks of a tensor axis.

    0 where the keys do not divide, so that every rank has them.
    """
    group = pricer.groups["cp"]
    if not is_attention(op) or graph.tensors[op.inputs[1]].shape[ROWS] % group.size:
        return 0.0
    query, key, value = op.inputs[:3]
    both = graph.tensors[op.outputs[0]].requires_grad
    gathered = least_bytes((key, value), graph) / tp
    gathered_s = pricer.collective_s("all_gather", gathered, group)
    gathered_s += both * pricer.collective_s("reduce_scatter", gathered, group)
    there = least_bytes((query, key, value), graph) / (tp * group.size)
    back = _least_bytes_after(op.outputs[0], graph) / (tp * group.size)
    exchanged_s = sum(pricer.collective_s("all_to_all", num_bytes, group) for num_bytes in (there, back))
    return min(gathered_s, (1 + both) * exchanged_s)


def least_bytes(wanted: Sequence[str], graph: OpGraph) -> float:
    """Bytes with a gradient that some ops and no product make these values from: before heads were repeated,
    say."""
    made_from: dict[str, tuple[str, ...]] = {}
    waiting = list(wanted)
    costs: dict[str, float] = {}
    while waiting:
        name = waiting.pop()
        if name in costs:
            continue
        tensor = graph.tensors[name]
        costs[name] = float(tensor.num_bytes) if tensor.requires_grad else 0.0
        if (
            name in graph.producer
            and not (op := graph.ops[graph.producer[name]]).flops
            and tensor.requires_grad
        ):
            made_from[name] = tuple(dict.fromkeys(op.inputs))
            waiting += made_from[name]
    return sum(costs[name] for name in cheapest_cut(costs, made_from, wanted))


def _least_bytes_after(name: str, graph: OpGraph) -> int:
    """Bytes of a value where it is smallest on its way to the next product."""
    least = graph.tensors[name].num_bytes
    while len(readers := graph.consumers[name]) == 1:
        op = graph.ops[readers[0]]
        if op.flops or len(op.outputs) != 1:
            break
        name = op.output
        least = min(least, graph.tensors[name].num_bytes)
    return least
