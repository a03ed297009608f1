"""What the units of a chain take, hold and may compute again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.pricing import OpCost, total
from autopar.search.pieces import Bucket, num_weights
from autopar.search.run_sums import RunSums
from autopar.search.runs import AllRuns, Array, GivenRuns, RankRuns
from autopar.search.units import Chain, Unit

Options = tuple[tuple[str, ...], ...]
"""For each unit the variants it may use, from the fastest to the smallest."""


class Segment(NamedTuple):
    """A step along the frontier of like units: seconds a byte, bytes freed, and which units can take it."""

    rate: float
    freed_bytes: float
    members: Array


class StageTable:
    """All stages that one chain can be cut into; `options` narrows what units may compute again."""

    def __init__(self, chain: Chain, options: Options | None = None) -> None:
        self.chain = chain
        self.options = options or tuple(unit.frontier for unit in chain.units)
        self.num_units = len(chain.units)
        self._known_sums: dict[tuple[tuple[int, ...], tuple[int, ...]], RunSums] = {}

    # --- units ----------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> tuple[str, ...]:
        """Every unit's fastest variant."""
        return tuple(names[0] for names in self.options)

    @cached_property
    def unit_forward_s(self) -> Array:
        """The forward of each unit, with the communication that nothing hides."""
        computed_s = np.array([unit.cost.forward_s for unit in self.chain.units])
        forward_s: Array = computed_s + self.unit_communication_s[0]
        return forward_s

    @cached_property
    def unit_backward_s(self) -> Array:
        """The backward of each unit, with what its fastest variant computes again."""
        pairs = zip(self.chain.units, self.base, strict=True)
        computed_s = np.array([u.cost.backward_s + u.recompute_s[name] for u, name in pairs])
        backward_s: Array = computed_s + self.unit_communication_s[1]
        return backward_s

    @cached_property
    def unit_communication_s(self) -> tuple[Array, Array]:
        """The communication in these, of forward and backward."""
        costs = [unit.cost for unit in self.chain.units]
        both = (
            [cost.forward_communication_s for cost in costs],
            [cost.backward_communication_s for cost in costs],
        )
        return self._exposed * np.array(both[0]), self._exposed * np.array(both[1])

    @cached_property
    def unit_weight_s(self) -> Array:
        """The gradients of weights in the backward of each unit, which no other stage waits for."""
        return np.array([unit.cost.weight_s for unit in self.chain.units])

    @property
    def _exposed(self) -> float:
        return self.chain.era.tensor_parallel_exposed

    @cached_property
    def unit_has_parameters(self) -> Array:
        """1 for units that are gathered and reduced by themselves."""
        return np.array([float(bool(unit.parameters)) for unit in self.chain.units])

    @cached_property
    def unit_elements(self) -> tuple[Array, Array]:
        """Elements of dense parameters and of experts, each for the first unit that has it."""
        seen: set[str] = set()
        sizes = [0.0] * self.num_units, [0.0] * self.num_units
        for index, unit in enumerate(self.chain.units):
            for name in unit.parameters:
                if name not in seen:
                    seen.add(name)
                    shard = self.chain.parameters[name]
                    sizes[shard.is_expert][index] += shard.num_elements
        return np.array(sizes[0]), np.array(sizes[1])

    @cached_property
    def block_elements(self) -> Array:
        """The same together, 0 outside of blocks."""
        dense, experts = self.unit_elements
        found: Array = (dense + experts) * [unit.is_block for unit in self.chain.units]
        return found

    @cached_property
    def root_elements(self) -> Array:
        """The same together, 0 in blocks."""
        dense, experts = self.unit_elements
        found: Array = dense + experts - self.block_elements
        return found

    @cached_property
    def parameter_kinds(self) -> tuple[list[tuple[Bucket, ...]], NDArray[np.intp]]:
        """What units may have of parameters, dense ones and experts; and which of these every unit has."""
        elements, element_bytes = self.unit_elements, self._by_kind(self._element_bytes)
        units = [*zip(*map(Array.tolist, (*elements, element_bytes)), strict=True)]
        kinds = list(dict.fromkeys(units))
        return [_buckets(*kind) for kind in kinds], np.array([kinds.index(unit) for unit in units])

    def _element_bytes(self, unit: Unit, _: str) -> float:
        """Bytes of an element of a unit's parameters."""
        shards = [self.chain.parameters[name] for name in unit.parameters]
        elements = sum(shard.num_elements for shard in shards)
        return sum(shard.num_bytes for shard in shards) / elements if elements else 0.0

    @cached_property
    def unit_weights(self) -> Array:
        """Elements of a block's weights, one matrix of every stack."""
        return self._by_kind(lambda unit, _: num_weights(unit, self.chain.parameters))

    @cached_property
    def unit_saved_bytes(self) -> Array:
        """What each unit keeps that none before it does, with its fastest variant."""
        seen: set[str] = set()
        sizes = []
        for unit, name in zip(self.chain.units, self.base, strict=True):
            saved = unit.saved[name]
            fresh = sum(size for storage, size in saved.storages.items() if storage not in seen)
            seen.update(saved.storages)
            sizes.append(float(fresh + saved.internal_bytes))
        return np.array(sizes)

    @cached_property
    def unit_working_bytes(self) -> Array:
        """What each unit holds beside what it keeps."""
        return self._by_kind(lambda unit, name: unit.saved[name].working_bytes)

    def own_bytes(self, index: int, name: str) -> float:
        """What a unit keeps under a name, but for what it does not keep otherwise and others may keep too:
        a stage counts that once."""
        unit, base = self.chain.units[index], self.base[index]
        fastest, saved = unit.saved[base].storages, unit.saved[name]
        others = (each for each in saved.storages.keys() - fastest.keys() if each in self._shared)
        return float(saved.num_bytes - sum(saved.storages[each] for each in others))

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Storages that several units may keep."""
        numbers = Counter(
            name
            for unit, names in zip(self.chain.units, self.options, strict=True)
            for name in {**unit.saved[names[0]].storages, **unit.saved[names[-1]].storages}
        )
        return frozenset(name for name, number in numbers.items() if number > 1)

    @cached_property
    def segments(self) -> list[Segment]:
        """What units can free, the cheapest first."""
        found = []
        for indices in self._kinds:
            unit, names = self.chain.units[indices[0]], self.options[indices[0]]
            members = np.zeros(self.num_units)
            members[indices] = 1
            for one, other in pairwise(names):
                freed = self.own_bytes(indices[0], one) - self.own_bytes(indices[0], other)
                if freed > 0:
                    seconds = unit.recompute_s[other] - unit.recompute_s[one]
                    found.append(Segment(seconds / freed, float(freed), members))
        return sorted(found, key=lambda segment: segment.rate)

    @cached_property
    def freed_within(self) -> tuple[Array, Array]:
        """How much each unit can keep less than its fastest variant if it works on no more than so much, the
        total after every such step: bytes worked on, and bytes freed beyond the step before, both [unit,
        step]."""
        most = max(map(len, self.options))
        working, freed = np.full((self.num_units, most), np.inf), np.zeros((self.num_units, most))
        for indices in self._kinds:
            unit, names = self.chain.units[indices[0]], self.options[indices[0]]
            base_bytes = unit.saved[names[0]].num_bytes
            steps = sorted(
                (unit.saved[name].working_bytes, base_bytes - self.own_bytes(indices[0], name))
                for name in names
            )
            totals = np.maximum.accumulate([0.0, *(total for _, total in steps)])
            working[indices, : len(steps)] = [size for size, _ in steps]
            freed[indices, : len(steps)] = np.diff(totals)
        return working, freed

    def _by_kind(self, value: Callable[[Unit, str], float]) -> Array:
        """What is the same of all units of a kind, given one of them and its fastest variant."""
        found = np.empty(self.num_units)
        for indices in self._kinds:
            first = indices[0]
            found[indices] = value(self.chain.units[first], self.base[first])
        return found

    @cached_property
    def _kinds(self) -> list[list[int]]:
        """The units that are alike, up to the names of what they keep."""
        found: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, (unit, names) in enumerate(zip(self.chain.units, self.options, strict=True)):
            found.setdefault((id(unit.recompute_s), names), []).append(index)
        return list(found.values())

    # --- all units together ---------------------------------------------------------------------------------

    @cached_property
    def microbatch_s(self) -> float:
        """A microbatch on all stages, nothing computed again that need not be."""
        return float(self.unit_forward_s.sum() + self.unit_backward_s.sum())

    @cached_property
    def unpaced_s(self) -> float:
        """The same were the host never behind."""
        pairs = ((unit.cost.total_s, unit.unpaced.total_s) for unit in self.chain.units)
        return self.microbatch_s - sum(paced_s - unpaced_s for paced_s, unpaced_s in pairs)

    @cached_property
    def computed_s(self) -> float:
        """That without communication."""
        return self.unpaced_s - float(sum(seconds.sum() for seconds in self.unit_communication_s))

    @cached_property
    def weight_s(self) -> float:
        """The gradients of weights among it."""
        return float(sum(self.unit_weight_s.tolist()))

    @cached_property
    def launches(self) -> OpCost:
        """What of all passes is left however small a part of the microbatch."""
        return total(unit.launches for unit in self.chain.units)

    @cached_property
    def all_saved_bytes(self) -> float:
        """What all units keep of a microbatch."""
        return sum(self.unit_saved_bytes)

    def least_relief_s(self, excess_bytes: float) -> float:
        """E for all units; what all that can be freed costs where that is not enough."""
        seconds = 0.0
        for rate, freed_bytes in self._freed:
            if excess_bytes <= 0:
                break
            taken = min(excess_bytes, freed_bytes)
            seconds += rate * taken
            excess_bytes -= taken
        return seconds

    @cached_property
    def _freed(self) -> list[tuple[float, float]]:
        """Seconds a byte, and bytes, of what all units together can free, the cheapest first."""
        return [(each.rate, each.freed_bytes * float(each.members.sum())) for each in self.segments]

    @property
    def held_per_byte(self) -> float:
        """What the allocator holds for a byte that comes and goes."""
        return 1 + self.chain.era.fragmentation

    # --- runs of units --------------------------------------------------------------------------------------

    @cached_property
    def all_runs(self) -> RunSums:
        """The sums of every run [i, j)."""
        return RunSums(self, AllRuns(self.num_units))

    def sums(self, cuts: tuple[int, ...], ranks: tuple[int, ...] = ()) -> RunSums:
        """The sums of the stages that begin at `cuts`, or of the `ranks` on which those are."""
        key = cuts, ranks
        if key not in self._known_sums:
            runs = RankRuns(cuts, ranks, self.num_units) if ranks else GivenRuns(cuts, self.num_units)
            self._known_sums[key] = RunSums(self, runs)
        return self._known_sums[key]


def _buckets(dense: float, experts: float, element_bytes: float) -> tuple[Bucket, ...]:
    """So many elements of dense parameters and of experts, as they move."""
    both = (dense, False), (experts, True)
    return tuple(
        Bucket(int(number), int(number * element_bytes), is_expert) for number, is_expert in both if number
    )
