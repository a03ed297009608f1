"""What a search has found so far, and which of two candidates is the better."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.programs import Program


@dataclass(frozen=True)
class Solved:
    """A candidate with its program and its cost; with other cuts, or other things computed again, it takes no
    less than `bound_s`."""

    evaluated: Evaluated
    program: Program
    bound_s: float

    @property
    def parallelism(self) -> Parallelism:
        return self.evaluated.parallelism


class Outcome:
    """The best so far, the best of every other mesh, and the floor under what was solved.

    `pruned` counts candidates by why they were dropped.
    """

    def __init__(self) -> None:
        self.best: Solved | None = None
        self.floor_s = float("inf")
        self.num_priced = 0
        self.pruned = {"memory floor": 0, "time floor": 0, "out of memory": 0}
        self._by_mesh: dict[tuple[int, ...], Solved] = {}

    @property
    def best_s(self) -> float:
        return float("inf") if self.best is None else self.best.evaluated.step_s

    def gap(self, floor_s: float) -> float:
        """How much of the best is not proven necessary when all that is left takes `floor_s` or more."""
        if self.best is None:
            return 1.0
        return max(0.0, 1 - min(floor_s, self.floor_s) / self.best_s)

    def add(self, solved: Solved) -> bool:
        """Note a candidate that was priced; whether it is the best so far."""
        if not solved.evaluated.fits:
            self.pruned["out of memory"] += 1
            return False
        self.num_priced += 1
        self.floor_s = min(self.floor_s, solved.bound_s)
        p = solved.parallelism
        mesh = (p.pp, p.tp, p.cp, p.ep, p.dp_shard, p.dp_replicate)
        self._by_mesh[mesh] = better(self._by_mesh.get(mesh), solved)
        before = self.best
        self.best = better(before, solved)
        return self.best is not before

    def leave(self, floor_s: float) -> None:
        """Note that something was given up on which takes no less than this: it may yet fit."""
        self.floor_s = min(self.floor_s, floor_s)

    def runners_up(self, number: int) -> tuple[Solved, ...]:
        """The best of other meshes, in order."""
        rest = (solved for solved in self._by_mesh.values() if solved is not self.best)
        return tuple(sorted(rest, key=rank)[:number])


def rank(solved: Solved) -> tuple[object, ...]:
    """The order of candidates: those that fit by time, then those that do not by excess; simpler ones break
    ties."""
    e = solved.evaluated
    p = e.parallelism
    simplicity = (
        p.pp,
        p.tp,
        p.cp,
        p.zero_stage,
        p.num_virtual_stages,
        p.recompute != "none",
        -p.microbatch_size,
        str(p),
    )
    return (not e.fits, e.step_s if e.fits else e.excess_bytes, *simplicity)


def better(old: Solved | None, new: Solved) -> Solved:
    """The better of two."""
    return new if old is None or rank(new) < rank(old) else old
