"""Searches one after the other, over what no degree says: the shape of a slice, and whether the host helps.

A torus whose links are switched can be had in several shapes (`hardware_db.slice_shapes`). Each is a cluster
with a search of its own; those after the first begin with the best plan so far, so that whatever cannot beat
that is dropped by its bound. The least of their bounds is that of all.

Optimizer states are offloaded to the host only when nothing fits without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autopar.errors import InfeasibleError, PinConflictError
from autopar.plan import Plan
from autopar.search.alternatives import alternatives, memory_excess
from autopar.search.describe import build_plan, certificate, host_memory_bytes
from autopar.search.infeasible import infeasible, smallest
from autopar.search.outcome import Solved, rank
from autopar.search.planner import Planner, SearchResult
from autopar.search.wording import size
from costmodel import CostModelError, check_host
from hardware_db import Cluster

PlannerOf = Callable[[Cluster, bool], Planner]
"""Makes the planner of a cluster; where true, its search runs on the shallow model."""

RELATIVE_ERROR = 1e-3
"""By how much the shallow model of the search may differ from the full one before the search runs at full
depth."""


@dataclass(frozen=True)
class Found:
    """The planner with the best plan, and its result with the bound and the counts of all searches.

    `remark` is what the user should know of it: that states are offloaded, or, where nothing fits, why
    offloading them does not help.
    """

    planner: Planner
    result: SearchResult
    remark: str = ""

    def error(self) -> InfeasibleError:
        """Why nothing fits."""
        return infeasible(self.planner, self.result, after=self.remark)


@dataclass(frozen=True)
class Settled:
    """The best plan of all searches, priced at full depth, with its planner and what they found together."""

    planner: Planner
    best: Solved
    result: SearchResult
    remark: str

    def plan(self, solve_s: float) -> Plan:
        """The plan that was found in so many seconds."""
        return build_plan(
            self.planner,
            self.best,
            certificate(self.result, self.best.evaluated.step_s, self.planner.effort, solve_s),
            alternatives(self.planner, self.result, self.best.evaluated),
            warnings=(self.remark,) if self.remark else (),
        )


def settled(planner_of: PlannerOf, shapes: Sequence[Cluster]) -> Settled:
    """The best plan for shapes of one cluster: by a search of the shallow model, or of the full one where
    that did not tell the truth. Raises InfeasibleError where nothing fits, and as `Planner.search`."""
    for shorten in (True, False):
        found = search([planner_of(shape, shorten) for shape in shapes])
        if found.result.best is None:
            raise found.error()
        best = found.planner.finish(found.result.best)
        if best.evaluated.fits and agree(best.evaluated.step_s, found.result.best.evaluated.step_s):
            break
    return Settled(found.planner, best, found.result, found.remark)


def agree(full_s: float, short_s: float) -> bool:
    """Whether the shallow model told the truth about a step of the full one."""
    return abs(full_s - short_s) <= RELATIVE_ERROR * full_s


def search(planners: Sequence[Planner]) -> Found:
    """The best plan of planners that differ in the shape of their cluster, the likeliest shape first; with
    offloaded states where nothing else fits and the pins leave that open. Raises as `Planner.search`."""
    kept = _best(planners)
    pins = planners[0].pins
    if kept.result.best is not None or pins.offload or "optimizer" in pins.forbid.get("offload", ()):
        return kept
    try:
        host = check_host(planners[0].cluster)
    except CostModelError as error:
        return replace(kept, remark=f"Nor can the host help: {error}.")
    found = _best([planner.under(replace(pins, offload="optimizer")) for planner in planners])
    if found.result.best is None:
        nearest = smallest(found.planner).evaluated
        return replace(kept, remark=f"With offloading, {nearest.parallelism} is {memory_excess(nearest)}.")
    held_bytes = host_memory_bytes(found.result.best.evaluated, found.planner.cluster)
    return replace(
        found,
        remark="nothing fits with the optimizer's states on the devices, so they are offloaded: they take "
        f"{size(held_bytes)} of the {size(host.memory_bytes)} that a device has of its host's memory",
    )


def _best(planners: Sequence[Planner]) -> Found:
    """The best of the planners. Raises PinConflictError where the pins leave no candidate in any shape."""
    found: list[Found] = []
    conflicts = []
    incumbent: Solved | None = None
    for planner in planners:
        try:
            result = planner.search(incumbent)
        except PinConflictError as error:
            conflicts.append(error)
            continue
        found.append(Found(planner, result))
        incumbent = result.unplaced or incumbent
    if not found:
        raise conflicts[0]
    winner = min(found, key=_rank)
    return replace(winner, result=_together(winner.result, [each.result for each in found]))


def _rank(found: Found) -> tuple[object, ...]:
    best = found.result.best
    return (True,) if best is None else (False, *rank(best))


def _together(winner: SearchResult, results: Sequence[SearchResult]) -> SearchResult:
    """What the winner found, with the bound of all searches and what they counted."""
    pruned: Counter[str] = Counter()
    for result in results:
        pruned.update(result.pruned)
    return replace(
        winner,
        bound_s=min(result.bound_s for result in results),
        num_candidates=sum(result.num_candidates for result in results),
        num_solved=sum(result.num_solved for result in results),
        pruned=dict(pruned),
        stopped=next((result.stopped for result in results if result.stopped), None),
    )
