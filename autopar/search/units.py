"""A local graph as a chain of units: what stages are made of.

A unit is a run of ops that stays on one pipeline stage: one repeated block, or a stretch between blocks that
may not be cut further. Everything a stage costs is a sum, or a union, over its units.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, compress, groupby
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from autopar.kernels import KernelMaker, Kernels
from autopar.localize import Localized
from autopar.op_kinds import is_conversion, kind_of
from autopar.placements import RP
from autopar.plan import RecomputeMode
from autopar.pricing import OpCost, Pricer, total
from autopar.search.keep_sets import Choice, Result, frontier, keep_sets, results, saved_with
from autopar.search.needs import needs_of
from autopar.search.saved import Saved, SavedByName, saved_by_unit
from costmodel import Software
from graphs.ir import Block, Op, OpGraph

_T = TypeVar("_T")

NO_COST = OpCost()

RECOMPUTE_MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
"""The modes that the search tries for all blocks alike."""


class Unit(NamedTuple):
    """One unit, for one microbatch on one rank.

    What it may do to keep less has names: the recompute modes, and for blocks with a price `keep-1`,
    `keep-2`, ..., which compute all again but the results in `kept`. Blocks that share their kernels share
    these names and what they stand for.

    Attributes:
        first_op: name of its first op, conversions that were inserted for it apart.
        start: where it begins in the local graph, those conversions included.
        modules: the modules its ops belong to; of a block, the block alone.
        is_block: whether it is a repeated block, so whether it may be recomputed.
        kernels: what each of its ops makes a rank do.
        again: which of them the backward runs again under each name.
        saved: what it keeps under each name, and the most that it holds.
        results: what it may keep where all else is computed again.
        parameters: names of the parameter tensors that it reads.
        received_bytes: activations that enter it from earlier units, so what a cut before it sends.
        cost: of all its ops, once `Chain.priced` says so.
        unpaced: the same were the host never behind, likewise.
        launches: what of that is left however small the microbatch, or a rank's part of it, likewise.
        recompute_s: what its backward runs again under each name, likewise.
        frontier: the names that are worth a choice, from the fastest to the one that keeps least, likewise.
        kept: the ops whose results are kept under "selective" and every `keep-` name, likewise.
    """

    first_op: str
    modules: tuple[str, ...]
    is_block: bool
    saved: Mapping[str, Saved]
    parameters: tuple[str, ...]
    received_bytes: int
    start: int = 0
    kernels: tuple[Kernels, ...] = ()
    again: Mapping[str, tuple[bool, ...]] = MappingProxyType({})
    results: tuple[Result, ...] = ()
    cost: OpCost = NO_COST
    unpaced: OpCost = NO_COST
    launches: OpCost = NO_COST
    recompute_s: Mapping[str, float] = MappingProxyType({})
    frontier: tuple[str, ...] = ("none",)
    kept: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def priced(self, pricer: Pricer) -> Unit:
        """The unit with its cost, and what it may keep under that."""
        costs = [pricer.priced(kernels) for kernels in self.kernels]

        def again_s(flags: Sequence[bool]) -> float:
            return pricer.unit(list(compress(costs, flags))).forward_total_s

        recompute_s = {mode: again_s(flags) for mode, flags in self.again.items()}
        unpaced, launches = total(costs), total(map(pricer.launches, self.kernels))
        unit = self._replace(cost=unpaced.paced, unpaced=unpaced, launches=launches, recompute_s=recompute_s)
        if not self.is_block:
            return unit
        choices = [
            Choice(mode, self.again[mode], recompute_s[mode], self.saved[mode].num_bytes)
            for mode in RECOMPUTE_MODES
        ]
        least_bytes = self.saved["full"].num_bytes
        for numbers, flags in keep_sets(self.results, self.again, costs):
            num_bytes = least_bytes + sum(self.results[number].num_bytes for number in numbers)
            choices.append(Choice(numbers, flags, again_s(flags), num_bytes))
        return unit._choosing(frontier(choices))

    def _choosing(self, choices: Sequence[Choice]) -> Unit:
        """The unit with these ways to keep, by name."""
        again, recompute_s, saved = dict(self.again), dict(self.recompute_s), dict(self.saved)
        kept = {"selective": tuple(result.name for result in self.results)}
        names = []
        for choice in choices:
            name = choice.kept if isinstance(choice.kept, str) else f"keep-{len(kept)}"
            names.append(name)
            if not isinstance(choice.kept, str):
                kept[name] = tuple(self.results[number].name for number in sorted(choice.kept))
                again[name], recompute_s[name] = choice.again, choice.extra_s
                saved[name] = self._saved_with(kept[name])
        return self._replace(
            again=again, recompute_s=recompute_s, saved=saved, frontier=tuple(names), kept=kept
        )

    def part(self, share: float) -> OpCost:
        """The least that a share of its work costs: it launches as many kernels. Not paced, as where a rank
        communicates as well, it need not wait for its host."""
        return total((self.unpaced.times(share), self.launches.times(1 - share)))

    def alike(self, other: Unit) -> Unit:
        """The unit with the cost and the choices of one that shares its kernels and has them."""

        def saved(name: str) -> Saved:
            return self.saved[name] if name in self.saved else self._saved_with(other.kept[name])

        return self._replace(
            cost=other.cost,
            unpaced=other.unpaced,
            launches=other.launches,
            again=other.again,
            recompute_s=other.recompute_s,
            frontier=other.frontier,
            kept=other.kept,
            saved=SavedByName((*self.saved, *other.kept), saved),
        )

    def _saved_with(self, kept: Sequence[str]) -> Saved:
        """What it keeps with the results of these ops."""
        return saved_with([result for result in self.results if result.name in kept], self.saved)


class ParameterShard(NamedTuple):
    """The part of a parameter that one rank computes with.

    `is_partial` if its gradient is summed over `tp`; `is_expert` if it is dealt out over `ep`, so that only
    `dp / ep` ranks hold it. A stack of weights has several matrices.
    """

    num_elements: int
    num_bytes: int
    is_partial: bool
    is_expert: bool = False
    num_matrices: int = 1


@dataclass(frozen=True)
class Chain:
    """The whole local program: units in order, the parameters they share, and the software that runs it."""

    units: tuple[Unit, ...]
    parameters: Mapping[str, ParameterShard]
    era: Software

    def priced(self, pricer: Pricer) -> Chain:
        """The chain with what its units cost under a pricer."""
        known: dict[int, Unit] = {}
        units = []
        for unit in self.units:
            like = known.get(id(unit.kernels))
            if like is None:
                known[id(unit.kernels)] = unit.priced(pricer)
            units.append(known[id(unit.kernels)] if like is None else unit.alike(like))
        return replace(self, units=tuple(units))


def build_chain(
    whole: OpGraph,
    local: Localized,
    maker: KernelMaker,
    repeats: Mapping[str, int] | None = None,
    axis: str = "tp",
) -> Chain:
    """The chain of a local graph, whose blocks are those of the graph `whole` that it was made from; nothing
    has a price yet.

    `maker` makes the kernels; `repeats` has the paths of blocks that stand for several, and for how many:
    neighbours among them take turns.
    """
    graph = local.graph
    builder = _Builder(graph, maker, _Turns.of(whole, repeats or {}))
    runs = [*stretches(whole, graph)]
    crossings = _crossing_bytes(graph, [start for start, _, _ in runs])
    parameters = {}
    for parameter in graph.parameters:
        tensor = graph.tensors[parameter.tensor]
        state = local.states.get(parameter.tensor, {}).get(axis)
        parameters[parameter.tensor] = ParameterShard(
            tensor.num_elements,
            tensor.num_bytes,
            is_partial=state == RP,
            num_matrices=tensor.shape[0] if len(tensor.shape) == 3 else 1,
        )
    made = []
    for run, crossing in zip(runs, crossings, strict=True):
        unit, times = builder.unit(*run, crossing), (repeats or {}).get(run[2] or "", 1)
        made.append((builder.afterwards(unit) if times == 1 else unit, times))
    units = []
    for unit, number in in_turns(made):
        units.append(builder.copy(unit, number) if number else unit)
        if number:
            parameters |= {f"{name}#{number}": parameters[name] for name in unit.parameters}
    return Chain(tuple(units), parameters, maker.software)


def in_turns(items: Iterable[tuple[_T, int]]) -> Iterator[tuple[_T, int]]:
    """Items that stand for so many each, as often and in the order in which they run, with the number of the
    repetition: neighbours that stand for several take turns."""
    for times, group in groupby(items, key=itemgetter(1)):
        found = [item for item, _ in group]
        if times == 1:
            yield from ((item, 0) for item in found)
        else:
            yield from ((item, number) for number in range(times) for item in found)


Stretch = tuple[int, int, str | None]
"""Ops `[start, stop)` and the path of the block that they are, if they are one."""


def stretches(whole: OpGraph, graph: OpGraph) -> Iterator[Stretch]:
    """Where every unit of a local graph begins and ends: at the same ops as in the graph it was made from.

    Ops that localization inserted stand just before the op that needs them and belong to its unit, but sums
    of partial values to the unit that made those: a stage sends sums, not terms.
    """
    block_at = {block.start: block for block in whole.blocks}
    opens = {whole.ops[start].name: block_at.get(start) for start in unit_starts(whole)}
    start = end = 0
    current: Block | None = None
    for index, op in enumerate(graph.ops):
        if op.name in opens:
            begin = index
            while begin > end and not _reduces(graph.ops[begin - 1]):
                begin -= 1
            if begin > start:
                yield start, begin, None if current is None else current.path
            start, current = begin, opens[op.name]
        if not is_conversion(op):
            end = index + 1
    yield start, len(graph.ops), None if current is None else current.path


def _reduces(op: Op) -> bool:
    return op.target in ("autopar.all_reduce", "autopar.all_reduce_partial", "autopar.reduce_scatter")


def unit_starts(graph: OpGraph) -> tuple[int, ...]:
    """The ops at which a unit begins: blocks, what follows them, and between blocks wherever the module
    changes and a single activation crosses."""
    found = {0}
    inside: set[int] = set()
    for block in graph.blocks:
        found.update((block.start, block.stop))
        inside.update(range(block.start, block.stop))
    live: set[str] = set()
    for index, op in enumerate(graph.ops):
        is_border = index not in inside and index and op.module != graph.ops[index - 1].module
        if is_border and len(live) == 1 and kind_of(op, graph.tensors) != "view":
            found.add(index)
        alive = (name for name in (*op.inputs, *op.outputs) if name in graph.producer)
        for name in alive:
            tensor, readers = graph.tensors[name], graph.consumers[name]
            if tensor.requires_grad and readers and readers[-1] > index:
                live.add(name)
            else:
                live.discard(name)
    found.discard(len(graph.ops))
    return tuple(sorted(found))


def _crossing_bytes(graph: OpGraph, starts: Sequence[int]) -> list[int]:
    """Bytes of the values with a gradient that are alive at each of the boundaries `starts`."""
    change = [0] * (len(starts) + 1)
    for name, index in graph.producer.items():
        readers = graph.consumers[name]
        if graph.tensors[name].requires_grad and readers:
            change[bisect_right(starts, index)] += graph.tensors[name].num_bytes
            change[bisect_right(starts, readers[-1])] -= graph.tensors[name].num_bytes
    return list(accumulate(change[:-1]))


@dataclass(frozen=True)
class _Turns:
    """What blocks that stand for several hand on: `following` maps what the turn before them makes to what
    they make in its place, `last` what they make to the number of their last copy."""

    following: Mapping[str, str]
    last: Mapping[str, int]

    @classmethod
    def of(cls, whole: OpGraph, repeats: Mapping[str, int]) -> _Turns:
        following: dict[str, str] = {}
        last: dict[str, int] = {}
        numbers = [repeats.get(block.path, 1) for block in whole.blocks]
        for number, group in groupby(range(len(numbers)), key=numbers.__getitem__):
            turn = [*group] if number > 1 else []
            for index in turn:
                made, before = (_made(whole, whole.blocks[each]) for each in (index, index - len(turn)))
                following |= zip(before, made, strict=True)
                last |= dict.fromkeys(made, number - 1)
        return cls(following, last)

    def entering(self, storage: str, number: int) -> str | None:
        """What the copy before a copy made, under the name of what enters the first; None for all else."""
        name, mark, version = storage.partition("__")
        made = self.following.get(name)
        return None if made is None else _numbered(f"{made}{mark}{version}", number - 1)

    def afterwards(self, storage: str) -> str:
        """A storage that is kept after the last copy, which may have made it."""
        return _numbered(storage, self.last.get(storage.partition("__")[0], 0))


def _made(graph: OpGraph, block: Block) -> list[str]:
    return [name for op in graph.ops[block.start : block.stop] for name in op.outputs]


def _numbered(name: str, number: int) -> str:
    return f"{name}#{number}" if number else name


def _renamed(unit: Unit, rename: Callable[[str], str], parameters: tuple[str, ...]) -> Unit:
    """The unit with what it keeps under other names."""
    saved = SavedByName(unit.saved, lambda mode: unit.saved[mode].renamed(rename))
    results = tuple([result.renamed(rename) for result in unit.results])
    return unit._replace(saved=saved, results=results, parameters=parameters)


class _Builder:
    """Makes units of a local graph."""

    def __init__(self, graph: OpGraph, maker: KernelMaker, turns: _Turns) -> None:
        self.graph = graph
        self.turns = turns
        self.kernels = maker.graph(graph)
        self.needs = needs_of(graph, maker)
        self.made_in_blocks: set[str] = set()

    def unit(self, start: int, stop: int, block: str | None, received_bytes: int) -> Unit:
        ops = self.graph.ops[start:stop]
        if block is not None:
            self.made_in_blocks.update(name for op in ops for name in op.outputs)
        again, saved = saved_by_unit(self.needs, start, stop, is_block=block is not None)
        return Unit(
            first_op=next((op.name for op in ops if not is_conversion(op)), ops[0].name),
            modules=(block,) if block is not None else tuple(dict.fromkeys(op.module for op in ops)),
            is_block=block is not None,
            kernels=self.kernels[start:stop],
            again=again,
            saved=saved,
            results=results(self.needs, start, stop) if block is not None else (),
            parameters=tuple(
                dict.fromkeys(
                    name for op in ops for name in op.inputs if name in self.graph.parameter_tensors
                )
            ),
            received_bytes=received_bytes,
            start=start,
        )

    def copy(self, unit: Unit, number: int) -> Unit:
        """The same block once more: what blocks make and own is its own, what the one before it made is
        that's, and what all share is shared."""
        made, turns = self.made_in_blocks, self.turns

        def own(storage: str) -> str:
            return turns.entering(storage, number) or _numbered(storage, number if storage in made else 0)

        return _renamed(unit, own, tuple([f"{name}#{number}" for name in unit.parameters]))

    def afterwards(self, unit: Unit) -> Unit:
        """A unit that stands for itself, of which what copies made before it are the last."""
        return _renamed(unit, self.turns.afterwards, unit.parameters) if self.turns.last else unit
