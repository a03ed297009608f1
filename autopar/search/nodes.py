"""What stands in the queue of a search: parts of the space, and how closely they were looked at."""

from __future__ import annotations

from typing import NamedTuple

from autopar.plan import Parallelism
from autopar.search.local_programs import Program
from autopar.search.mixed import Blend
from autopar.search.space import Layout, Scheduled
from autopar.search.staging import Draft


class LayoutNode(NamedTuple):
    """A layout whose floor is that of one device; or, of the strategies of its axes, that of the schedules
    that hide what these communicate, which are `overlapping`, or of the others."""

    layout: Layout
    overlapping: bool | None = None


class ScheduledNode(NamedTuple):
    """A layout with a schedule, and its program if there was one already. Its floor `is_close` as that of a
    way."""

    scheduled: Scheduled
    program: Program | None = None
    is_close: bool = False


class WayNode(NamedTuple):
    """A way to run a layout: its program once there is one, and its stages once they were cut. Its floor
    `is_close` once even cuts and memory had their say, first without a program and then again with it, and
    `is_tight` once many chains of work bound its stages."""

    p: Parallelism
    program: Program | None = None
    is_close: bool = False
    draft: Draft | None = None
    is_tight: bool = False


class SmallerNode(NamedTuple):
    """The same way with the program of the next price of memory, still to be made. The fastest program takes
    `fastest_s`; no program at all can beat the queue's floor, which `rigour` relaxations have raised."""

    p: Parallelism
    price: int
    fastest_s: float
    rigour: int = 0


class MixedNode(NamedTuple):
    """A way whose blocks may run different programs, and the stages of their blend."""

    p: Parallelism
    blend: Blend
    draft: Draft


OpenNode = LayoutNode | ScheduledNode
Node = OpenNode | WayNode | SmallerNode | MixedNode
