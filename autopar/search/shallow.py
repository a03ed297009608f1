"""A deep model made shallow for the search: of a long run of equal blocks the first, one in the middle, and
the last; of one whose blocks take turns, as sliding and full attention do, of every kind.

Blocks of one kind share their strategies, so all that a search must know of the others is how many there
are: the middle ones stand for them. What was found is carried back to the full depth (`programs`), where it
is priced again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from graphs import Capture
from graphs.ir import Block, Op, OpGraph, Ref, map_refs
from graphs.periods import periodic

Turn = tuple[Block, ...]
"""Blocks of one or several kinds, which neighbouring turns repeat in the same order."""


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
    return Shallow(shortened, {block.path: len(run) - 2 for run in runs for block in run[1]})


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


def _runs(graph: OpGraph, borders: frozenset[str]) -> list[tuple[Turn, ...]]:
    """Long runs of turns that only pass values from each to the next."""
    stretches: list[list[Block]] = []
    for block in graph.blocks:
        last = stretches[-1][-1] if stretches and block.path not in borders else None
        if last is not None and last.stop == block.start:
            stretches[-1].append(block)
        else:
            stretches.append([block])
    return [run for stretch in stretches for run in _turns(stretch) if _is_chain(graph, run)]


def _turns(blocks: Sequence[Block]) -> Iterator[tuple[Turn, ...]]:
    """The runs among adjacent blocks."""
    kinds = [block.kind for block in blocks]

    def number_of(start: int, period: int) -> int:
        pairs = zip(kinds[start:], kinds[start + period :], strict=False)
        return (sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) + period) // period

    for start, period, number in periodic(len(blocks), number_of):
        stop = start + period * number
        yield tuple(tuple(blocks[place : place + period]) for place in range(start, stop, period))


def _is_chain(graph: OpGraph, run: Sequence[Turn]) -> bool:
    """Whether each turn reads only what was there before the run and what the turn before it made, and what
    comes after the run reads only the last turn."""
    first, last = run[0][0].start, run[-1]
    for before, turn in zip([None, *run[:-1]], run, strict=True):
        earliest = first if before is None else before[0].start
        for op in graph.ops[turn[0].start : turn[-1].stop]:
            if any(first <= graph.producer.get(name, -1) < earliest for name in op.inputs):
                return False
    made = {name for op in graph.ops[first : last[0].start] for name in op.outputs}
    read = {name for op in graph.ops[last[-1].stop :] for name in op.inputs}
    return not made & (read | set(graph.outputs))


def _shorten(graph: OpGraph, runs: Iterable[tuple[Turn, ...]]) -> OpGraph:
    dropped: set[int] = set()
    renamed: dict[str, str] = {}
    removed_blocks: set[str] = set()
    for run in runs:
        for turn in run[2:-1]:
            dropped.update(range(turn[0].start, turn[-1].stop))
            removed_blocks.update(block.path for block in turn)
        middle, last_dropped = (graph.ops[turn[0].start : turn[-1].stop] for turn in (run[1], run[-2]))
        for stays, gone in zip(middle, last_dropped, strict=True):
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
