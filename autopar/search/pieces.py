"""A chain cut into pipeline stages, and what each stage is whatever the data axes and the schedule do.

Most stages of a deep model are alike: they run the same kernels in the same order. Alike stages are one
`Piece` here, whose sums are made once, so that pricing a parallelism costs no more for a hundred stages than
for the three or four that differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress, pairwise, repeat
from typing import NamedTuple

from autopar.pricing import OpCost, total
from autopar.search.saved import MODES, Phase
from autopar.search.units import Chain, ParameterShard, Unit
from costmodel import StageWork

Choices = str | tuple[str, ...]
"""What the units of a stage keep: a recompute mode, or a name for every unit (`Unit.frontier`)."""
Elements = Mapping[bool, int]
"""Elements of dense parameters (False) and of experts (True)."""


class Bucket(NamedTuple):
    """Parameters that are gathered together, and whose gradients are reduced together: a unit's, the experts
    apart."""

    num_elements: int
    num_bytes: int
    is_expert: bool


class Held(NamedTuple):
    """What a stage keeps of one microbatch, what it holds at most beside that, and which unit then works."""

    saved_bytes: float
    working_bytes: float
    unit: Unit
    moment: str


class Piece:
    """A run of units that makes a stage, for one microbatch; in `works` its one evaluator keeps what it
    takes, by the data axes."""

    def __init__(self, units: Sequence[Unit], shards: Mapping[str, ParameterShard]) -> None:
        self.units = tuple(units)
        self.works: dict[tuple[object, ...], StageWork] = {}
        self.parameters = {name: shards[name] for unit in units for name in unit.parameters}
        self._held: dict[Choices, Held] = {}
        self._recompute_s: dict[Choices, float] = {}

    @cached_property
    def cost(self) -> OpCost:
        return total(unit.cost for unit in self.units)

    @cached_property
    def elements(self) -> Elements:
        return num_elements(self.parameters)

    @cached_property
    def partial_bytes(self) -> int:
        """Bytes of the parameters whose gradients are summed over `tp`."""
        return sum(shard.num_bytes for shard in self.parameters.values() if shard.is_partial)

    @cached_property
    def num_sharding_units(self) -> int:
        """Units with parameters, 1 at least."""
        return max(1, sum(bool(unit.parameters) for unit in self.units))

    @cached_property
    def buckets(self) -> Mapping[Bucket, int]:
        """How many buckets of each kind move; a parameter that several units share moves with the first."""
        found: Counter[Bucket] = Counter()
        seen: set[str] = set()
        for unit in self.units:
            fresh = [name for name in unit.parameters if name not in seen]
            seen.update(fresh)
            for experts in (False, True):
                own = [self.parameters[name] for name in fresh if self.parameters[name].is_expert is experts]
                if own:
                    sizes = sum(one.num_elements for one in own), sum(one.num_bytes for one in own)
                    found[Bucket(*sizes, experts)] += 1
        return found

    def recompute_s(self, choices: Choices) -> float:
        """What the backward runs again."""
        if choices not in self._recompute_s:
            seconds = (unit.recompute_s[choice] for unit, choice in self._chosen(choices))
            self._recompute_s[choices] = sum(seconds)
        return self._recompute_s[choices]

    def held(self, choices: Choices) -> Held:
        """What it keeps and holds."""
        if choices not in self._held:
            self._held[choices] = self._fullest(choices)
        return self._held[choices]

    def _chosen(self, choices: Choices) -> Iterator[tuple[Unit, str]]:
        names = repeat(choices, len(self.units)) if isinstance(choices, str) else choices
        return zip(self.units, names, strict=True)

    def _fullest(self, choices: Choices) -> Held:
        seen: set[str] = set()
        before = fullest = 0
        at = self.units[0]
        phase: Phase = "backward"
        for unit, choice in self._chosen(choices):
            saved = unit.saved[choice]
            if before + saved.peak_bytes > fullest:
                fullest, at, phase = before + saved.peak_bytes, unit, saved.phase
            before += sum(size for name, size in saved.storages.items() if name not in seen)
            before += saved.internal_bytes
            seen.update(saved.storages)
        name = next((module for module in at.modules if module), at.first_op)
        return Held(before, max(0, fullest - before), at, f"{phase} of {name}")


class RankParameters(NamedTuple):
    """The parameters of the stages of one rank: all of them, those of its largest block and those outside of
    blocks, and the most elements of a block's weights, one matrix of every stack."""

    elements: Elements
    block_elements: int
    root_elements: int
    weight_elements: float


class Pieces:
    """All ways to cut one chain; what is alike is the same object."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._pieces: dict[tuple[int, ...], Piece] = {}
        self._cut: dict[tuple[int, ...], tuple[Piece, ...]] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._is_block = tuple(unit.is_block for unit in chain.units)
        self._parameters: dict[tuple[int, ...], RankParameters] = {}

    def cut(self, cuts: tuple[int, ...]) -> tuple[Piece, ...]:
        """The stages; `cuts` are the numbers of the units that begin them, 0 first."""
        if cuts not in self._cut:
            bounds = pairwise((*cuts, len(self.chain.units)))
            self._cut[cuts] = tuple(self._piece(self.chain.units[a:b]) for a, b in bounds)
        return self._cut[cuts]

    def choices(self, cuts: tuple[int, ...], given: Choices) -> tuple[Choices, ...]:
        """What the units of each stage keep, if all of the chain keep what is `given`."""
        if isinstance(given, str):
            return (given,) * len(cuts)
        return tuple(given[a:b] for a, b in pairwise((*cuts, len(given))))

    def shortest(self, names: tuple[str, ...], mode: str = "none") -> Choices:
        """The mode that these names of all units come to, if there is one; without blocks any does, so the
        one that was asked for."""
        kinds = set(compress(names, self._is_block)) or {mode}
        return names if len(kinds) > 1 or kinds.isdisjoint(MODES) else kinds.pop()

    def names(self, choices: Choices) -> tuple[str, ...]:
        """The name for every unit; what is no block computes nothing again."""
        if not isinstance(choices, str):
            return choices
        if choices not in self._names:
            self._names[choices] = tuple(choices if is_block else "none" for is_block in self._is_block)
        return self._names[choices]

    def _piece(self, units: tuple[Unit, ...]) -> Piece:
        # The units stay alive in the chain, so no other kernels can take their identity.
        key = tuple(id(unit.kernels) for unit in units)
        if key not in self._pieces:
            self._pieces[key] = Piece(units, self.chain.parameters)
        return self._pieces[key]

    def parameters(self, cuts: tuple[int, ...], stages: Sequence[int]) -> RankParameters:
        """The parameters of a rank with these of the stages; what its stages share counts once."""
        pieces = self.cut(cuts)
        key = tuple(id(pieces[stage]) for stage in stages)
        if key not in self._parameters:
            ends = (*cuts, len(self.chain.units))
            units = [unit for stage in stages for unit in self.chain.units[ends[stage] : ends[stage + 1]]]
            self._parameters[key] = self._rank_parameters(units)
        return self._parameters[key]

    def _rank_parameters(self, units: Sequence[Unit]) -> RankParameters:
        shards = self.chain.parameters
        sizes = [sum(shards[name].num_elements for name in unit.parameters) for unit in units]
        return RankParameters(
            num_elements({name: shards[name] for unit in units for name in unit.parameters}),
            max((size for size, unit in zip(sizes, units, strict=True) if unit.is_block), default=0),
            sum(size for size, unit in zip(sizes, units, strict=True) if not unit.is_block),
            max(num_weights(unit, shards) for unit in units),
        )


def num_elements(shards: Mapping[str, ParameterShard]) -> Elements:
    """How many elements parameters have together."""
    counts = {False: 0}
    for shard in shards.values():
        counts[shard.is_expert] = counts.get(shard.is_expert, 0) + shard.num_elements
    return counts


def num_weights(unit: Unit, parameters: Mapping[str, ParameterShard]) -> float:
    """Elements of a block's parameters, one matrix of every stack; 0 outside of blocks."""
    if not unit.is_block:
        return 0.0
    return sum(parameters[name].num_elements / parameters[name].num_matrices for name in unit.parameters)
