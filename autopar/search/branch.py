"""The outer layer: layouts and ways to run them, cheapest lower bound first, until the best is proven.

Everything that may still win stands in one queue, ordered by the least it can cost. What comes first is
looked at more closely, which raises its floor, splits it, or prices it:

    layout         arithmetic of one device, divided over all
      ↓            strategies of the tensor axis at their true prices      `Floors.sample_s`
    program        one rank's kernels, their memory and messages           `Programs.program`
      ↓            for every way: bandwidth of its data axes               `Bounds.step_s`
    way            stages cut with fractions of what may be recomputed     `StageLayer.bound_s`
      ↓
    plan           whole variants, exact schedule and memory               `StageLayer.solve`

When the first in the queue costs no less than the best plan, nothing can beat that. Stopped before, by time
or by hand, the first in the queue is the bound. Ties are broken by order of arrival: the same input takes the
same way through the space whatever the machine's load.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from autopar.plan import Parallelism
from autopar.search.outcome import Outcome, Solved
from autopar.search.programs import MEMORY_PRICES, Program
from autopar.search.space import Layout, parallelism, ways
from autopar.search.stages import StageTable
from autopar.search.staging import Draft

if TYPE_CHECKING:
    from autopar.search.planner import Planner


REPORT_EVERY = 256
"""Arrivals in the queue between two reports of progress."""


class LayoutNode(NamedTuple):
    """A layout whose floor is that of one device, or of the tensor axis's strategies where `is_close`."""

    layout: Layout
    is_close: bool = False


class WayNode(NamedTuple):
    """A way to run a program, which no program can run in less than `floor_s`, and its stages once they
    were cut; the program is still to be made where `price` is above its own."""

    p: Parallelism
    program: Program
    draft: Draft | None = None
    is_close: bool = False
    floor_s: float = 0.0
    price: int = 0


Node = LayoutNode | WayNode


@dataclass(frozen=True)
class Progress:
    """How far a search is: candidates decided of all, what it looks at, the best so far and its gap."""

    num_decided: int
    num_candidates: int
    looking_at: str
    best: Solved | None
    gap: float


class BranchAndBound:
    """One search. `tolerance` is the gap that is good enough."""

    def __init__(
        self,
        planner: Planner,
        layouts: tuple[Layout, ...],
        tolerance: float,
        report: Callable[[Progress], None],
        deadline: float | None,
    ) -> None:
        self.planner = planner
        self.layouts = layouts
        self.tolerance = tolerance
        self.report = report
        self.deadline = deadline
        self.outcome = Outcome()
        self.stopped: str | None = None
        self._queue: list[tuple[float, int, Node]] = []
        self._arrivals = 0
        self._reported = 0
        self._num_ways: dict[object, int] = {}

    @cached_property
    def num_candidates(self) -> int:
        """All ways to run all layouts."""
        return sum(map(self._count, self.layouts))

    @property
    def floor_s(self) -> float:
        """Nothing that was not solved takes less."""
        return self._queue[0][0] if self._queue else float("inf")

    @property
    def bound_s(self) -> float:
        """No candidate takes less."""
        return min(self.outcome.best_s, self.floor_s, self.outcome.floor_s)

    def run(self) -> Outcome:
        """Search until the best is proven, or until time or the user says so."""
        try:
            self._run()
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        self._count_left()
        return self.outcome

    def _run(self) -> None:
        for layout in self.layouts:
            floor_s = self._layout_floor_s(layout)
            if floor_s is None:
                self.outcome.pruned["memory floor"] += self._count(layout)
            else:
                self._push(floor_s, LayoutNode(layout))
        while self._queue and self.floor_s < self.outcome.best_s * (1 - self.tolerance):
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.stopped = "time limit"
                return
            floor_s, _, node = self._queue[0]
            best = self.outcome.best
            found = list(self._expand(floor_s, node))
            heapq.heappop(self._queue)
            for entry in found:
                self._push(*entry)
            self._report(node, always=self.outcome.best is not best)

    def _push(self, floor_s: float, node: Node) -> None:
        heapq.heappush(self._queue, (floor_s, self._arrivals, node))
        self._arrivals += 1

    def _expand(self, floor_s: float, node: Node) -> Iterator[tuple[float, Node]]:
        """What a node turns into, each with its floor."""
        match node:
            case LayoutNode(layout, False) if layout.tp * layout.cp > 1:
                yield max(floor_s, self._close_floor_s(layout)), LayoutNode(layout, True)
            case LayoutNode(layout, _):
                for way in self._ways(layout):
                    program = self.planner.programs.program(way)
                    microbatch_s = self.planner.layer.table(program).microbatch_s
                    way_s = self.planner.bounds.step_s(way, microbatch_s, self._device(layout))
                    way_s = max(way_s, self.planner.layer.schedule_floor_s(program, way))
                    yield max(floor_s, way_s), WayNode(way, program, floor_s=max(floor_s, way_s))
            case WayNode(p, program, None, False) if node.price > program.key.price_level:
                smaller = self.planner.programs.program(p, node.price)
                yield floor_s, node._replace(program=smaller)
            case WayNode(p, program, None, False):
                close_s = self.planner.layer.floor_s(program, p)
                if close_s < float("inf"):
                    yield max(floor_s, close_s), node._replace(is_close=True)
                elif self._next_price(program) is not None:
                    yield from self._smaller(node)
                else:
                    self.outcome.pruned["out of memory"] += 1
            case WayNode(p, program, None, True):
                draft = self.planner.layer.draft(program, p)
                if draft is not None:
                    yield max(floor_s, draft.bound_s), node._replace(draft=draft)
                elif self._next_price(program) is not None:
                    yield from self._smaller(node)
                else:
                    self.outcome.pruned["out of memory"] += 1
            case WayNode():
                yield from self._solve(node)

    def _solve(self, node: WayNode) -> Iterator[tuple[float, Node]]:
        """Price a way; where memory binds, smaller programs may do better."""
        p, program, layer = node.p, node.program, self.planner.layer
        solved = layer.solve(program, p, node.draft)
        if solved is None:
            self.outcome.pruned["out of memory"] += 1
            return
        is_free = solved.evaluated.fits and solved.evaluated.choices == layer.table(program).base
        smaller = [] if is_free else list(self._smaller(node))
        if smaller and not solved.evaluated.fits:
            yield from smaller
            return
        if program.key.tp > 1 and not is_free:
            solved = replace(solved, bound_s=min(solved.bound_s, node.floor_s))
        self.outcome.add(solved)
        yield from smaller

    def _smaller(self, node: WayNode) -> Iterator[tuple[float, Node]]:
        """The same way with the program of the next price of memory."""
        price = self._next_price(node.program)
        if price is not None:
            yield node.floor_s, WayNode(node.p, node.program, floor_s=node.floor_s, price=price)

    def _next_price(self, program: Program) -> int | None:
        following = program.key.price_level + 1
        return following if program.key.tp > 1 and following < len(MEMORY_PRICES) else None

    # --- floors ---------------------------------------------------------------------------------------------

    def _layout_floor_s(self, layout: Layout) -> float | None:
        """The floor of one device's arithmetic, divided over all; None where memory cannot suffice."""
        p = self._lightest(layout)
        if self.planner.bounds.memory_bytes(p) > self.planner.cluster.device.memory_bytes:
            return None
        device = self._device(layout)
        inner = layout.tp * layout.cp
        return self.planner.bounds.layout_s(self._freest(layout), device.microbatch_s / inner, device)

    def _close_floor_s(self, layout: Layout) -> float:
        size, tp, cp, ep = layout[:4]
        floors = self.planner.floors
        microbatch_s = floors.tensor_s(size, tp, ep) / cp + floors.context_s(size, tp, cp)
        return self.planner.bounds.layout_s(self._freest(layout), microbatch_s, self._device(layout))

    def _device(self, layout: Layout) -> StageTable:
        return self.planner.floors.device(layout.microbatch_size, layout.ep)

    def _lightest(self, layout: Layout) -> Parallelism:
        """The way that holds least, or less."""
        pins = self.planner.pins
        sharded = {"zero_stage": 3, "dp_shard": layout.dp, "dp_replicate": 1}
        if layout.dp * layout.cp == 1:
            sharded = {"zero_stage": 0, "dp_shard": 1, "dp_replicate": 1}
        recompute = pins.recompute or "mixed"
        offload = pins.offload or "none"
        return parallelism(**layout.degrees, **sharded, recompute=recompute, offload=offload)

    def _freest(self, layout: Layout) -> Parallelism:
        """The way that keeps least beside activations."""
        shard = {"dp_replicate": 1, "dp_shard": layout.dp, "zero_stage": 3}
        return parallelism(**layout.degrees, **shard, schedule="1F1B", offload="optimizer")

    # --- counting -------------------------------------------------------------------------------------------

    def _ways(self, layout: Layout) -> Iterator[Parallelism]:
        return ways(layout, self.planner.cluster, self.planner.degrees, self.planner.pins)

    def _count(self, layout: Layout) -> int:
        key = (layout.pp, layout.num_microbatches, layout.dp, layout.tp * layout.cp, layout.cp > 1)
        if key not in self._num_ways:
            self._num_ways[key] = sum(1 for _ in self._ways(layout))
        return self._num_ways[key]

    def _count_left(self) -> None:
        reason = self.stopped or "time floor"
        left = {id(n.p): 1 for _, _, n in self._queue if isinstance(n, WayNode)}
        number = len(left) + sum(
            self._count(n.layout) for _, _, n in self._queue if isinstance(n, LayoutNode)
        )
        self.outcome.pruned[reason] = self.outcome.pruned.get(reason, 0) + number

    def _report(self, node: Node, *, always: bool) -> None:
        if not always and self._arrivals - self._reported < REPORT_EVERY:
            return
        self._reported = self._arrivals
        left = sum(self._count(n.layout) if isinstance(n, LayoutNode) else 1 for _, _, n in self._queue)
        looking_at = str(node.p) if isinstance(node, WayNode) else ""
        gap = self.outcome.gap(self.floor_s)
        self.report(
            Progress(self.num_candidates - left, self.num_candidates, looking_at, self.outcome.best, gap)
        )
