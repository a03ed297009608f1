"""What no way to run a layout can beat, before its stages are cut: microbatch floors in their pipelines.

A floor on a microbatch's time (`autopar.search.floors`) becomes one on the step by the bubble, the data axes
and what memory makes it compute again (`autopar.search.bounds`). Schedules that run the forward of one
microbatch with the backward of another hide communication behind what the other computes: together both take
at least what they compute, and at least half of all; what runs alone takes all of its time.
"""

from __future__ import annotations

from autopar.plan import Parallelism, Recompute
from autopar.search.bounds import Bounds, States
from autopar.search.floors import Floors, Rank, Share
from autopar.search.local_programs import Program
from autopar.search.pins import Pins
from autopar.search.space import Layout, Scheduled, parallelism
from autopar.search.staging import StageLayer
from costmodel.closed_forms import uniform_finish_s
from costmodel.orders import OVERLAPPING_SCHEDULES, least_alone


class WayFloors:
    """Floors of layouts, and of ways to run them, within pins."""

    def __init__(self, floors: Floors, bounds: Bounds, layer: StageLayer, pins: Pins) -> None:
        self.floors = floors
        self.bounds = bounds
        self.layer = layer
        self.pins = pins
        self._close_s: dict[Parallelism, float] = {}
        self._busiest_s: dict[tuple[Scheduled, bool], float] = {}

    def may_fit(self, layout: Layout) -> bool:
        """Whether memory may suffice for some way to run a layout."""
        return self.way_may_fit(self.freest(layout))

    def way_may_fit(self, p: Parallelism) -> bool:
        """Whether memory may suffice for a way, whatever it computes again."""
        return self.bounds.memory_bytes(p, self._recompute) <= self.bounds.limit_bytes

    def ways_may_fit(self, scheduled: Scheduled, states: States) -> list[bool]:
        """Whether it may suffice for ways to run a layout with a schedule, by their model states."""
        memory_bytes = self.bounds.ways_bytes(self.freest(scheduled), states, self._recompute)
        found: list[bool] = (memory_bytes <= self.bounds.limit_bytes).tolist()
        return found

    def quick_layout_s(self, layout: Layout) -> float:
        """No way to run a layout takes less: the arithmetic of one device, divided over all."""
        device = self.floors.share(layout.microbatch_size, layout.ep)
        rank = Share(device, 1 / (layout.tp * layout.cp))
        return self.bounds.layout_s(self.freest(layout), rank.computed_s, device)

    def layout_s(self, layout: Layout, *, overlapping: bool) -> float:
        """No way to run a layout takes less whose schedule hides communication, or none of the others: the
        strategies of its axes."""
        p, rank = self.freest(layout), self._rank(layout)
        microbatch_s = rank.microbatch_s
        if overlapping:
            microbatch_s = self._hiding_s(p, rank, least_alone(layout.pp, layout.num_microbatches))
        return self.bounds.layout_s(p, microbatch_s, rank.device)

    def scheduled_s(self, scheduled: Scheduled, program: Program | None = None) -> float:
        """No way to run a layout with a schedule takes less, whatever the program, as far as is known without
        one or, better, from the fastest; nothing moves on the data axes. Infinite where memory allows
        none."""
        p = self.freest(scheduled)
        if not self.way_may_fit(p):
            return float("inf")
        rank = self._rank(p, program)
        step_s = self.bounds.pipeline_s(p, self._rank_s(p, rank), rank.device)
        return max(step_s, self.layer.schedule_floor_s(p, program))

    def way_s(self, p: Parallelism, program: Program | None = None) -> float:
        """No step takes less, whatever the program, as far as is known without one or, better, from the
        fastest."""
        rank = self._rank(p, program)
        step_s = self.bounds.step_s(p, self._rank_s(p, rank), rank.device)
        return max(step_s, self.layer.schedule_floor_s(p, program))

    def close_s(self, p: Parallelism) -> float:
        """The same with even cuts and memory, from one device's work divided over all ranks, and the least
        that these communicate; infinite where memory allows no program."""
        if p.pp > 1 and p.num_virtual_stages == 1:
            return 0.0  # drafts are exact there, and say more
        if p not in self._close_s:
            divided = self.floors.divided(p)
            self._close_s[p] = self.layer.divided_order_s(p, self.layer.busiest_s(divided, p))
        return self._close_s[p]

    def likely_close_s(self, p: Parallelism) -> float:
        """The same, though other cuts may take less."""
        if p.pp > 1 and p.num_virtual_stages == 1:
            return self.layer.evenly_s(self.floors.divided(p), p)
        return self.close_s(p)

    def stages_s(self, p: Parallelism, program: Program, enough_s: float) -> float:
        """The same with what any program of the layout takes at least; its fastest `program` was made. No
        more than `enough_s` is worth while."""
        return self.layer.floor_s(self._least(p, program), p, enough_s)

    def busiest_s(self, scheduled: Scheduled, program: Program | None) -> float:
        """What the busiest rank takes at least, with what any program takes if the fastest was made; nothing
        moves on the data axes. Infinite where memory allows no program."""
        key = scheduled, program is None
        if key not in self._busiest_s:
            p = self.freest(scheduled)
            least = self.floors.divided(p) if program is None else self._least(p, program)
            self._busiest_s[key] = self.layer.busiest_s(least, p, moves=False)
        return self._busiest_s[key]

    def _least(self, p: Parallelism, program: Program) -> Program:
        # Memory may drive a way to other programs: what is closed by this is closed for all.
        return program if p.tp == 1 else self.floors.programs.least.relaxed(p, trades=False)

    def likely_s(self, kind: Layout | Scheduled | Parallelism, *, overlapping: bool = False) -> float:
        """About what a way takes, or the best of a schedule or, with schedules that hide communication or
        with others, of a layout, as far as is known without its program: were all its stages alike, and the
        data axes hid nothing."""
        p = kind if isinstance(kind, Parallelism) else self.freest(kind)
        rank = self._rank(p)
        device = rank.device
        if not isinstance(kind, Layout):
            microbatch_s = self._rank_s(p, rank)
        elif overlapping:
            microbatch_s = self._hiding_s(p, rank, least_alone(p.pp, p.num_microbatches))
        else:
            microbatch_s = rank.microbatch_s
        microbatch_s += self.floors.smallest_more_s(p.ep)
        whole_s = microbatch_s + self.bounds.more_s(p, device)
        if isinstance(kind, Layout):  # with the bubble of four stages a rank
            return (p.num_microbatches + (p.pp - 1) / 4) * whole_s / p.pp
        moves = isinstance(kind, Parallelism)
        floor_s = (self.bounds.step_s if moves else self.bounds.pipeline_s)(p, microbatch_s, device)
        stage_s = whole_s / (p.pp * p.num_virtual_stages)
        passes_s = stage_s / 3, 2 * stage_s / 3, device.weight_s / device.computed_s * stage_s
        ends_s = uniform_finish_s(p.schedule, p.pp, p.num_microbatches, p.num_virtual_stages, *passes_s)
        return max([floor_s, *(ends_s or ())])

    def _rank(self, kind: Layout | Parallelism, program: Program | None = None) -> Rank:
        """A microbatch on all stages of one rank, with its fastest program if there is one: others of a
        tensor axis may compute less, though they take longer."""
        rank = self.floors.rank(kind.microbatch_size, kind.tp, kind.cp, kind.ep)
        if program is None:
            return rank
        table = self.layer.table(program)
        computed_s = table.computed_s if kind.tp == 1 else rank.computed_s
        return rank._replace(microbatch_s=table.microbatch_s, computed_s=computed_s)

    def _rank_s(self, p: Parallelism, rank: Rank) -> float:
        """A microbatch on a rank, less what the schedule hides of it."""
        if p.schedule not in OVERLAPPING_SCHEDULES:
            return rank.microbatch_s
        return self._hiding_s(p, rank, self.layer.alone(p))

    def _hiding_s(self, p: Parallelism, rank: Rank, alone: float) -> float:
        """A microbatch that hides what it communicates, but for the part that runs `alone`."""
        # What comes on top is computed, behind communication if that is what takes longer.
        exposed_s = rank.microbatch_s - self.bounds.more_s(p, rank.device)
        return alone * rank.microbatch_s + (1 - alone) * max(rank.computed_s, exposed_s / 2)

    def freest(self, kind: Layout | Scheduled) -> Parallelism:
        """A way to run a layout, with its schedule if it has one, that keeps no more beside what is saved of
        microbatches than any other."""
        layout, settings = (kind, kind.degrees) if isinstance(kind, Layout) else (kind.layout, kind.settings)
        stages = self.pins.values("zero_stage", (0, 1, 2, 3)) if layout.dp * layout.cp > 1 else ()
        zero_stage = max(stages, default=0)
        replicate, shard = (1, layout.dp) if zero_stage else (layout.dp, 1)
        return parallelism(
            **settings, dp_replicate=replicate, dp_shard=shard, zero_stage=zero_stage,
            sequence_parallel=self.pins.sequence_parallel if layout.tp > 1 else None,
            recompute=self._recompute, offload=self.pins.offload or "none",
        )  # fmt: skip

    @property
    def _recompute(self) -> Recompute:
        """What keeps the least that pins leave."""
        pins = self.pins
        return pins.recompute if pins.recompute and not pins.recompute_modules else "mixed"
