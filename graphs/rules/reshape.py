"""Reshape: both shapes as products of the same factors.

`[b, s, h * d] -> [b, s, h, d]` has the factors b, s, h and d, so a split of the heads survives it. Both
shapes are read from the left: the extents that are left over of the current dimensions have a common divisor,
which is the next factor. Where neither divides the other (`[6, 4] -> [4, 6]`: 2 is common, then 3 against 2)
the rest of the two groups of dimensions that correspond stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

from graphs.ir import Op, Tensor
from graphs.rules.build import make_rule
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule


@register("aten.reshape", "aten.flatten")
def reshape(op: Op, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Rule | None:
    """The common factors of both shapes."""
    source, target = operands[0], results[0]
    if 0 in source.shape:
        return None
    common = common_factors(source.shape, target.shape)
    return make_rule(
        operands,
        results,
        [common.source],
        [common.target],
        sizes=common.sizes,
        unsplittable=common.mismatched,
        linear=((0,),),
    )


@dataclass
class CommonFactors:
    """Two shapes of equally many elements in the same factors, and those that stand on one side only."""

    source: list[Dim] = field(default_factory=list)
    target: list[Dim] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    mismatched: set[str] = field(default_factory=set)

    def add(self, size: int, *, mismatched: bool = False) -> str:
        """A new factor."""
        name = f"d{len(self.sizes)}"
        self.sizes[name] = size
        if mismatched:
            self.mismatched.add(name)
        return name


def common_factors(source: Sequence[int], target: Sequence[int]) -> CommonFactors:
    """Both shapes, which have equally many elements and none of size 0, as products of common factors."""
    found = CommonFactors()
    left, right = _Reader(source), _Reader(target)
    while left.more() and right.more():
        common = gcd(left.rest, right.rest)
        if common > 1:
            name = found.add(common)
            left.take(name, common)
            right.take(name, common)
        else:
            _skip_mismatch(found, left, right)
    found.source, found.target = left.finish(), right.finish()
    return found


class _Reader:
    """Reads a shape from the left, in factors of its dimensions."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape
        self.dims: list[list[str]] = [[]]
        self.rest = shape[0] if shape else 1
        self.taken = 1

    def more(self) -> bool:
        """Moves on to the next dimension that has something left; False at the end."""
        while self.rest == 1 and len(self.dims) < len(self.shape):
            self.dims.append([])
            self.rest = self.shape[len(self.dims) - 1]
        return self.rest > 1

    def take(self, name: str, size: int) -> None:
        self.dims[-1].append(name)
        self.rest //= size
        self.taken *= size

    def finish(self) -> list[Dim]:
        missing = len(self.shape) - len(self.dims)
        dims = [*(tuple(names) for names in self.dims), *([()] * missing)]
        return dims[: len(self.shape)]


def _skip_mismatch(found: CommonFactors, left: _Reader, right: _Reader) -> None:
    """Read on until both sides have read equally many elements, which no common factor splits."""
    for reader in (left, right):
        reader.take(found.add(reader.rest, mismatched=True), reader.rest)
    while left.taken != right.taken:
        behind = left if left.taken < right.taken else right
        assert behind.more(), "shapes of a reshape have equally many elements"
        behind.take(found.add(behind.rest, mismatched=True), behind.rest)
