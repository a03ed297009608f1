"""What the search over pools found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autopar.search.planner import SearchResult
from autopar.search.pool_prices import PricedRoute


@dataclass(frozen=True)
class PoolsResult:
    """What the search found: the best route, None where none fits or where `alone`, a pool and what was found
    on it, is faster. `runners_up` are the best routes with other pools, degrees or order; `pruned` counts
    candidates by why they were dropped; `tried_alone` are the pools that were searched by themselves."""

    best: PricedRoute | None
    alone: tuple[int, SearchResult] | None
    runners_up: tuple[PricedRoute, ...]
    bound_s: float
    num_candidates: int
    num_solved: int
    pruned: dict[str, int]
    tried_alone: Mapping[int, SearchResult]
    stopped: str | None = None


def best_by_mesh(solved: Iterable[PricedRoute]) -> Iterable[PricedRoute]:
    """The best of every combination of pools and degrees, in order."""
    found: dict[tuple[object, ...], PricedRoute] = {}
    for priced in sorted(solved, key=lambda each: each.rank):
        found.setdefault(tuple((leg.pool, leg.layout[1:6]) for leg in priced.route.legs), priced)
    return found.values()
