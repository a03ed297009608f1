"""What each rank of a simulated pipeline keeps for backward, over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from costmodel.orders import held_changes
from costmodel.phases import Phase
from costmodel.schedule import EventPhase, Timeline

_PHASES: dict[EventPhase, Phase] = {
    "forward": "F",
    "backward": "B",
    "backward_input": "I",
    "backward_weight": "W",
}


class HeldBytes(NamedTuple):
    """A step function of time: `num_bytes[i]` are held from `times_s[i]` until `times_s[i + 1]`.

    The most is `peak_bytes`, first held from `peak_s` on, while the rank runs microbatch `peak_microbatch`.
    """

    times_s: tuple[float, ...]
    num_bytes: tuple[float, ...]
    peak_bytes: float
    peak_s: float
    peak_microbatch: int


def held_bytes(
    timeline: Timeline, saved_bytes: Sequence[float], weight_saved_bytes: Sequence[float] | None = None
) -> tuple[HeldBytes, ...]:
    """What each rank keeps for backward while `timeline` runs; the sizes as in `peak_activation_bytes`.

    A forward holds its bytes from its start; a backward frees them at its end. Raises CostModelError when
    there is not one size per virtual stage.
    """
    num_total = 1 + max(event.stage for event in timeline.events)
    change = held_changes(num_total, saved_bytes, weight_saved_bytes)
    by_rank: list[list[tuple[float, float, int]]] = [[] for _ in timeline.finish_s]
    for event in timeline.events:
        at_s = event.start_s if event.phase == "forward" else event.end_s
        num_bytes = change[_PHASES[event.phase]][event.stage]
        by_rank[event.rank].append((at_s, num_bytes, event.microbatch))
    return tuple(map(_held, by_rank))


def _held(changes: Sequence[tuple[float, float, int]]) -> HeldBytes:
    times_s, differences, microbatches = zip(*changes, strict=True)
    num_bytes = tuple(accumulate(differences))
    peak_bytes = max(num_bytes)
    peak = num_bytes.index(peak_bytes)
    return HeldBytes(times_s, num_bytes, peak_bytes, times_s[peak], microbatches[peak])
