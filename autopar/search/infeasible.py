"""Why nothing fits: which limit binds, by how much, and the smallest change that was seen to help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from autopar.errors import InfeasibleError, PinConflictError
from autopar.plan import Parallelism
from autopar.search.outcome import Solved, better
from autopar.search.pins import Pins
from autopar.search.planner import Planner, SearchResult
from autopar.search.space import ways
from autopar.search.wording import GB, MB, size
from hardware_db import Cluster

NUM_PROBES = 8
"""Candidates with the smallest memory floors that are priced when nothing fits."""

MOST_TRIED = 48
"""Layouts that are tried when a change is to make something fit."""

FACTORS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""By how much larger clusters are tried."""


def infeasible(
    planner: Planner, result: SearchResult, *, before: str = "", after: str = ""
) -> InfeasibleError:
    """The error to raise, after trying what would help; `before` and `after` are what else to say."""
    nearest = smallest(planner)
    evaluated = nearest.evaluated
    fullest = max(evaluated.ledgers, key=lambda ledger: ledger.total_bytes)
    entries = sorted(fullest.entries.items(), key=lambda entry: -entry[1])
    limit, limit_bytes = entries[0]
    helps = tuple(relaxations(planner, nearest))
    device = planner.cluster.device
    peak, excess = evaluated.peak_memory_bytes, evaluated.excess_bytes
    message = (
        f"{planner.capture.graph.name} does not fit {planner.cluster.name} "
        f"with a global batch of {planner.global_batch}. "
        f"The nearest of {result.num_candidates} candidates, {evaluated.parallelism}, "
        f"needs {size(peak)} on its fullest device, {size(excess)} more than the "
        f"{size(device.memory_bytes)} of {device.name}. The largest part is {limit}, {size(limit_bytes)}. "
        f"What helps: {'; '.join(helps)}."
    )
    told = " ".join(filter(None, (before, message, after)))
    return InfeasibleError(told, limit=limit, excess_bytes=excess, relaxations=helps)


def smallest(planner: Planner) -> Solved:
    """Of the ways with the smallest memory floors, the one that exceeds memory the least."""
    best: Solved | None = None
    for p in by_memory(planner, NUM_PROBES):
        best = better(best, planner.solve(p))
    assert best is not None
    return best


def by_memory(planner: Planner, number: int) -> list[Parallelism]:
    """One way of each of the `number` layouts with the smallest memory floors, the smallest first."""
    found = []
    for layout in planner.layouts:
        offered = ways(layout, planner.cluster, planner.degrees, planner.pins)
        floors = (
            (planner.bounds.memory_bytes(_all_again(p)), p.num_virtual_stages, str(p), p) for p in offered
        )
        lightest = min(floors, key=lambda each: each[:3], default=None)
        if lightest is not None:
            found.append((lightest[0], layout.microbatch_size, lightest[2], lightest[3]))
    return [each[3] for each in sorted(found, key=lambda each: each[:3])[:number]]


def _all_again(p: Parallelism) -> Parallelism:
    return p if p.recompute != "none" else p.model_copy(update={"recompute": "mixed"})


def any_fitting(planner: Planner) -> Solved | None:
    """Some way that fits, looked for where memory floors are lowest; None when none of a few does."""
    capacity = planner.cluster.device.memory_bytes
    for p in by_memory(planner, MOST_TRIED):
        if planner.bounds.memory_bytes(_all_again(p)) <= capacity:
            solved = planner.solve(p)
            if solved.evaluated.fits:
                return solved
    return None


def relaxations(planner: Planner, nearest: Solved) -> Iterator[str]:
    """Changes that were tried and make something fit, the cheapest to make first."""
    yield from _unpinned(planner)
    if not planner.pins:
        yield from _more_devices(planner)
    needed = nearest.evaluated.peak_memory_bytes
    yield f"devices with {_round_up(needed)} would do as they are"


def _round_up(num_bytes: float) -> str:
    """Bytes for people, never less than they are."""
    return f"{ceil(num_bytes / GB)} GB" if num_bytes >= GB else f"{ceil(num_bytes / MB)} MB"


def _unpinned(planner: Planner) -> Iterator[str]:
    """Pins without which something fits; all of them, where none of them helps alone."""
    parts = dict(planner.pins.parts())
    found = {text: any_fitting(planner.under(freed)) for text, freed in parts.items()}
    if len(parts) > 1 and not any(found.values()):
        found = {"any pin": any_fitting(planner.under(Pins()))}
    for text, solved in found.items():
        if solved is not None:
            yield f"without {text}, {solved.parallelism} fits"


def _more_devices(planner: Planner) -> Iterator[str]:
    """The smallest of the larger clusters that fits, if any."""
    for factor in FACTORS:
        larger = grown(planner.cluster, factor)
        for batch in (planner.global_batch, planner.global_batch * factor):
            try:
                solved = any_fitting(_again(planner, larger, batch))
            except PinConflictError:
                continue
            if solved is not None:
                also = "" if batch == planner.global_batch else f" with a global batch of {batch}"
                yield f"{larger.num_devices} devices fit{also} ({solved.parallelism})"
                return


def _again(planner: Planner, cluster: Cluster, global_batch: int) -> Planner:
    """A planner for another cluster or batch."""
    era = planner.evaluator.era
    return Planner(
        planner.capture, cluster, planner.policy, era, global_batch=global_batch, pins=planner.pins,
        whole_space=planner.whole_space, low_precision=planner.programs.low_precision,
    )  # fmt: skip


def grown(cluster: Cluster, factor: int) -> Cluster:
    """The same cluster with `factor` times the devices on its outermost level."""
    *inner, outer = cluster.levels
    levels = (*inner, replace(outer, num_devices=factor * outer.num_devices))
    return replace(cluster, num_devices=factor * cluster.num_devices, levels=levels)
