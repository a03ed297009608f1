"""A deep model made shallow for the search: of a long run of equal blocks the first, one in the middle, and
the last.

Blocks of one class share their strategies, so all that a search must know of the others is how many there
are: the middle one stands for them. What was found is carried back to the full depth (`programs`), where it
is priced again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphs import Capture
from graphs.ir import Block, Op, OpGraph, Ref, map_refs

SHORTEST_RUN = 5
"""Blocks in a run from which on it pays to shorten it."""


@dataclass(frozen=True)
class Shallow:
    """A shortened capture; `repeats` says for how many the blocks stand that stand for several, by path."""

    capture: Capture
    repeats: Mapping[str, int]

    @property
    def counts(self) -> dict[str, int]:
        """For how many ops of the full model each op stands, by name."""
        return counts_by_name(self.capture.graph, self.repeats)


def shallow(capture: Capture, borders: frozenset[str] = frozenset()) -> Shallow:
    """The capture with its long runs of blocks shortened; the capture itself where it has none. The blocks
    with the paths `borders` begin a run."""
    runs = _runs(capture.graph, borders)
    if not runs:
        return Shallow(capture, {})
    other = capture.other
    shortened = replace(
        capture,
        graph=_shorten(capture.graph, runs),
        other=_shorten(other, runs) if isinstance(other, OpGraph) else other,
    )
    return Shallow(shortened, {run[1].path: len(run) - 2 for run in runs})


def counts_by_name(graph: OpGraph, repeats: Mapping[str, int]) -> dict[str, int]:
    """For how many ops of the full model each op of a shallow graph stands."""
    counts = {op.name: 1 for op in graph.ops}
    for block in graph.blocks:
        counts.update({op.name: repeats.get(block.path, 1) for op in graph.ops[block.start : block.stop]})
    return counts


def local_counts(ops: Sequence[Op], counts: Mapping[str, int]) -> tuple[int, ...]:
    """The same for the ops of a localized graph: those that were inserted count like the one they were
    inserted for, which is the next."""
    found: list[int] = []
    current = 1
    for op in reversed(ops):
        current = counts.get(op.name, current)
        found.append(current)
    return tuple(reversed(found))


def _runs(graph: OpGraph, borders: frozenset[str]) -> list[tuple[Block, ...]]:
    """Long runs of adjacent blocks of one class that only pass values from each to the next."""
    runs: list[list[Block]] = []
    for block in graph.blocks:
        last = runs[-1][-1] if runs and block.path not in borders else None
        if last is not None and last.block_class == block.block_class and last.stop == block.start:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [tuple(run) for run in runs if len(run) >= SHORTEST_RUN and _is_chain(graph, run)]


def _is_chain(graph: OpGraph, run: Sequence[Block]) -> bool:
    """Whether each block reads only what was there before the run and what the block before it made, and what
    comes after the run reads only the last block."""
    first, last = run[0].start, run[-1]
    earliest = first
    for before, block in zip([None, *run[:-1]], run, strict=True):
        earliest = first if before is None else before.start
        for op in graph.ops[block.start : block.stop]:
            if any(first <= graph.producer.get(name, -1) < earliest for name in op.inputs):
                return False
    made = {name for op in graph.ops[first : last.start] for name in op.outputs}
    read = {name for op in graph.ops[last.stop :] for name in op.inputs}
    return not made & (read | set(graph.outputs))


def _shorten(graph: OpGraph, runs: Iterable[tuple[Block, ...]]) -> OpGraph:
    dropped: set[int] = set()
    renamed: dict[str, str] = {}
    removed_blocks: set[str] = set()
    for run in runs:
        middle, last_dropped = run[1], run[-2]
        for block in run[2:-1]:
            dropped.update(range(block.start, block.stop))
            removed_blocks.add(block.path)
        for offset in range(middle.stop - middle.start):
            gone, stays = graph.ops[last_dropped.start + offset], graph.ops[middle.start + offset]
            renamed.update(zip(gone.outputs, stays.outputs, strict=True))
    ops = tuple(_renamed(op, renamed) for index, op in enumerate(graph.ops) if index not in dropped)
    read = {name for op in ops for name in op.inputs} | {name for op in ops for name in op.saved}
    unread = {name for name, readers in graph.consumers.items() if not readers}
    kept = {name for op in ops for name in op.outputs} | read | unread | {*graph.inputs, *graph.outputs}
    tensors = {
        name: replace(tensor, storage=renamed.get(tensor.storage, tensor.storage))
        for name, tensor in graph.tensors.items()
        if name in kept
    }
    position = {op.name: index for index, op in enumerate(ops)}
    blocks = tuple(
        replace(
            block,
            start=position[graph.ops[block.start].name],
            stop=position[graph.ops[block.stop - 1].name] + 1,
        )
        for block in graph.blocks
        if block.path not in removed_blocks
    )
    return replace(
        graph,
        ops=ops,
        tensors=tensors,
        blocks=blocks,
        parameters=tuple(p for p in graph.parameters if p.tensor in tensors),
        buffers=tuple(b for b in graph.buffers if b.tensor in tensors),
    )


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    if not any(name in names for name in (*op.inputs, *op.saved)):
        return op
    args, kwargs = map_refs((op.args, dict(op.kwargs)), lambda name: Ref(names.get(name, name)))
    saved = tuple(names.get(name, name) for name in op.saved)
    return replace(op, args=args, kwargs=kwargs, saved=saved)
