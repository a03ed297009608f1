"""What no pipeline through pools can beat, before the programs of its legs are made.

As in `autopar.search.floors`: half the batch takes at least half as long, so one microbatch stands for all
those that divide it, and work that is split over n ranks takes no less than a part in n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autopar.search.block_ilp import MANY_MICROBATCHES
from autopar.search.planner import Planner
from autopar.search.pool_cuts import LegTimes, seam_floors
from autopar.search.pool_legs import Legs
from autopar.search.pool_routes import Leg, Route
from autopar.search.space import parallelism
from autopar.search.stage_table import StageTable

SMALL = 4
"""The microbatch that stands for those that divide it."""


class RouteFloors:
    """Floors on routes whose microbatches, on any replica, all divide `common` samples."""

    def __init__(self, legs: Legs, common: int) -> None:
        self.legs = legs
        self.common = common
        self._tables: dict[tuple[int, int, int], StageTable] = {}
        self._leg_times: dict[tuple[int, float, StageTable], LegTimes] = {}
        self._seams_floors_s: dict[tuple[int, ...], float] = {}
        self._capacity: dict[Leg, float] = {}

    def may_fit(self, route: Route) -> bool:
        """Whether the model's blocks fit at all, sharded as far as that goes and all computed again."""
        return sum(map(self._most_blocks, route.legs)) >= len(self.legs.planners[0].capture.graph.blocks)

    def _most_blocks(self, leg: Leg) -> float:
        """No more blocks fit the devices of a leg."""
        if leg not in self._capacity:
            planner, layout = self.legs.planners[leg.pool], leg.layout
            sharded = parallelism(tp=layout.tp, cp=layout.cp, ep=layout.ep, dp_shard=layout.dp, zero_stage=3)
            state = planner.bounds.block_state_bytes(sharded)
            samples = layout.microbatch_size / (layout.tp * layout.cp)
            device = planner.cluster.device
            room = device.memory_bytes - device.efficiency.reserved_memory_bytes
            held = state + samples * planner.bounds.block_saved_bytes["full"]
            self._capacity[leg] = layout.pp * room / held if held else float("inf")
        return self._capacity[leg]

    def device_s(self, route: Route) -> float:
        """No step takes less: one device's arithmetic, divided over all of each leg."""
        return self._seams_s(route, self._device_leg)

    def tensor_s(self, route: Route) -> float:
        """The same with what any strategies on the tensor axis take."""
        return self._seams_s(route, self._tensor_leg)

    def _seams_s(self, route: Route, times_of: Callable[[Leg], LegTimes]) -> float:
        """The same for all routes with these times of legs: their messages hold as many samples, a batch's
        over the number of microbatches, and cross between as many nodes."""
        times = [times_of(leg) for leg in route.legs]
        key = (route.num_microbatches, *map(id, times))
        if key not in self._seams_floors_s:
            sending = [
                replace(leg, send_s=self.legs.crossing_s(route, number)) for number, leg in enumerate(times)
            ]
            floors_s, _ = seam_floors(sending, route.num_microbatches)
            self._seams_floors_s[key] = float(floors_s.min(initial=np.inf))
        return self._seams_floors_s[key]

    def _device_leg(self, leg: Leg) -> LegTimes:
        """One device's arithmetic, divided over all of the leg."""
        layout = leg.layout
        size = self._reference(layout.microbatch_size)
        table = self._device_table(leg.pool, size, layout.ep)
        return self._scaled(leg, table, layout.microbatch_size / size / (layout.tp * layout.cp))

    def _device_table(self, pool: int, microbatch_size: int, ep: int) -> StageTable:
        key = pool, microbatch_size, ep
        if key not in self._tables:
            planner = self.legs.planners[pool]
            self._tables[key] = planner.layer.table(planner.programs.device(microbatch_size, ep))
        return self._tables[key]

    def _tensor_leg(self, leg: Leg) -> LegTimes:
        """The same with what any strategies on the tensor axis take."""
        layout, planner = leg.layout, self.legs.planners[leg.pool]
        if layout.tp == 1 or layout.cp > 1 or SMALL % layout.microbatch_size:
            return self._device_leg(leg)
        p = parallelism(microbatch_size=SMALL, num_microbatches=MANY_MICROBATCHES, tp=layout.tp, ep=layout.ep,
                        dp_shard=layout.dp)  # fmt: skip
        table = planner.layer.table(planner.programs.least.relaxed(p, trades=False))
        return self._scaled(leg, table, layout.microbatch_size / SMALL)

    def _scaled(self, leg: Leg, table: StageTable, share: float) -> LegTimes:
        """A share of a table's times; the same for all legs with as many stages."""
        key = leg.layout.pp, share, table
        if key not in self._leg_times:
            times = LegTimes.of(share * table.unit_forward_s, share * table.unit_backward_s, leg.layout.pp)
            self._leg_times[key] = times
        return self._leg_times[key]

    def _reference(self, microbatch_size: int) -> int:
        """The microbatch that stands for one of this size."""
        return self.common if SMALL % microbatch_size else SMALL

    def alone_s(self, planner: Planner) -> float:
        """No step on one pool takes less: one device's arithmetic for the whole batch, divided over all."""
        degrees = planner.pins.values("ep", planner.degrees.ep)
        programs = [planner.programs.device(planner.global_batch, ep) for ep in degrees]
        whole_s = min((planner.layer.table(program).microbatch_s for program in programs), default=0.0)
        return whole_s / planner.cluster.num_devices
