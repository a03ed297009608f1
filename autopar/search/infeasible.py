"""Why nothing fits: which limit binds, by how much, and the smallest change that was seen to help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autopar.errors import InfeasibleError
from autopar.plan import Parallelism
from autopar.search.describe import GB, ledger_entries
from autopar.search.planner import Planner, SearchResult, Solved, better
from autopar.search.space import Pins
from hardware_db import Cluster

NUM_PROBES = 8
"""Candidates with the smallest memory floors that are priced when nothing fits."""

MOST_DOUBLINGS = 6


def infeasible(planner: Planner, result: SearchResult, global_batch: int, pins: Pins) -> InfeasibleError:
    """The error to raise, after trying what would help."""
    nearest = smallest(planner, global_batch, pins)
    evaluated = nearest.evaluated
    fullest = max(evaluated.ledgers, key=lambda ledger: ledger.total_bytes)
    entries = sorted(ledger_entries(fullest).items(), key=lambda entry: -entry[1])
    limit, limit_bytes = entries[0]
    helps = tuple(relaxations(planner, nearest, global_batch, pins))
    device = planner.cluster.device
    message = (
        f"{planner.capture.graph.name} does not fit {planner.cluster.name} with a global batch of {global_batch}: the "
        f"nearest of {result.num_candidates} candidates, {evaluated.parallelism}, needs "
        f"{evaluated.peak_memory_bytes / GB:.1f} GB on its fullest device, {evaluated.excess_bytes / GB:.1f} GB more than "
        f"the {device.memory_bytes / GB:.0f} GB of {device.name}. The largest part is {limit}, "
        f"{limit_bytes / GB:.1f} GB. " + ("What helps: " + "; ".join(helps) + "." if helps else "")
    )
    return InfeasibleError(message, limit=limit, excess_bytes=evaluated.excess_bytes, relaxations=helps)


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
    yield f"devices with {needed / GB:.0f} GB would fit as they are"


def _unpinned(planner: Planner, global_batch: int, pins: Pins) -> Iterator[str]:
    """Pins without which something fits."""
    for name, value in vars(pins).items():
        if value is None:
            continue
        solved = smallest(planner, global_batch, replace(pins, **{name: None}))
        if solved.evaluated.fits:
            yield f"without {name}={value}, {solved.parallelism} fits"


def _more_devices(planner: Planner, global_batch: int, pins: Pins) -> Iterator[str]:
    """The first doubling of the cluster that fits, if any."""
    for doubling in range(1, MOST_DOUBLINGS + 1):
        larger = grown(planner.cluster, 2**doubling)
        other = Planner(planner.capture, larger, planner.policy)
        for batch in (global_batch, global_batch * 2**doubling):
            if not _has_candidates(other, batch, pins):
                continue
            solved = smallest(other, batch, pins)
            if solved.evaluated.fits:
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


_ = Parallelism
