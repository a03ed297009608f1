"""The outer layer: go through the candidates, cheapest lower bound first, and keep the best.

A candidate is dropped without being solved when its memory floor exceeds the device or its time floor the best plan so
far; what is left is priced exactly. The certificate's bound is the least that any candidate could still cost: the floor
of those never solved, and of those that did not fit with their fastest program the time of that program, which a program
between the solved memory prices might come close to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from autopar.errors import InvalidParallelismError, PinConflictError, SearchTimeoutError
from autopar.plan import Parallelism
from autopar.search.bounds import Bounds
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.programs import MEMORY_PRICES, Program, Programs
from autopar.search.space import Pins, candidates, divisors, scale_up_size
from costmodel import OptimizerPolicy
from graphs import Capture
from graphs.ir import OpGraph, Tensor
from hardware_db import Cluster

Progress = Callable[[str, int, int], None]

NUM_RUNNERS_UP = 4


@dataclass(frozen=True)
class Solved:
    """A candidate with its program, made at one of the memory prices, and its cost. `floor_s` is the step time of its
    fastest program, whether or not that fits."""

    evaluated: Evaluated
    program: Program
    price_level: int
    floor_s: float

    @property
    def parallelism(self) -> Parallelism:
        return self.evaluated.parallelism


@dataclass(frozen=True)
class SearchResult:
    """What the search found. `best` is None where nothing fits; then `nearest` exceeds memory the least.

    `runners_up` are the best of other meshes, in order; `baselines` plain DDP and FSDP by name, None where the batch
    does not divide over the devices.
    """

    best: Solved | None
    nearest: Solved | None
    runners_up: tuple[Solved, ...]
    baselines: dict[str, Solved | None]
    bound_s: float
    is_complete: bool
    num_candidates: int
    num_solved: int
    pruned: dict[str, int] = field(default_factory=dict)


class Planner:
    """Searches the best plan of one model on one cluster."""

    def __init__(
        self,
        capture: Capture,
        cluster: Cluster,
        policy: OptimizerPolicy,
        *,
        time_limit_s: float | None = None,
        progress: Progress | None = None,
        shorten: bool = True,
    ) -> None:
        self.cluster = cluster
        self.capture = capture
        self.bounds = Bounds(capture, cluster, policy)
        self.evaluator = Evaluator(cluster, policy)
        self.programs = Programs(capture, cluster, shorten=shorten)
        self.policy = policy
        self.deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self.progress = progress or (lambda step, done, total: None)

    def search(self, global_batch: int, pins: Pins) -> SearchResult:
        """The best plan for a global batch. Raises PinConflictError when the pins leave no candidate at all."""
        found = self.candidates(global_batch, pins)
        capacity = self.cluster.device.memory_bytes
        possible = [p for p in found if self.bounds.memory_bytes(p) <= capacity]
        sample_s = self._sample_floors_s(possible)
        order = sorted((self.bounds.step_s(p, sample_s[p.tp]), index) for index, p in enumerate(possible))
        outcome = _Outcome()
        done = 0
        is_complete = True
        for done, (floor_s, index) in enumerate(order, 1):
            if outcome.best is not None and floor_s >= outcome.best.evaluated.step_s:
                done -= 1
                break
            if self._is_late():
                done -= 1
                is_complete = False
                break
            outcome.add(self.solve(possible[index], outcome.best_s))
            self.progress("search", done, len(order))
        self.progress("search", len(order), len(order))
        if not is_complete and outcome.best is None:
            raise SearchTimeoutError(
                f"no plan within the time limit: {done} of {len(order)} candidates were priced; allow more time, "
                "or pin some settings"
            )
        waiting_s = min((floor_s for floor_s, _ in order[done:]), default=float("inf"))
        best_s = outcome.best_s
        return SearchResult(
            best=outcome.best,
            nearest=outcome.nearest if outcome.best is None else None,
            runners_up=outcome.runners_up(),
            baselines={name: self._baseline(name, global_batch) for name in ("DDP", "FSDP")},
            bound_s=min(best_s, waiting_s, outcome.floor_s),
            is_complete=is_complete,
            num_candidates=len(found),
            num_solved=done,
            pruned={
                "memory floor": len(found) - len(possible),
                "time floor" if is_complete else "time limit": len(order) - done,
                "out of memory": outcome.num_too_big,
            },
        )

    def _sample_floors_s(self, found: Sequence[Parallelism]) -> dict[int, float]:
        """Per tensor-parallel degree, what a sample costs at the largest microbatch: smaller ones do no better."""
        largest: dict[int, int] = {}
        for p in found:
            largest[p.tp] = max(largest.get(p.tp, 1), p.microbatch_size)
        return {tp: self.programs.floor_s(size, tp) / size for tp, size in largest.items()}

    def candidates(self, global_batch: int, pins: Pins) -> tuple[Parallelism, ...]:
        """All candidates. Raises PinConflictError when there are none."""
        found = tuple(
            candidates(self.cluster, global_batch, self.tensor_degrees(), self._num_units(), pins)
        )
        if not found:
            raise PinConflictError(self._why_empty(global_batch, pins))
        return found

    def solve(self, p: Parallelism, best_s: float = float("inf")) -> Solved:
        """The candidate with the fastest program that fits, else with the smallest one."""
        solved = self._solve_at(p, 0)
        floor_s = solved.floor_s
        for level in range(1, len(MEMORY_PRICES) if p.tp > 1 else 1):
            if solved.evaluated.fits or floor_s >= best_s:
                break
            solved = replace(self._solve_at(p, level), floor_s=floor_s)
        return solved

    def finish(self, solved: Solved) -> Solved:
        """The same at full depth, priced again from there: the names and numbers that a plan is made of."""
        program = self.programs.finished(solved.parallelism, solved.price_level)
        return replace(solved, program=program, evaluated=self._price(program, solved.parallelism))

    def _solve_at(self, p: Parallelism, level: int) -> Solved:
        program = self.programs.program(p, level)
        evaluated = self._price(program, p)
        return Solved(evaluated, program, level, evaluated.step_s)

    def _price(self, program: Program, p: Parallelism) -> Evaluated:
        memory_bytes = self.cluster.device.memory_bytes - self.cluster.device.efficiency.reserved_memory_bytes
        cuts = program.table(p.recompute).partition(p, self.policy, memory_bytes)
        if cuts is None:
            raise InvalidParallelismError(
                f"{p.pp} x {p.num_virtual_stages} pipeline stages are more than the {len(program.chain.units)} pieces "
                "that the model can be cut into; use fewer"
            )
        return self.evaluator.evaluate(program.chain, p, cuts)

    def tensor_degrees(self) -> tuple[int, ...]:
        """Degrees inside the scale-up domain by which most of the parameters can be split."""
        sizes = divisors(min(scale_up_size(self.cluster), self.cluster.num_devices))
        usable = [size for size in sizes if self.cluster.num_devices % size == 0 and divides(self.capture.graph, size)]
        return tuple(usable)

    def _num_units(self) -> int:
        single = Parallelism()
        return len(self.programs.program(single).chain.units)

    def _baseline(self, name: str, global_batch: int) -> Solved | None:
        """The best plain form of data parallelism: over all devices, whatever microbatch and recomputation suit it."""
        num_devices = self.cluster.num_devices
        zero_stage = {"DDP": 0, "FSDP": 3}[name] if num_devices > 1 else 0
        pins = Pins(tp=1, pp=1, zero_stage=zero_stage)
        plain = [p for p in candidates(self.cluster, global_batch, (1,), 1, pins) if p.dp_shard in (1, num_devices)]
        capacity = self.cluster.device.memory_bytes
        fitting = [p for p in plain if self.bounds.memory_bytes(p) <= capacity]
        solved: Solved | None = None
        for p in sorted(fitting, key=self.bounds.step_s):
            if solved is not None and solved.evaluated.fits and self.bounds.step_s(p) >= solved.evaluated.step_s:
                break
            solved = better(solved, self.solve(p))
        if solved is None and plain:
            solved = self.solve(min(plain, key=lambda p: (self.bounds.memory_bytes(p), p.microbatch_size)))
        return solved

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _why_empty(self, global_batch: int, pins: Pins) -> str:
        num_devices = self.cluster.num_devices
        return (
            f"no parallelism fits {num_devices} devices and a global batch of {global_batch} with {pins}: the product of "
            f"tp, pp and dp must be {num_devices}, dp must divide the global batch, and the model can be cut into at "
            f"most {self._num_units()} pipeline stages; tensor-parallel degrees that suit model and cluster are "
            f"{', '.join(map(str, self.tensor_degrees()))}"
        )


class _Outcome:
    """The best so far, what came next on other meshes, and the floor under what did not fit."""

    def __init__(self) -> None:
        self.best: Solved | None = None
        self.nearest: Solved | None = None
        self.floor_s = float("inf")
        self.num_too_big = 0
        self._by_mesh: dict[tuple[int, ...], Solved] = {}

    @property
    def best_s(self) -> float:
        return float("inf") if self.best is None else self.best.evaluated.step_s

    def add(self, solved: Solved) -> None:
        self.floor_s = min(self.floor_s, solved.floor_s)
        self.nearest = better(self.nearest, solved)
        if not solved.evaluated.fits:
            self.num_too_big += 1
            return
        self.best = better(self.best, solved)
        p = solved.parallelism
        mesh = (p.pp, p.tp, p.dp_shard, p.dp_replicate)
        self._by_mesh[mesh] = better(self._by_mesh.get(mesh), solved)

    def runners_up(self) -> tuple[Solved, ...]:
        rest = (solved for solved in self._by_mesh.values() if solved is not self.best)
        return tuple(sorted(rest, key=rank)[:NUM_RUNNERS_UP])


def rank(solved: Solved) -> tuple[object, ...]:
    """The order of candidates: those that fit by time, then those that do not by excess; simpler ones break ties."""
    e = solved.evaluated
    p = e.parallelism
    simplicity = (p.pp, p.tp, p.zero_stage, p.num_virtual_stages, p.recompute != "none", -p.microbatch_size, str(p))
    return (not e.fits, e.step_s if e.fits else e.excess_bytes, *simplicity)


def better(old: Solved | None, new: Solved) -> Solved:
    return new if old is None or rank(new) < rank(old) else old


def divides(graph: OpGraph, size: int) -> bool:
    """Whether most of the parameters have a dimension that `size` divides."""
    tensors = [graph.tensors[parameter.tensor] for parameter in graph.parameters]
    return 2 * _elements(t for t in tensors if any(n % size == 0 for n in t.shape)) >= _elements(tensors)


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.num_elements for tensor in tensors)

