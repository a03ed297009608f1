"""What a microbatch takes at least, before the program of a layout is made.

Prices are the larger of constants and terms linear in the work, rounded up to whole tiles, so splitting work
over n ranks never divides its time by more than n, and half the batch takes at least half as long. Hence

    T(b, tp, cp, ep) ≥ T(b, 1, 1, ep) / (tp cp)
                     ≥ T(B, tp, 1, ep) b / (B cp)         with the strategies of the tensor axis, b ≤ B

where B is the largest microbatch that is considered. The first is one program, the second the relaxation of
one block problem for each degree. A context axis adds what attention must see of other ranks, whichever way
is cheaper: its keys and values gathered, or all four of its tensors sent to where heads are whole.
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.search.programs import Program, Programs
from autopar.search.stages import StageTable


class Floors:
    """Floors on a microbatch's time; `table` makes the sums of a program."""

    def __init__(self, programs: Programs, largest: int, table: Callable[[Program], StageTable]) -> None:
        self.programs = programs
        self.largest = largest
        self.table = table
        self._tensor_s: dict[int, float] = {}

    def device(self, microbatch_size: int, ep: int) -> StageTable:
        """A microbatch on one device that has memory enough, its experts shared with `ep` others."""
        return self.table(self.programs.device(microbatch_size, ep))

    def device_s(self, microbatch_size: int, ep: int) -> float:
        """Its time."""
        return self.device(microbatch_size, ep).microbatch_s

    def tensor_s(self, microbatch_size: int, tp: int, ep: int) -> float:
        """A microbatch on a rank of a tensor axis."""
        device_s = self.device_s(microbatch_size, ep) / tp
        if ep > 1 or tp == 1:  # the problem of the axis is that of whole experts
            return device_s
        if tp not in self._tensor_s:
            self._tensor_s[tp] = self.programs.floor_s(self.largest, tp) / self.largest
        return max(device_s, microbatch_size * self._tensor_s[tp])

    def context_s(self, microbatch_size: int, tp: int, cp: int) -> float:
        """What attention adds to a microbatch for a context axis."""
        return self.programs.context_floor_s(microbatch_size, tp, cp) if cp > 1 else 0.0
