"""Why nothing fits: which limit binds, by how much, and the smallest change that was seen to help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from autopar.errors import InfeasibleError
from autopar.search.describe import GB, MB, size
from autopar.search.outcome import Solved, better
from autopar.search.planner import Planner, SearchResult
from autopar.search.space import Pins
from hardware_db import Cluster

NUM_PROBES = 8
"""Candidates with the smallest memory floors that are priced when nothing fits."""

FACTORS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""By how much larger clusters are tried."""


def infeasible(planner: Planner, result: SearchResult, global_batch: int, pins: Pins) -> InfeasibleError:
    """The error to raise, after trying what would help."""
    nearest = smallest(planner, global_batch, pins)
    evaluated = nearest.evaluated
    fullest = max(evaluated.ledgers, key=lambda ledger: ledger.total_bytes)
    entries = sorted(fullest.entries.items(), key=lambda entry: -entry[1])
    limit, limit_bytes = entries[0]
    helps = tuple(relaxations(planner, nearest, global_batch, pins))
    device = planner.cluster.device
    peak, excess = evaluated.peak_memory_bytes, evaluated.excess_bytes
    message = (
        f"{planner.capture.graph.name} does not fit {planner.cluster.name} "
        f"with a global batch of {global_batch}. "
        f"The nearest of {result.num_candidates} candidates, {evaluated.parallelism}, "
        f"needs {size(peak)} on its fullest device, {size(excess)} more than the "
        f"{size(device.memory_bytes)} of {device.name}. The largest part is {limit}, {size(limit_bytes)}. "
        f"What helps: {'; '.join(helps)}."
    )
    return InfeasibleError(message, limit=limit, excess_bytes=excess, relaxations=helps)


def smallest(planner: Planner, global_batch: int, pins: Pins) -> Solved:
    """Of the candidates with the smallest memory floors, the one that exceeds memory the least."""
    found = planner.candidates(global_batch, pins)
    order = sorted(
        found, key=lambda p: (planner.bounds.memory_bytes(p), p.num_virtual_stages, p.microbatch_size)
    )
    best: Solved | None = None
    for p in order[:NUM_PROBES]:
        best = better(best, planner.solve(p))
    assert best is not None
    return best


def relaxations(planner: Planner, nearest: Solved, global_batch: int, pins: Pins) -> Iterator[str]:
    """Changes that were tried and make something fit, the cheapest to make first."""
    yield from _unpinned(planner, global_batch, pins)
    if not any(value is not None for value in vars(pins).values()):
        yield from _more_devices(planner, global_batch, pins)
    needed = nearest.evaluated.peak_memory_bytes
    yield f"devices with {_round_up(needed)} would do as they are"


def _round_up(num_bytes: float) -> str:
    """Bytes for people, never less than they are."""
    return f"{ceil(num_bytes / GB)} GB" if num_bytes >= GB else f"{ceil(num_bytes / MB)} MB"


def _unpinned(planner: Planner, global_batch: int, pins: Pins) -> Iterator[str]:
    """Pins without which something fits."""
    for name, value in vars(pins).items():
        if value is None:
            continue
        solved = planner.any_fitting(global_batch, replace(pins, **{name: None}))
        if solved is not None:
            yield f"without {name}={value}, {solved.parallelism} fits"


def _more_devices(planner: Planner, global_batch: int, pins: Pins) -> Iterator[str]:
    """The smallest of the larger clusters that fits, if any."""
    for factor in FACTORS:
        larger = grown(planner.cluster, factor)
        other = Planner(planner.capture, larger, planner.policy)
        for batch in (global_batch, global_batch * factor):
            solved = other.any_fitting(batch, pins) if _has_candidates(other, batch, pins) else None
            if solved is not None:
                also = "" if batch == global_batch else f" with a global batch of {batch}"
                yield f"{larger.num_devices} devices fit{also} ({solved.parallelism})"
                return


def _has_candidates(planner: Planner, global_batch: int, pins: Pins) -> bool:
    try:
        return bool(planner.candidates(global_batch, pins))
    except ValueError:
        return False


def grown(cluster: Cluster, factor: int) -> Cluster:
    """The same cluster with `factor` times the devices on its outermost level."""
    *inner, outer = cluster.levels
    levels = (*inner, replace(outer, num_devices=factor * outer.num_devices))
    return replace(cluster, num_devices=factor * cluster.num_devices, levels=levels)
