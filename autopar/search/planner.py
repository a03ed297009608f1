"""The outer layer: go through the candidates, cheapest lower bound first, and keep the best.

A candidate is dropped without being solved when its memory floor exceeds the device or its time floor the
best plan so far; what is left is priced exactly. The certificate's bound is the least that any candidate
could still cost: the floor of those never solved; and of those whose fastest program does not fit, though a
smaller one might, the time of that program, which one between the solved memory prices could come close to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from autopar.errors import PinConflictError, SearchTimeoutError
from autopar.plan import Parallelism
from autopar.search.bounds import Bounds
from autopar.search.evaluate import Evaluator
from autopar.search.given import even_cuts
from autopar.search.outcome import Outcome, Solved, better
from autopar.search.programs import MEMORY_PRICES, PINNED, Program, Programs
from autopar.search.space import Pins, candidates, divisors, scale_up_size
from autopar.search.stages import Shares
from costmodel import OptimizerPolicy, Software
from graphs import Capture
from graphs.ir import OpGraph, Tensor
from hardware_db import Cluster

Progress = Callable[[str, int, int], None]

BASELINES = {"DDP": 0, "FSDP": 3}
"""Plain data parallelism by name, and its ZeRO stage."""


@dataclass(frozen=True)
class SearchResult:
    """What the search found; `best` is None where nothing fits.

    `runners_up` are the best of other meshes, in order; `baselines` plain DDP and FSDP by name, None where
    the batch does not divide over the devices. `pruned` counts the candidates that were dropped, by why.
    """

    best: Solved | None
    runners_up: tuple[Solved, ...]
    baselines: dict[str, Solved | None]
    bound_s: float
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
        era: Software | None = None,
        *,
        time_limit_s: float | None = None,
        progress: Progress | None = None,
        shorten: bool = True,
    ) -> None:
        self.cluster = cluster
        self.capture = capture
        self.bounds = Bounds(capture, cluster, policy, era)
        self.evaluator = Evaluator(cluster, policy, era)
        self.programs = Programs(capture, cluster, era, shorten=shorten)
        self.policy = policy
        self.deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self.progress = progress or (lambda step, done, total: None)

    def search(self, global_batch: int, pins: Pins) -> SearchResult:
        """The best plan for a global batch. Raises PinConflictError when the pins leave no candidate at all,
        and SearchTimeoutError when the time limit passes before there is any plan."""
        found = self.candidates(global_batch, pins)
        capacity = self.cluster.device.memory_bytes
        possible = [p for p in found if self.bounds.memory_bytes(p) <= capacity]
        sample_s = self._sample_floors_s(possible)
        order = sorted((self.bounds.step_s(p, sample_s[p.tp]), index) for index, p in enumerate(possible))
        outcome = Outcome()
        waiting_s = float("inf")
        num_seen = 0
        for floor_s, index in order:
            if floor_s >= outcome.best_s:
                waiting_s = floor_s
                break
            if self._is_late():
                waiting_s = floor_s
                outcome.pruned["time limit"] = len(order) - num_seen
                break
            num_seen += 1
            self._try(possible[index], outcome)
            self.progress("search", num_seen, len(order))
        self.progress("search", len(order), len(order))
        outcome.pruned["memory floor"] = len(found) - len(possible)
        if "time limit" not in outcome.pruned:
            outcome.pruned["time floor"] += len(order) - num_seen
        elif outcome.best is None:
            raise SearchTimeoutError(
                f"no plan within the time limit: {num_seen} of {len(order)} candidates were looked at; "
                "allow more time, or pin some settings"
            )
        return SearchResult(
            best=outcome.best,
            runners_up=outcome.runners_up(),
            baselines={} if outcome.best is None else {n: self._baseline(n, global_batch) for n in BASELINES},
            bound_s=min(outcome.best_s, waiting_s, outcome.floor_s),
            num_candidates=len(found),
            num_solved=outcome.num_priced,
            pruned=outcome.pruned,
        )

    def _try(self, p: Parallelism, outcome: Outcome) -> None:
        """Price the candidate unless its program is seen not to fit, or not to be fast enough."""
        for program in (self.programs.lightest, self.programs.program):
            if self.bounds.step_s(p, program(p).sample_s(p)) >= outcome.best_s:
                outcome.pruned["time floor"] += 1
                return
        solved = self.solve_fitting(p)
        if solved is not None:
            outcome.add(solved, solved.evaluated.step_s if solved.price_level == 0 else self._fastest_s(p))
        elif p.tp == 1 or not self._may_shrink(p):
            outcome.leave()
        else:
            outcome.leave(self._fastest_s(p))

    def _fastest_s(self, p: Parallelism) -> float:
        """The time of the fastest program, cut as if memory were no matter, data-parallel communication left
        out."""
        return self.programs.program(p).table(p.recompute).floor_s(p) + self.bounds.update_s(p)

    def candidates(self, global_batch: int, pins: Pins) -> tuple[Parallelism, ...]:
        """All candidates. Raises PinConflictError when there are none."""
        found = tuple(candidates(self.cluster, global_batch, self.tensor_degrees(), self._num_units(), pins))
        if not found:
            raise PinConflictError(self._why_empty(global_batch, pins))
        return found

    def solve(self, p: Parallelism) -> Solved:
        """The candidate with the fastest program that fits, else with the smallest one."""
        found = self.solve_fitting(p)
        if found is not None:
            return found
        level = len(MEMORY_PRICES) - 1 if p.tp > 1 else 0
        program = self.programs.program(p, level)
        return Solved(self.evaluator.evaluate(program.chain, p, self._cuts(program, p)), program, level)

    def solve_fitting(self, p: Parallelism) -> Solved | None:
        """The candidate with the fastest of its programs that fit, or None."""
        level = self._fitting_level(p)
        if level is None:
            return None
        program = self.programs.program(p, level)
        return Solved(self.evaluator.evaluate(program.chain, p, self._cuts(program, p)), program, level)

    def any_fitting(self, global_batch: int, pins: Pins) -> Solved | None:
        """Some candidate that fits, looked for where memory floors are lowest; None when there is none."""
        capacity = self.cluster.device.memory_bytes
        floors = ((self.bounds.memory_bytes(p), p) for p in self.candidates(global_batch, pins))
        order = sorted(
            ((floor, str(p), p) for floor, p in floors if floor <= capacity), key=lambda item: item[:2]
        )
        found = (self.solve_fitting(p) for _, _, p in order)
        return next((solved for solved in found if solved is not None and solved.evaluated.fits), None)

    def _fitting_level(self, p: Parallelism) -> int | None:
        """The lowest price of memory at which the program fits. The highest is tried first: if that does not
        help, nothing between will."""
        if self._peak_bytes(p, 0) <= self._budget_bytes:
            return 0
        highest = len(MEMORY_PRICES) - 1
        if p.tp == 1 or not self._may_shrink(p) or self._peak_bytes(p, highest) > self._budget_bytes:
            return None
        return next(
            level for level in range(1, highest + 1) if self._peak_bytes(p, level) <= self._budget_bytes
        )

    def _peak_bytes(self, p: Parallelism, level: int) -> float:
        program = self.programs.program(p, level)
        return program.table(p.recompute).peak_bytes(p, self.policy, self._cuts(program, p))

    def _may_shrink(self, p: Parallelism) -> bool:
        """Whether the fastest program would fit, somehow cut, if all that it leaves whole were split over
        `tp`."""
        table = self.programs.program(p).table(p.recompute)
        parameters = self.bounds.num_parameters / p.tp / max(1.0, float(table.parameters_once[0, -1]))
        saved = p.microbatch_size * self.bounds.saved_bytes[p.recompute] / p.tp
        shares = Shares(min(1.0, parameters), min(1.0, saved / max(1.0, float(table.saved_bytes[0, -1]))))
        cuts = table.partition(p, self.policy, self._budget_bytes, shares)
        return cuts is not None and table.peak_bytes(p, self.policy, cuts, shares) <= self._budget_bytes

    def finish(self, solved: Solved) -> Solved:
        """The same at full depth, priced again from there: the names and numbers that a plan is made of."""
        p = solved.parallelism
        program = self.programs.finished(p, solved.price_level)
        evaluated = self.evaluator.evaluate(program.chain, p, self._cuts(program, p))
        return replace(solved, program=program, evaluated=evaluated)

    def as_given(self, p: Parallelism) -> Solved:
        """What a person gets who asks for just this, at full depth: the strategies of `autopar.search.pinned`
        and blocks dealt out evenly over the stages, as trainers do it."""
        program = self.programs.finished(p, PINNED)
        cuts = even_cuts(program.chain, p.pp * p.num_virtual_stages)
        return Solved(self.evaluator.evaluate(program.chain, p, cuts), program, PINNED)

    def _cuts(self, program: Program, p: Parallelism) -> tuple[int, ...]:
        cuts = program.table(p.recompute).partition(p, self.policy, self._budget_bytes)
        assert cuts is not None, "candidates have no more stages than the model has units"
        return cuts

    @property
    def _budget_bytes(self) -> float:
        device = self.cluster.device
        return device.memory_bytes - device.efficiency.reserved_memory_bytes

    def _sample_floors_s(self, found: Sequence[Parallelism]) -> dict[int, float]:
        """Per tensor-parallel degree, what a sample costs at the largest microbatch: smaller ones do no
        better."""
        largest: dict[int, int] = {}
        for p in found:
            largest[p.tp] = max(largest.get(p.tp, 1), p.microbatch_size)
        return {tp: self.programs.floor_s(size, tp) / size for tp, size in largest.items()}

    def tensor_degrees(self) -> tuple[int, ...]:
        """Degrees inside the scale-up domain by which most of the parameters can be split."""
        sizes = divisors(min(scale_up_size(self.cluster), self.cluster.num_devices))
        usable = [
            size
            for size in sizes
            if self.cluster.num_devices % size == 0 and divides(self.capture.graph, size)
        ]
        return tuple(usable)

    def _num_units(self) -> int:
        single = Parallelism()
        return len(self.programs.program(single).chain.units)

    def _baseline(self, name: str, global_batch: int) -> Solved | None:
        """The best plain form of data parallelism: over all devices, whatever microbatch and recomputation
        suit it."""
        num_devices = self.cluster.num_devices
        pins = Pins(tp=1, pp=1, zero_stage=BASELINES[name] if num_devices > 1 else 0)
        plain = [
            p for p in candidates(self.cluster, global_batch, (1,), 1, pins) if p.dp_shard in (1, num_devices)
        ]
        capacity = self.cluster.device.memory_bytes
        best: Solved | None = None
        for p in sorted(plain, key=self.bounds.step_s):
            is_beaten = best is not None and self.bounds.step_s(p) >= best.evaluated.step_s
            if not is_beaten and self.bounds.memory_bytes(p) <= capacity:
                solved = self.solve_fitting(p)
                best = best if solved is None else better(best, solved)
        if best is None and plain:
            best = self.solve(min(plain, key=lambda p: (self.bounds.memory_bytes(p), p.microbatch_size)))
        return best

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _why_empty(self, global_batch: int, pins: Pins) -> str:
        num_devices = self.cluster.num_devices
        return (
            f"no parallelism fits {num_devices} devices and a global batch of {global_batch} with {pins}: "
            f"the product of tp, pp and dp must be {num_devices}, dp must divide the global batch, and the "
            f"model can be cut into at most {self._num_units()} pipeline stages; "
            "tensor-parallel degrees that suit model and cluster are "
            f"{', '.join(map(str, self.tensor_degrees()))}"
        )


def divides(graph: OpGraph, size: int) -> bool:
    """Whether most of the parameters have a dimension that `size` divides."""
    tensors = [graph.tensors[parameter.tensor] for parameter in graph.parameters]
    return 2 * _elements(t for t in tensors if any(n % size == 0 for n in t.shape)) >= _elements(tensors)


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.num_elements for tensor in tensors)
