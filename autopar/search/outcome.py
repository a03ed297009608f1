"""What a search has found so far, and which of two candidates is the better."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.plan import Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.programs import Program

NUM_RUNNERS_UP = 4


@dataclass(frozen=True)
class Solved:
    """A candidate with its program, made at one of the memory prices, and its cost."""

    evaluated: Evaluated
    program: Program
    price_level: int

    @property
    def parallelism(self) -> Parallelism:
        return self.evaluated.parallelism


class Outcome:
    """The best so far, what came next on other meshes, and the floor under what did not fit."""

    def __init__(self) -> None:
        self.best: Solved | None = None
        self.floor_s = float("inf")
        self.num_priced = 0
        self.pruned = {"memory floor": 0, "time floor": 0, "out of memory": 0}
        self._by_mesh: dict[tuple[int, ...], Solved] = {}

    @property
    def best_s(self) -> float:
        return float("inf") if self.best is None else self.best.evaluated.step_s

    def leave(self, floor_s: float = float("inf")) -> None:
        """Note a candidate that does not fit with any program tried; another might take `floor_s`."""
        self.pruned["out of memory"] += 1
        self.floor_s = min(self.floor_s, floor_s)

    def add(self, solved: Solved, floor_s: float) -> None:
        """Note a candidate that was priced; its fastest program, fitting or not, takes at least `floor_s`."""
        self.num_priced += 1
        self.floor_s = min(self.floor_s, floor_s)
        if not solved.evaluated.fits:
            self.leave()
            return
        self.best = better(self.best, solved)
        p = solved.parallelism
        mesh = (p.pp, p.tp, p.dp_shard, p.dp_replicate)
        self._by_mesh[mesh] = better(self._by_mesh.get(mesh), solved)

    def runners_up(self) -> tuple[Solved, ...]:
        rest = (solved for solved in self._by_mesh.values() if solved is not self.best)
        return tuple(sorted(rest, key=rank)[:NUM_RUNNERS_UP])


def rank(solved: Solved) -> tuple[object, ...]:
    """The order of candidates: those that fit by time, then those that do not by excess; simpler ones break
    ties."""
    e = solved.evaluated
    p = e.parallelism
    simplicity = (
        p.pp,
        p.tp,
        p.zero_stage,
        p.num_virtual_stages,
        p.recompute != "none",
        -p.microbatch_size,
        str(p),
    )
    return (not e.fits, e.step_s if e.fits else e.excess_bytes, *simplicity)


def better(old: Solved | None, new: Solved) -> Solved:
    return new if old is None or rank(new) < rank(old) else old
