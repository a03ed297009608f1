"""Small changes to stages that may make a plan faster: what bounds and fractions did not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from autopar.search.evaluate import Evaluated
from autopar.search.stage_table import StageTable
from autopar.search.stages import Where
from autopar.search.variants import RankUnits, Variants

NUM_TAKERS = 3
"""To so many of the stages with the smallest loads the one with the largest tries to hand a unit."""

MOST_FAILURES = 16
"""Faster variants that do not help, until the search for them ends."""


def handed_on(
    cuts: tuple[int, ...], num_units: int, giver: int, where: Where, takers: Iterable[int]
) -> Iterator[tuple[int, ...]]:
    """The cuts by which one stage has a unit less and one of the takers a unit more; those between hand one
    on. At `where` stages may be."""
    for taker in takers:
        if not 0 <= taker < len(cuts) or taker == giver:
            continue
        first, last, step = (giver, taker, -1) if taker > giver else (taker, giver, 1)
        moved = tuple(cut + step * (first < stage <= last) for stage, cut in enumerate(cuts))
        runs = list(pairwise((*moved, num_units)))
        if all(a < b and (where is None or where[a, b]) for a, b in runs):
            yield moved


def takers(giver: int, loads: Sequence[float]) -> list[int]:
    """The neighbours of a stage, and those with the smallest loads."""
    least = sorted(range(len(loads)), key=loads.__getitem__)[:NUM_TAKERS]
    return [*dict.fromkeys([giver - 1, giver + 1, *least])]


def with_faster_units(
    plan: Evaluated,
    table: StageTable,
    variants: Variants,
    ranks: Sequence[RankUnits],
    fit: Callable[[Sequence[str]], bool],
    price: Callable[[Sequence[str]], Evaluated],
) -> Evaluated:
    """The plan with faster variants where memory is left for them, those first that gain most; `ranks` are
    the units of each, and of others `fit` tells whether memory suffices, and `price` the price."""
    failed: set[tuple[object, ...]] = set()
    for rank, unit, name in _faster(plan, table, ranks):
        now = plan.choices[unit]
        kind = rank, ranks[rank].flights[unit], variants.kinds[unit], now, name
        is_faster = table.options[unit].index(name) < table.options[unit].index(now)
        if not is_faster or kind in failed:
            continue
        choices = (*plan.choices[:unit], name, *plan.choices[unit + 1 :])
        again = price(choices) if fit(choices) else None
        if again is not None and again.step_s <= plan.step_s:
            plan = again
            continue
        failed.add(kind)
        if len(failed) == MOST_FAILURES:
            break
    return plan


def _faster(plan: Evaluated, table: StageTable, ranks: Sequence[RankUnits]) -> list[tuple[int, int, str]]:
    """Rank, unit and variant, by what the unit then takes less."""
    found: list[tuple[float, int, int, str]] = []
    for rank, units in enumerate(ranks):
        for unit in units.flights:
            again_s, names = table.chain.units[unit].recompute_s, table.options[unit]
            now = plan.choices[unit]
            found += [(again_s[name] - again_s[now], rank, unit, name) for name in names[: names.index(now)]]
    return [(rank, unit, name) for _, rank, unit, name in sorted(found)]
