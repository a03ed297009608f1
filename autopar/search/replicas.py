"""What one rank of the data and context axes runs: the model at its share of the batch and of the sequence.

Both follow from the model alone, so they are propagated, not searched. A context axis splits the sequence of every
input. Attention then computes its own rows against gathered keys and values; with a causal mask rows are dealt out so
that all ranks have as much to do (as llama3's training does, arXiv:2407.21783, section 3.3.2), which is why the causal
rule, that rows cannot be split evenly, is set aside here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.data_parallel import data_parallel, gathered_ops
from autopar.errors import InvalidParallelismError
from autopar.localize import Assignment, Localized, localize
from autopar.pricing import is_causal
from graphs.blocks import find_blocks
from graphs.ir import Op, OpGraph

SEQUENCE = 1
"""The dimension of every input that a context axis splits."""


@dataclass(frozen=True)
class Replica:
    """A graph at one microbatch size, local on the data and context axes.

    `whole` has the blocks and names that plans refer to; `keys` the strategies of its representative ops by axis;
    `gathered` names the ops before which the batch is gathered because samples meet there.
    """

    whole: OpGraph
    local: Localized
    assignments: Mapping[str, Assignment]
    keys: Mapping[str, Mapping[str, str]]
    gathered: tuple[str, ...]


def make_replica(whole: OpGraph, dp: Assignment | None, cp: int) -> Replica:
    """The replica with `dp` applied and, where `cp` is above 1, the context axis propagated."""
    local, assignments = Localized.of(whole), {}
    keys: dict[str, Mapping[str, str]] = {}
    gathered: tuple[str, ...] = ()
    if dp is not None:
        assignments["dp"], keys["dp"] = dp, strategy_keys(whole, dp)
        local = _with_blocks(localize(local, dp))
        gathered = tuple(op.name for op in gathered_ops(whole, dp))
    if cp > 1:
        assignments["cp"] = context_parallel(local.graph, cp)
        keys["cp"] = strategy_keys(local.graph, assignments["cp"])
        local = _with_blocks(localize(local, assignments["cp"]))
    return Replica(whole, local, assignments, keys, gathered)


def _with_blocks(local: Localized) -> Localized:
    return replace(local, graph=replace(local.graph, blocks=find_blocks(local.graph)))


def strategy_keys(graph: OpGraph, assignment: Assignment) -> dict[str, str]:
    """Strategy keys by the names of representative ops."""
    return {
        graph.ops[index].name: assignment.choice[index].key for index in dict.fromkeys(graph.representative)
    }


def context_parallel(graph: OpGraph, size: int) -> Assignment:
    """Shard the sequence of every input over `size` ranks and let the rest follow.

    Raises InvalidParallelismError where no input has a sequence that divides.
    """
    lengths = {graph.tensors[name].shape[SEQUENCE] for name in graph.inputs if len(graph.tensors[name].shape) > 1}
    if not any(length % size == 0 for length in lengths):
        raise InvalidParallelismError(
            f"cp={size} divides the sequence of no input of {graph.name}; "
            f"their lengths are {', '.join(map(str, sorted(lengths))) or 'none'}"
        )
    free = replace(graph, ops=tuple(_without_order(op) for op in graph.ops))
    return data_parallel(free, size, axis="cp", dim=SEQUENCE)


def _without_order(op: Op) -> Op:
    """The op as if its rows were independent: attention without its causal mask, a loss that counts its own rows."""
    if "scaled_dot_product" in op.target and is_causal(op):
        args = (*op.args[:5], False, *op.args[6:]) if len(op.args) > 5 else op.args
        kwargs = {**op.kwargs, "is_causal": False} if "is_causal" in op.kwargs else op.kwargs
        return replace(op, args=args, kwargs=kwargs)
    if op.target == "autopar.cross_entropy":
        kwargs = {name: value for name, value in op.kwargs.items() if not name.endswith("_axis")}
        return replace(op, target="aten.cross_entropy_loss.default", kwargs=kwargs)
    return op
