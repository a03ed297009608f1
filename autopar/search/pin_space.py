"""What pins leave open of one captured model: tensor degrees, stages, and what blocks compute again.

The chain that a search works on is of a model whose blocks stand for one another, so its units do not know
their names; those come from the graph at full depth, which is cut into the same units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from autopar.errors import PinConflictError
from autopar.search.axis_problem import AxisProblem
from autopar.search.pin_conflicts import dividing_degrees
from autopar.search.pin_placement import PINNED_AXES
from autopar.search.pin_rules import placements_of
from autopar.search.pin_stages import NamedUnit, named_units
from autopar.search.pinned import BytesMoved
from autopar.search.pins import Pins
from autopar.search.replicas import Replica
from autopar.search.space import Layout
from autopar.search.stage_table import Options
from autopar.search.stages import Where
from autopar.search.units import RECOMPUTE_MODES, Unit
from graphs.ir import OpGraph


class PinSpace:
    """What `pins` leave of the model that was captured as `graph`."""

    def __init__(self, pins: Pins, graph: OpGraph) -> None:
        self.pins = pins
        self.graph = graph
        self.conflicts: dict[tuple[int, int, int], str] = {}

    @cached_property
    def units(self) -> tuple[NamedUnit, ...]:
        """The units of every chain of the model, by name."""
        return named_units(self.graph)

    @property
    def of_units(self) -> tuple[object, ...]:
        """All that `where` and `options` depend on."""
        pins = self.pins
        modes = (pins.recompute, dict(pins.recompute_modules), pins.forbid.get("recompute"))
        return *modes, pins.cut_before, pins.keep_together

    # --- stages ---------------------------------------------------------------------------------------------

    def num_stages(self, num_units: int) -> tuple[int, int]:
        """The fewest and the most stages of a model that can be cut into `num_units`. Raises
        PinConflictError."""
        if not self._cuts_are_pinned:
            return 1, num_units
        return len(self.pins.must_cut(self.units)) + 1, len(self.pins.may_cut(self.units)) + 1

    def where(self, units: Sequence[Unit]) -> Where:
        """Which runs of units may be a stage: those that begin and end where one may, with no unit inside
        that must begin one."""
        if not self._cuts_are_pinned:
            return None
        assert len(units) == len(self.units), "chains have the units of the graph"
        return self._where

    @property
    def _cuts_are_pinned(self) -> bool:
        return bool(self.pins.cut_before or self.pins.keep_together)

    @cached_property
    def _where(self) -> Where:
        ends = (0, *self.pins.may_cut(self.units), len(self.units))
        found = np.zeros((len(self.units) + 1,) * 2, dtype=bool)
        found[np.ix_(ends, ends)] = True
        for unit in self.pins.must_cut(self.units):
            found[:unit, unit + 1 :] = False
        return found

    # --- recomputation --------------------------------------------------------------------------------------

    def options(self, units: Sequence[Unit]) -> Options:
        """For each unit what it may compute again."""
        pins = self.pins
        if not (pins.recompute or pins.recompute_modules or "recompute" in pins.forbid):
            return tuple(unit.frontier for unit in units)
        return tuple(
            self._variants(unit, named.modules[0]) if unit.is_block else unit.frontier
            for unit, named in zip(units, self.units, strict=True)
        )

    def _variants(self, block: Unit, path: str) -> tuple[str, ...]:
        """Those worth a choice; where they are all forbidden, the other modes. Raises PinConflictError where
        the pins leave none."""
        found = self.pins.recompute_values(path, block.frontier) or self.pins.recompute_values(
            path, RECOMPUTE_MODES
        )
        if not found:
            raise PinConflictError(f"the pins leave block {path!r} no way to recompute; free one of them")
        return found

    # --- placements -----------------------------------------------------------------------------------------

    def tensor_degrees(self, usual: Sequence[int]) -> tuple[int, ...]:
        """The degrees, of the `usual` ones and the pinned one, that divide what is pinned to be split. Raises
        PinConflictError for none."""
        return dividing_degrees(self.pins, self.graph, "tp", usual)

    def admits(self, layout: Layout, replica: Callable[[int, int, int], Replica]) -> bool:
        """Whether every op has a strategy left on the layout's tensor axis; `replica` makes the programs of a
        microbatch size, data size and context axis. `conflicts` keeps why not.

        How a parameter can lie is the same for every microbatch; which strategies there are is not.
        """
        if layout.tp == 1 or not self.pins.placements:
            return True
        size, cp = (layout.microbatch_size, layout.cp) if self._keys_are_pinned else (1, 1)
        if (size, cp, layout.tp) not in self.conflicts:
            graph = replica(size, 1, cp).local.graph
            self.conflicts[size, cp, layout.tp] = self._conflict(graph, layout.tp)
        return not self.conflicts[size, cp, layout.tp]

    @cached_property
    def _keys_are_pinned(self) -> bool:
        return any(pin.placement is None for axis in PINNED_AXES for pin in placements_of(self.pins, axis))

    def _conflict(self, graph: OpGraph, tp: int) -> str:
        try:
            AxisProblem(graph, "tp", tp, BytesMoved(tp), custom=self.pins.rule(graph, "tp"))
        except PinConflictError as error:
            return str(error)
        return ""
