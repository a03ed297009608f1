"""What a search has found so far, and which of two candidates is the better."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.local_programs import Program

PRICED = "priced"


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

    `decided` has the candidates that were looked at to the end, and what became of them: they have a price,
    or a reason why not.
    """

    def __init__(self) -> None:
        self.best: Solved | None = None
        self.floor_s = float("inf")
        self.decided: dict[Parallelism, str] = {}
        self._pruned = {"memory floor": 0, "time floor": 0, "out of memory": 0}
        self._by_mesh: dict[tuple[int, ...], Solved] = {}

    @property
    def num_priced(self) -> int:
        """The candidates that have a price."""
        return sum(what == PRICED for what in self.decided.values())

    @property
    def num_decided(self) -> int:
        """The candidates that nothing more is to be found out about."""
        return len(self.decided) + sum(self._pruned.values())

    @property
    def pruned(self) -> dict[str, int]:
        """How many candidates were dropped, by why."""
        found = dict(self._pruned)
        for what in self.decided.values():
            if what != PRICED:
                found[what] = found.get(what, 0) + 1
        return found

    def prune(self, reason: str, number: int) -> None:
        """Note that so many candidates were dropped together."""
        self._pruned[reason] = self._pruned.get(reason, 0) + number

    def decide(self, p: Parallelism, what: str) -> None:
        """Note what became of a candidate; a price stays."""
        if self.decided.get(p) != PRICED:
            self.decided[p] = what

    @property
    def best_s(self) -> float:
        return float("inf") if self.best is None else self.best.evaluated.step_s

    def gap(self, floor_s: float) -> float:
        """How much of the best is not proven necessary when all that is left takes `floor_s` or more."""
        if self.best is None:
            return 1.0
        return max(0.0, 1 - min(floor_s, self.floor_s) / self.best_s)

    def add(self, candidate: Parallelism, solved: Solved) -> None:
        """Note what a candidate comes to with one of its programs, which then is done with."""
        self.decide(candidate, PRICED if solved.evaluated.fits else "out of memory")
        if solved.evaluated.fits:
            self.floor_s = min(self.floor_s, solved.bound_s)
        self.offer(candidate, solved)

    def offer(self, candidate: Parallelism, solved: Solved) -> None:
        """Note a price of a candidate that is not done with yet."""
        if not solved.evaluated.fits:
            return
        self.decide(candidate, PRICED)
        p = solved.parallelism
        mesh = (p.pp, p.tp, p.cp, p.ep, p.dp_shard, p.dp_replicate)
        self._by_mesh[mesh] = better(self._by_mesh.get(mesh), solved)
        self.best = better(self.best, solved)

    def leave(self, floor_s: float) -> None:
        """Note that something was given up on which takes no less than this: it may yet fit."""
        self.floor_s = min(self.floor_s, floor_s)

    @property
    def num_meshes(self) -> int:
        """The meshes of which one candidate has a price."""
        return len(self._by_mesh)

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
