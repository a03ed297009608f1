"""What one rank of the data and context axes runs: the model at its share of the batch and of the sequence.

The data axis follows from the model alone, so it is propagated, not searched. A context axis splits the
sequence of every input. As a person asks for it, which is what is here, attention then computes its own rows
against gathered keys and values; what the search may do is in `autopar.search.context`. With a causal mask
rows are dealt out so that all ranks have as much to do (as llama3's training does, arXiv:2407.21783, section
3.3.2), which is why the causal rule, that rows cannot be split evenly, is set aside in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from autopar.data_parallel import data_parallel, gathered_ops
from autopar.errors import InvalidParallelismError
from autopar.localize import Assignment, Localized, localize
from autopar.op_kinds import without_order
from autopar.placements import RP, RR, Placement, Shard, State, sharded
from autopar.strategies import Offers, Strategy, conversion, natural_sections, settle
from graphs.ir import Op, OpGraph

SEQUENCE = 1
"""The dimension of every input that a context axis splits."""


Split = Callable[[OpGraph, int], Assignment]
"""Splits the sequence of a graph's inputs over a context axis of some ranks."""


@dataclass(frozen=True)
class Replica:
    """A graph at one microbatch size, local on the data and context axes.

    `whole` has the blocks and names that plans refer to, `outer` is local on the data axes alone; `keys` has
    the strategies of representative ops by axis; `gathered` names the ops before which the batch is gathered
    because samples meet there.
    """

    whole: OpGraph
    outer: OpGraph
    local: Localized
    assignments: Mapping[str, Assignment]
    keys: Mapping[str, Mapping[str, str]]
    gathered: tuple[str, ...]


def make_replica(whole: OpGraph, dp: Assignment | None, cp: int = 1, split: Split | None = None) -> Replica:
    """The replica with `dp` applied and, where `cp` is above 1, the sequence split (`with_context`)."""
    local, assignments = Localized.of(whole), {}
    keys: dict[str, Mapping[str, str]] = {}
    gathered: tuple[str, ...] = ()
    if dp is not None:
        assignments["dp"], keys["dp"] = dp, strategy_keys(whole, dp)
        local = localize(local, dp)
        gathered = tuple(op.name for op in gathered_ops(whole, dp))
    replica = Replica(whole, local.graph, local, assignments, keys, gathered)
    return with_context(replica, cp, split) if cp > 1 else replica


def with_context(replica: Replica, cp: int, split: Split | None = None) -> Replica:
    """The replica, whole on the context axis so far, with the sequence split over `cp` ranks: by `split`, or
    in the customary way of `context_parallel`."""
    outer = replica.outer
    assignment = (split or context_parallel)(outer, cp)
    return replace(
        replica,
        local=localize(replica.local, assignment),
        assignments={**replica.assignments, "cp": assignment},
        keys={**replica.keys, "cp": strategy_keys(outer, assignment)},
    )


def strategy_keys(graph: OpGraph, assignment: Assignment) -> dict[str, str]:
    """Strategy keys by the names of the first ops of their class, and of the ops that do otherwise than
    these."""
    keys = [strategy.key for strategy in assignment.choice]
    classes = replace(graph, blocks=tuple(replace(block, form=0) for block in graph.blocks))
    return {
        op.name: key
        for index, (op, key, like) in enumerate(zip(graph.ops, keys, classes.representative, strict=True))
        if index == like or key != keys[like]
    }


def context_parallel(graph: OpGraph, size: int) -> Assignment:
    """Shard the sequence of every input over `size` ranks and let the rest follow, samples staying together.

    A rank is given its samples whole and takes its positions of them, so that what needs all of them (labels,
    to be shifted) moves nothing. Raises InvalidParallelismError where no input has a sequence that divides.
    """
    if not any(_length(graph, name) % size == 0 for name in graph.inputs):
        lengths = (f"{name} has {_length(graph, name)} ({_reader(graph, name)})" for name in graph.inputs)
        raise InvalidParallelismError(
            f"cp={size} divides the sequence of no input of {graph.name}; of positions {', '.join(lengths)}. "
            "Use a cp that divides one of them, or divide samples (dp) or channels (tp)"
        )
    free = replace(graph, ops=tuple(without_order(op) for op in graph.ops))
    split = {name: sharded(SEQUENCE) for name in graph.inputs if _length(graph, name) % size == 0}
    whole = dict.fromkeys((*graph.inputs, *(buffer.tensor for buffer in graph.buffers)), RR)
    sources = whole | split | {parameter.tensor: RP for parameter in graph.parameters}
    sources = {name: settle(state, graph.tensors[name].requires_grad) for name, state in sources.items()}
    offers = Offers(free, size, natural_sections(free, size))
    made, samples = dict(sources), Samples.of(graph)
    choice = []
    for op in free.ops:
        offered = (each for each in offers.of(op) if not samples.are_split(op, each))
        best = min(offered, key=partial(_cost, op, free, made))
        made.update(zip(op.outputs, best.results, strict=True))
        choice.append(best)
    return Assignment("cp", size, tuple(choice), sources | dict.fromkeys(graph.inputs, RR))


@dataclass(frozen=True)
class Samples:
    """Where the samples of a batch are in each tensor: `placements` are those of data parallelism."""

    batch: int
    placements: Mapping[str, Placement]

    @staticmethod
    def of(graph: OpGraph, known: dict[int, Mapping[str, Placement]] | None = None) -> Samples:
        """The samples of a graph.

        `known` has the placements of the same graph at other batch sizes, by the number of parts, and is
        added to: they hold for all where no sections depend on the size.
        """
        batch = max(
            (graph.tensors[name].shape[0] for name in graph.inputs if graph.tensors[name].shape), default=1
        )
        if batch == 1:
            return Samples(1, {})
        parts = next(n for n in range(2, batch + 1) if batch % n == 0)
        if known is not None and parts in known:
            return Samples(batch, known[parts])
        split = data_parallel(graph, parts)
        placements = {name: split.state_of(graph, name).value for name in graph.tensors}
        if known is not None and not any(
            isinstance(value, Shard) and value.sections for value in placements.values()
        ):
            known[parts] = placements
        return Samples(batch, placements)

    def are_split(self, op: Op, strategy: Strategy) -> bool:
        """Whether a strategy gives ranks some samples and not others."""
        states = zip((*op.inputs, *op.outputs), (*strategy.operands, *strategy.results), strict=True)
        return any(self._is_split(self.placements.get(name), state.value) for name, state in states)

    def _is_split(self, samples: Placement | None, split: Placement) -> bool:
        """Where samples and positions share a dimension, each sample has to be a section, or several."""
        if not isinstance(samples, Shard) or not isinstance(split, Shard) or samples.dim != split.dim:
            return False
        return samples == split or split.sections is None or len(split.sections) % self.batch != 0


def _reader(graph: OpGraph, name: str) -> str:
    """Who reads an input first."""
    if not graph.consumers[name]:
        return "read by nothing"
    op = graph.ops[graph.consumers[name][0]]
    return f"read by {op.name}, {op.target}, in {op.module or 'the root'}"


def _length(graph: OpGraph, name: str) -> int:
    """The sequence length of an input; 1 where it has none."""
    shape = graph.tensors[name].shape
    return shape[SEQUENCE] if len(shape) > SEQUENCE else 1


def _cost(
    op: Op, graph: OpGraph, made: Mapping[str, State], strategy: Strategy
) -> tuple[float, int, int, int]:
    """Arithmetic not divided, bytes moved, number of conversions, 1 if work is split for no reason."""
    moved = conversions = 0
    for name, needed in zip(op.inputs, strategy.operands, strict=True):
        tensor = graph.tensors[name]
        if made[name] == needed:
            continue
        how = conversion(made[name], needed, tensor.requires_grad)
        if how is None or (name in graph.parameter_tensors and isinstance(needed.value, Shard)):
            return (inf, 0, 0, 0)
        conversions += 1
        moved += tensor.num_bytes * ((how.forward is not None) + (how.backward is not None))
    undivided = 0 if strategy.factor else op.flops
    return (undivided, moved, conversions, int((strategy.factor is not None) != bool(op.inputs)))
