"""What a microbatch takes at least, before the program of a layout is made.

A kernel takes a time to launch, and beside that the larger of constants and terms linear in the work, rounded
up to whole tiles. So splitting work over n ranks never divides what is beside launches by more than n, and so
is it with a batch and a part that divides it. With L for the launches of all kernels, of which no rank has
fewer,

    T(b, tp, cp, ep) - L ≥ (T(b, 1, 1, ep) - L) / (tp cp) ≥ (T(B, 1, 1, ep) - L) b / (B tp cp)
                         ≥ (T(B, tp, 1, ep) - L) b / (B cp)      with the strategies of the tensor axis

where B is a multiple of b. The first line is one program, the second the relaxation of one
block problem for each degree. A context axis adds what attention must see of other ranks, whichever way is
cheaper: its keys and values gathered, or all four of its tensors sent to where heads are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from autopar.plan import Parallelism
from autopar.pricing import OpCost
from autopar.search.bounds import DeviceSums
from autopar.search.local_programs import Program
from autopar.search.programs import Programs, on_device
from autopar.search.stage_table import StageTable

POWER_OF_TWO = 8
"""Block problems are made for a multiple of all sizes that no higher power of two divides, if that will do:
of larger ones latencies are too small a part to tell."""


class Sums(DeviceSums, Protocol):
    """The sums of a microbatch on one device, also were the host never behind; `launches` are what its
    kernels take to launch."""

    @property
    def microbatch_s(self) -> float: ...
    @property
    def unpaced_s(self) -> float: ...
    @property
    def launches(self) -> OpCost: ...


@dataclass(frozen=True)
class Share:
    """A part of a microbatch, or of its work, as a floor: the least share of its sums that the part has."""

    whole: Sums
    part: float

    @property
    def microbatch_s(self) -> float:
        return self.least_s(self.whole.unpaced_s)

    @property
    def unpaced_s(self) -> float:
        return self.microbatch_s

    @property
    def computed_s(self) -> float:
        return self.least_s(self.whole.computed_s)

    @property
    def weight_s(self) -> float:
        return self.part * self.whole.weight_s + (1 - self.part) * self.launches.weight_s

    @property
    def launches(self) -> OpCost:
        return self.whole.launches

    def least_s(self, seconds: float) -> float:
        """What the part takes at least if the whole takes so long, all launches included."""
        return self.part * seconds + (1 - self.part) * self.launches.total_s

    @property
    def all_saved_bytes(self) -> float:
        return self.part * self.whole.all_saved_bytes

    def least_relief_s(self, excess_bytes: float) -> float:
        return self.part * self.whole.least_relief_s(excess_bytes / self.part)


class Rank(NamedTuple):
    """What a microbatch takes at least on a rank of all stages together, and what of that is arithmetic,
    whatever strategies communicate; and the sums of the same microbatch on one `device`."""

    device: Sums
    microbatch_s: float
    computed_s: float


class Floors:
    """Floors on a microbatch's time. `largest` is a multiple of all microbatch sizes; `table` makes the sums
    of a program."""

    def __init__(self, programs: Programs, largest: int, table: Callable[[Program], StageTable]) -> None:
        self.programs = programs
        self.largest = largest
        self.table = table
        self._devices: dict[tuple[int, int], StageTable] = {}
        self._shares: dict[tuple[int, int], Share] = {}
        self._ranks: dict[tuple[int, int, int, int], Rank] = {}
        self._tensor_s: dict[tuple[int, int], float] = {}
        self._computed_s: dict[tuple[int, int], float] = {}

    def device(self, microbatch_size: int, ep: int) -> StageTable:
        """A microbatch on one device that has memory enough, its experts shared with `ep` others."""
        key = microbatch_size, ep
        if key not in self._devices:
            self._devices[key] = self.table(self.programs.device(microbatch_size, ep))
        return self._devices[key]

    def share(self, microbatch_size: int, ep: int) -> Share:
        """The same from the sums of the largest: a program for all sizes."""
        return Share(self.device(self.largest, ep), microbatch_size / self.largest)

    def known(self, microbatch_size: int, ep: int) -> Sums:
        """The same as far as it is known: from a larger size where there is no program of this one yet."""
        key = microbatch_size, ep
        if key in self._devices or self.programs.has_fastest(on_device(microbatch_size, ep)):
            return self.device(microbatch_size, ep)
        if key not in self._shares:
            multiple = self._multiple(microbatch_size)
            self._shares[key] = Share(self.device(multiple, ep), microbatch_size / multiple)
        return self._shares[key]

    def smallest_more_s(self, ep: int) -> float:
        """What the smallest microbatch takes on one device beyond its share of the largest: kernels too small
        for the device. About what any takes, as time is nearly linear in samples."""
        return self.device(1, ep).microbatch_s - self.share(1, ep).microbatch_s

    def divided(self, p: Parallelism) -> Program:
        """What no program of a candidate's layout can beat, made without one (`LeastPrograms.divided`)."""
        return self.programs.least.divided(p, self._multiple(p.microbatch_size) // p.microbatch_size)

    def rank(self, microbatch_size: int, tp: int, cp: int, ep: int) -> Rank:
        """A microbatch on a rank of a tensor axis and a context axis, as far as it is known."""
        key, device = (microbatch_size, tp, cp, ep), self.known(microbatch_size, ep)
        found = self._ranks.get(key)
        if found is None or found.device is not device:
            share = Share(device, 1 / cp)
            microbatch_s = share.least_s(self.tensor_s(microbatch_size, tp, ep))
            microbatch_s += self.context_s(microbatch_size, tp, cp)
            found = Rank(device, microbatch_s, share.least_s(self.computed_s(microbatch_size, tp, ep)))
            self._ranks[key] = found
        return found

    def tensor_s(self, microbatch_size: int, tp: int, ep: int) -> float:
        """A microbatch on a rank of a tensor axis."""
        device = self.known(microbatch_size, ep)
        if tp == 1:
            return device.microbatch_s
        device_s = Share(device, 1 / tp).microbatch_s
        if ep > 1:  # the problem of the axis is that of whole experts
            return device_s
        multiple = self._multiple(microbatch_size)
        if (tp, multiple) not in self._tensor_s:
            self._tensor_s[tp, multiple] = self.programs.least.floor_s(multiple, tp)
        return max(device_s, Share(device, microbatch_size / multiple).least_s(self._tensor_s[tp, multiple]))

    def computed_s(self, microbatch_size: int, tp: int, ep: int) -> float:
        """What of that is arithmetic, whatever strategies communicate."""
        device = self.known(microbatch_size, ep)
        device_s = Share(device, 1 / tp).computed_s
        if ep > 1 or tp == 1:
            return device_s
        multiple = self._multiple(microbatch_size)
        if (tp, multiple) not in self._computed_s:
            self._computed_s[tp, multiple] = self.programs.least.computed_floor_s(multiple, tp)
        return max(
            device_s, Share(device, microbatch_size / multiple).least_s(self._computed_s[tp, multiple])
        )

    def _multiple(self, microbatch_size: int) -> int:
        """A multiple of this size for which problems are made: the largest size without its surplus factors
        of two, or else with them. So there are two, and sizes share their problems."""
        multiple = self.largest
        while multiple % (2 * POWER_OF_TWO) == 0:
            multiple //= 2
        return multiple if multiple % microbatch_size == 0 else self.largest

    def context_s(self, microbatch_size: int, tp: int, cp: int) -> float:
        """What attention adds to a microbatch for a context axis."""
        return self.programs.least.context_floor_s(microbatch_size, tp, cp) if cp > 1 else 0.0
