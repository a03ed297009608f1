"""The search for one model on one cluster: what it is made of, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import lcm

from autopar.errors import PinConflictError, SearchTimeoutError
from autopar.plan import Parallelism
from autopar.search.bounds import Bounds
from autopar.search.branch import BranchAndBound, Progress
from autopar.search.effort import Effort
from autopar.search.evaluate import Evaluator
from autopar.search.experts import num_experts
from autopar.search.floors import Floors
from autopar.search.given import even_cuts
from autopar.search.linear_model import Size
from autopar.search.mixed import Mixer
from autopar.search.outcome import Solved, better, rank
from autopar.search.pin_conflicts import minimal_conflict
from autopar.search.pin_forms import told_apart
from autopar.search.pin_space import PinSpace
from autopar.search.pins import Pins
from autopar.search.placement import placed, placed_chain
from autopar.search.programs import MEMORY_PRICES, PINNED, Programs
from autopar.search.replicas import SEQUENCE
from autopar.search.space import (
    SHORTEST_CONTEXT,
    Degrees,
    Layout,
    divisors,
    layouts,
    longest_tensor_axis,
    ways,
)
from autopar.search.staging import StageLayer
from autopar.search.way_floors import WayFloors
from costmodel import OptimizerPolicy, Software
from graphs import Capture
from graphs.ir import OpGraph, Tensor
from hardware_db import Cluster

Report = Callable[[Progress], None]

BASELINES = {"DDP": 0, "FSDP": 3}
"""Plain data parallelism by name, and its ZeRO stage."""

TOLERANCE = 9e-3
"""The gap at which a search is done: with what a closer look would not pay for (`other_programs`), 1 %."""

NUM_RUNNERS_UP = 4


@dataclass(frozen=True)
class SearchResult:
    """What the search found; `best` is None where nothing fits.

    `runners_up` are the best of other meshes, in order; `baselines` plain DDP and FSDP by name, None where
    the batch does not divide over the devices. `pruned` counts the candidates that were dropped, by why;
    `stopped` says what ended the search before its proof, `work` how much was looked at. `unplaced` is the
    best with its axes in the usual order: what the search compares.
    """

    best: Solved | None
    runners_up: tuple[Solved, ...]
    baselines: dict[str, Solved | None]
    bound_s: float
    num_candidates: int
    num_solved: int
    pruned: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    work: int = 0
    unplaced: Solved | None = None


class Planner:
    """Searches the best plan of one model on one cluster, for a global batch and within pins: in the whole
    space, or in the part of it that programs can be written for."""

    def __init__(
        self,
        capture: Capture,
        cluster: Cluster,
        policy: OptimizerPolicy,
        era: Software | None = None,
        *,
        global_batch: int,
        pins: Pins | None = None,
        time_limit_s: float | None = None,
        report: Report | None = None,
        shorten: bool = True,
        whole_space: bool = True,
        low_precision: str | None = None,
        num_runners_up: int = NUM_RUNNERS_UP,
        effort: Effort | None = None,
    ) -> None:
        self.effort = effort or Effort()
        self.cluster = cluster
        self.policy = policy
        self.global_batch = global_batch
        self.whole_space = whole_space
        self.num_runners_up = num_runners_up
        self.pins = pins or Pins()
        self.capture = capture = told_apart(capture, self.pins)
        self.pin_space = PinSpace(self.pins, capture.graph)
        self.bounds = Bounds(capture, cluster, policy, era, low_precision)
        self.evaluator = Evaluator(cluster, policy, era)
        self.programs = Programs(
            capture, cluster, era, rules=self.pins, shorten=shorten, low_precision=low_precision,
            effort=self.effort,
        )  # fmt: skip
        self.layer = StageLayer(self.programs, self.evaluator, self.pin_space.options, self.pin_space.where)
        self.deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self.report = report or (lambda progress: None)

    def under(self, pins: Pins) -> Planner:
        """The same search under other pins; what these do not change is shared."""
        other = copy(self)
        for name in ("degrees", "layouts", "floors", "way_floors", "mixer"):
            vars(other).pop(name, None)
        other.pins, other.pin_space = pins, PinSpace(pins, self.capture.graph)
        if pins.placements != self.pins.placements:
            other.capture = told_apart(self.capture, pins)
            other.programs = self.programs.under(pins, other.capture)
        left = other.pin_space
        if other.programs is not self.programs or left.of_units != self.pin_space.of_units:
            other.layer = StageLayer(other.programs, self.evaluator, left.options, left.where)
        return other

    # --- the space ------------------------------------------------------------------------------------------

    @cached_property
    def num_units(self) -> int:
        """The most stages that the model can be cut into."""
        return len(self.programs.program(Parallelism()).chain.units)

    @cached_property
    def degrees(self) -> Degrees:
        """The degrees that suit the model and the cluster, and that pins leave."""
        experts = num_experts(self.capture.graph)
        fewest, most = self.pin_space.num_stages(self.num_units)
        tp = self.pin_space.tensor_degrees(self._tensor_degrees())
        num_blocks = len(self.capture.graph.blocks)
        ep = tuple(n for n in divisors(experts) if self.cluster.num_devices % n == 0) if experts else (1,)
        policy = self.policy
        return Degrees(
            tp, self._context_degrees(), ep, most, fewest, num_blocks,
            programs_only=not self.whole_space, wide_gradients=policy.gradient_bytes > policy.gathered_bytes,
        )  # fmt: skip

    def _tensor_degrees(self) -> tuple[int, ...]:
        """Degrees within reach by which most of the parameters can be split."""
        graph, num_devices = self.capture.graph, self.cluster.num_devices
        sizes = (n for n in divisors(num_devices) if n <= longest_tensor_axis(self.cluster))
        return tuple(n for n in sizes if divides(graph, n))

    def _context_degrees(self) -> tuple[int, ...]:
        """Powers of two that leave every rank positions enough."""
        graph = self.capture.graph
        shapes = [graph.tensors[name].shape for name in graph.inputs]
        longest = max((shape[SEQUENCE] for shape in shapes if len(shape) == SEQUENCE + 1), default=1)
        has_attention = any("scaled_dot_product" in op.target for op in graph.ops)
        usual = [n for n in divisors(self.cluster.num_devices) if n & (n - 1) == 0]
        return tuple(
            n for n in usual
            if n == 1 or (has_attention and longest % (2 * n) == 0 and longest // n >= SHORTEST_CONTEXT)
        )  # fmt: skip

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """All layouts that some way runs. Raises PinConflictError when there are none."""
        found = tuple(self._layouts())
        if not found:
            raise PinConflictError(self._why_empty(minimal_conflict(self._is_possible, self.pins)))
        return found

    def _is_possible(self, pins: Pins) -> bool:
        try:
            return any(True for _ in self.under(pins)._layouts())
        except PinConflictError:
            return False

    def _layouts(self) -> Iterator[Layout]:
        for layout in layouts(self.cluster, self.global_batch, self.degrees, self.pins):
            is_run = any(True for _ in ways(layout, self.cluster, self.degrees, self.pins))
            if is_run and self.pin_space.admits(layout, self.programs.replica):
                yield layout

    def candidates(self) -> Iterator[Parallelism]:
        """Every way to run every layout."""
        for layout in self.layouts:
            yield from ways(layout, self.cluster, self.degrees, self.pins)

    @cached_property
    def floors(self) -> Floors:
        """Floors on a microbatch's time."""
        common = lcm(*(layout.microbatch_size for layout in self.layouts))
        return Floors(self.programs, common, self.layer.table)

    @cached_property
    def way_floors(self) -> WayFloors:
        """Floors on the step of layouts and ways."""
        return WayFloors(self.floors, self.bounds, self.layer, self.pins)

    @cached_property
    def mixer(self) -> Mixer:
        """Plans of several programs."""
        return Mixer(self.programs, self.layer)

    # --- the search -----------------------------------------------------------------------------------------

    def search(
        self, incumbent: Solved | None = None, tolerance: float = TOLERANCE, most_work: int | None = None
    ) -> SearchResult:
        """The best plan, every mesh in the usual order of axes until it is found, then in its best one.

        With an `incumbent`, the unplaced best of another cluster, only what is better counts; the bound is of
        both. The `tolerance` is the gap at which the search is done. With `most_work` it stops after that,
        and looks for nothing beside the best. Raises PinConflictError when the pins leave no candidate at
        all, and SearchTimeoutError when the time limit passes before there is any plan.
        """
        search = BranchAndBound(self, self.layouts, tolerance, self.report, self.deadline)
        search.outcome.best, search.most_work = incumbent, most_work
        num_beside = self.num_runners_up if most_work is None else 0
        outcome = search.run(num_beside)
        if outcome.best is None and search.stopped is not None:
            raise SearchTimeoutError(
                f"no plan yet when the search was stopped ({search.stopped}): "
                f"{search.num_candidates} candidates, none priced; allow more time, or pin some settings"
            )
        self.effort.solved("candidates", Size(search.num_candidates, 1, search.num_candidates))
        best = None if outcome.best is incumbent else outcome.best
        found = () if best is None else (best, *outcome.runners_up(num_beside))
        has_baselines = best is not None and most_work is None
        found = tuple(sorted((placed(each, self.evaluator) for each in found), key=rank))
        return SearchResult(
            best=found[0] if found else None,
            runners_up=found[1:],
            baselines={name: self._baseline(name) for name in BASELINES} if has_baselines else {},
            bound_s=search.bound_s,
            num_candidates=search.num_candidates,
            num_solved=outcome.num_priced,
            pruned=outcome.pruned,
            stopped=search.stopped,
            work=search.work,
            unplaced=best,
        )

    def solve(self, p: Parallelism) -> Solved:
        """A way to run a layout with the fastest program that fits, else with the one that comes nearest."""
        best: Solved | None = None
        for price in range(len(MEMORY_PRICES) if p.tp > 1 else 1):
            solved = self.layer.solve(self.programs.program(p, price), p)
            assert solved is not None, "candidates have no more stages than the model has units"
            best = better(best, solved)
            if solved.evaluated.fits:
                break
        assert best is not None
        return best

    def finish(self, solved: Solved) -> Solved:
        """The same at full depth, priced again from there: the names and numbers that a plan is made of."""
        evaluated = solved.evaluated
        program, p = self.programs.depths.finished(solved.program), evaluated.parallelism
        chain = placed_chain(program, p, self.evaluator)
        again = self.evaluator.evaluate(chain, p, evaluated.cuts, evaluated.choices)
        return replace(solved, program=program, evaluated=again)

    def as_given(self, p: Parallelism) -> Solved:
        """What a person gets who asks for just this, at full depth: the strategies of `autopar.search.pinned`
        and blocks dealt out evenly over the stages, as trainers do it."""
        program = self.programs.depths.finished(self.programs.program(p, PINNED))
        cuts = even_cuts(program.chain, p.pp * p.num_virtual_stages)
        evaluated = self.evaluator.evaluate(placed_chain(program, p, self.evaluator), p, cuts)
        return Solved(evaluated, program, evaluated.step_s)

    def _baseline(self, name: str) -> Solved | None:
        """The best plain form of data parallelism: over all devices, whatever microbatch and recomputation
        suit it, and whatever is pinned."""
        num_devices = self.cluster.num_devices
        if self.global_batch % num_devices:
            return None
        zero_stage = BASELINES[name] if num_devices > 1 else 0
        shard = num_devices if zero_stage else 1
        plain = self.under(Pins(tp=1, cp=1, ep=1, pp=1, zero_stage=zero_stage, dp_shard=shard))
        best: Solved | None = None
        for p in sorted(plain.candidates(), key=lambda p: -p.microbatch_size):
            smallest = p.model_copy(update={"recompute": "mixed"})
            if best is not None and self.bounds.memory_bytes(smallest) > self.cluster.device.memory_bytes:
                continue
            best = better(best, plain.solve(p))
        return best

    def _why_empty(self, culprits: Sequence[str]) -> str:
        num_devices = self.cluster.num_devices
        conflict = next((f"; {text}" for text in self.pin_space.conflicts.values() if text), "")
        full = ", of which 1F1B in a program has no more than microbatches" * (not self.whole_space)
        return (
            f"no parallelism fits {num_devices} devices and a global batch of {self.global_batch} with "
            f"{' and '.join(culprits) or 'nothing pinned'}: the product of tp, cp, pp and dp must be "
            f"{num_devices}, dp times the microbatch size must divide the global batch, and the model can be "
            f"cut into at most {self.num_units} pipeline stages{full}; tensor-parallel degrees that suit "
            f"model and cluster are {', '.join(map(str, self._tensor_degrees()))}{conflict}"
        )


def divides(graph: OpGraph, size: int) -> bool:
    """Whether most of the parameters have a dimension that `size` divides."""
    tensors = [graph.tensors[parameter.tensor] for parameter in graph.parameters]
    fitting = [t for t in tensors if any(n % size == 0 for n in t.shape)]
    return 2 * _elements(fitting) >= _elements(tensors)


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.num_elements for tensor in tensors)
