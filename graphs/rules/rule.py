"""Sharding rules by factors: which dimensions of an op may be split together.

The iteration space of an op is a set of named *factors*; every dimension of every operand and result is a
product of factors, major first. `linear(x[b, s, h], w[o, h]) -> [b, s, o]` has the factors b, s, o and h. To
split one factor over a mesh axis splits every dimension that holds it; an operand without it is replicated,
and a result without it is a partial sum. (The idea is Shardy's, https://openxla.org/shardy; here with a
backward reading, see `autopar.strategies`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

Dim = tuple[str, ...]
"""Factors of one dimension, major first. `()` is a dimension that no factor splits."""


class Place(NamedTuple):
    """A dimension that holds a factor: dimension `dim` of an operand or result by number, and its factors. It
    goes through all of the factor `major` times, in steps of `minor` elements."""

    side: Literal["operand", "result"]
    number: int
    dim: int
    names: Dim
    major: int
    minor: int

    @property
    def dimension(self) -> tuple[Literal["operand", "result"], int, int]:
        """Which it is, whatever it holds."""
        return self[:3]


@dataclass(frozen=True)
class Rule:
    """How one op may be split.

    Attributes:
        sizes: extent of every factor; where a dimension that holds it is cut into sections, the greatest
            common divisor of their sizes, so that a factor splits evenly exactly where its size divides.
        operands: per tensor operand (in the order of `Op.inputs`) the factors of each of its dimensions.
        results: the same for each result.
        reductions: factors that no result holds and whose local results sum to the whole one. A factor that
            some result lacks and that is neither in here nor in `whole` cannot be split.
        unsplittable: factors that must stay whole (the row of a softmax, the hidden dimension of a norm).
        contiguous: factors of which every rank must have one run, whatever sections others would cut.
        linear: sets of operands in which the op is jointly linear, so that partial sums of those, with
            everything else whole, give partial sums of the results.
        sections: for a dimension that is a concatenation, keyed `("operand" | "result", index, dim)`, the
            sizes of its parts. To split its (only) factor splits every part; `split`, `chunk`, `slice` and
            `cat` have these.
        implemented: factors that only a special local form can split, with the name of the form: `mean` (the
            local mean, divided by the number of shards), `vocab_parallel_embedding` (a masked lookup),
            `cross_entropy_rows` (the local sum over the global count), `vocab_parallel_cross_entropy`.
        whole: factors whose special form makes the whole result on every rank, though no result holds them.
    """

    sizes: Mapping[str, int]
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    reductions: frozenset[str] = frozenset()
    unsplittable: frozenset[str] = frozenset()
    contiguous: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    sections: Mapping[tuple[str, int, int], tuple[int, ...]] = field(default_factory=dict)
    implemented: Mapping[str, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    @cached_property
    def places(self) -> Mapping[str, tuple[Place, ...]]:
        """Where each factor stands: in operands, then in results, in their order."""
        found: dict[str, list[Place]] = {factor: [] for factor in self.sizes}
        sides: tuple[tuple[Literal["operand", "result"], tuple[tuple[Dim, ...], ...]], ...]
        sides = ("operand", self.operands), ("result", self.results)
        for side, tensors in sides:
            for number, dims in enumerate(tensors):
                for dim, names in enumerate(dims):
                    sizes = [self.sizes[name] for name in names]
                    for factor in dict.fromkeys(names):
                        at = names.index(factor)
                        major, minor = prod(sizes[:at]), prod(sizes[at + 1 :])
                        found[factor].append(Place(side, number, dim, names, major, minor))
        return {factor: tuple(places) for factor, places in found.items()}
