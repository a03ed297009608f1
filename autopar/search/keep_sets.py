"""Which results a block keeps when the rest of it is computed again, and which of these choices are worth a
name.

A block under "selective" recomputation keeps the results of matrix products, attention and what was received.
It may keep any part of them: leaving out result r costs the seconds s_r that its ops run again, and saves the
b_r bytes that it lies in. Both add up, so of all subsets those on the lower convex hull of (seconds, bytes)
come from leaving out one result after the other, the smallest s_r / b_r first. Where a host that is slower
than its device decides how long a forward takes, its seconds give an order of their own; where now one
decides and now the other, both orders are only near the hull.

The hull is taken over these, "none", "selective" and "full"; a plan between two of its corners is a mixture
of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from autopar.pricing import OpCost
from autopar.search.needs import Needs
from autopar.search.saved import Saved

MAX_CHOICES = 12
"""The most names that a frontier has: corners that say least are left out."""

_ROUNDING = 1e-9


class Result(NamedTuple):
    """What one op leaves: `op` is its number in the unit, `internal_bytes` what its backward reads besides.

    A sum over ranks leaves a tensor of its own here, though outside of checkpoints it takes the place of its
    terms: torch keeps the results of ops, so both.
    """

    op: int
    name: str
    storages: Mapping[str, int]
    internal_bytes: int

    @property
    def num_bytes(self) -> int:
        """All that is kept."""
        return sum(self.storages.values()) + self.internal_bytes

    def renamed(self, rename: Callable[[str], str]) -> Result:
        """The same with storages under other names."""
        return self._replace(storages={rename(name): size for name, size in self.storages.items()})


def results(needs: Needs, start: int, stop: int) -> tuple[Result, ...]:
    """What ops `[start, stop)` keep under "selective", in their order."""
    ops = needs.graph.ops[start:stop]
    made = {name for op in ops for name in op.outputs if needs.homes[name] == name}
    found = []
    for index, op in enumerate(ops):
        sizes = {name: needs.tensors[name].num_bytes for name in op.outputs if needs.homes[name] in made}
        kind = needs.kinds[start + index]
        if any(sizes.values()) and not needs.runs_again(op, kind, 0, "selective"):
            # What a product's backward reads besides is made from what is kept.
            internal_bytes = 0 if kind == "matmul" else needs.need(op).internal_bytes
            found.append(Result(index, op.name, sizes, internal_bytes))
    return tuple(found)


def saved_with(kept: Iterable[Result], saved: Mapping[str, Saved]) -> Saved:
    """What a block keeps that keeps these results, given what it keeps under "none" and "full"."""
    none, storages = saved["none"], dict(saved["full"].storages)
    internal_bytes = 0
    for result in kept:
        storages |= result.storages
        internal_bytes += result.internal_bytes
    beside = sum(size for name, size in storages.items() if name not in none.storages)
    return Saved(storages, internal_bytes, none.peak_bytes + beside)


class Choice(NamedTuple):
    """One way to keep: a mode by its name, or the numbers of the results that are kept.

    `again` says which ops the backward runs again, and `extra_s` how long that takes.
    """

    kept: str | frozenset[int]
    again: tuple[bool, ...]
    extra_s: float
    num_bytes: int


def keep_sets(
    found: Sequence[Result], again: Mapping[str, tuple[bool, ...]], costs: Sequence[OpCost]
) -> Iterator[tuple[frozenset[int], tuple[bool, ...]]]:
    """The sets of results that may be corners, and what runs again under each."""
    full, selective = again["full"], again["selective"]
    for seconds in ([cost.forward_total_s for cost in costs], [cost.forward_host_s for cost in costs]):

        def ratio(number: int, seconds: Sequence[float] = seconds) -> float:
            op = found[number].op
            return seconds[op] / found[number].num_bytes if full[op] else 0.0

        order = sorted(range(len(found)), key=ratio)
        flags = [whole and twice for whole, twice in zip(full, selective, strict=True)]
        for count, number in enumerate(order[:-1], start=1):
            dropped = found[number].op
            flags[dropped] = full[dropped]
            yield frozenset(order[count:]), tuple(flags)


def frontier(choices: Iterable[Choice], most: int = MAX_CHOICES) -> list[Choice]:
    """The corners of the lower convex hull, the fastest first; of more than `most` those whose absence
    raises the hull most."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.extra_s, each.num_bytes)):
        if hull and choice.num_bytes >= hull[-1].num_bytes * (1 - _ROUNDING):
            continue
        while len(hull) > 1 and _rise(hull[-2], hull[-1], choice) <= 0:
            hull.pop()
        hull.append(choice)
    while len(hull) > most:
        del hull[min(range(1, len(hull) - 1), key=lambda i: _rise(*hull[i - 1 : i + 2]))]
    return hull


def _rise(left: Choice, corner: Choice, right: Choice) -> float:
    """Twice the area between a corner and the line past it: none, or less, where it is no corner."""
    width, height = right.extra_s - left.extra_s, left.num_bytes - right.num_bytes
    area = (left.num_bytes - corner.num_bytes) * width - height * (corner.extra_s - left.extra_s)
    return area if area > _ROUNDING * width * height else 0.0
