"""What each pin costs: the search once more without it."""

from __future__ import annotations

from collections.abc import Callable

from autopar.plan import PinCost
from autopar.search.pins import Pins


def pin_costs(
    search: Callable[[Pins], float | None], pins: Pins, step_s: float | None = None
) -> tuple[PinCost, ...]:
    """For every pin the seconds that a step takes longer for it, all others kept.

    `search` returns the step time of the best plan under some pins, or None where nothing fits; `step_s` is
    that of all pins, where it is known already. A search that stops at a gap may find less without a pin than
    with it: that costs nothing. Nothing has a cost where nothing fits.
    """
    whole_s = search(pins) if step_s is None else step_s
    if whole_s is None:
        return ()
    found = []
    for text, without in pins.parts():
        other_s = search(without)
        best_s = whole_s if other_s is None else min(whole_s, other_s)
        found.append(PinCost(pin=text, step_s=best_s, cost_s=whole_s - best_s))
    return tuple(found)
