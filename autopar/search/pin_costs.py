"""What each pin costs: the search once more without it, for plans that are faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from autopar.errors import PinConflictError
from autopar.plan import PinCost, Plan
from autopar.search.outcome import Solved
from autopar.search.pins import Pins
from autopar.search.planner import Planner

MOST_WORK = 8000
"""Arrivals in the queues of all these searches together, each a fraction of a millisecond to three: seconds
on any machine, and the same pins priced on all of them."""

MOST_OF_ONE = 3000
"""Of them, those of one search, so that one pin does not leave the others without a price."""


PinCosts = tuple[tuple[PinCost, ...], tuple[str, ...]]
"""What pins cost, and the pins without a price."""


def pin_costs(search: Callable[[Pins], float | None], pins: Pins, step_s: float) -> PinCosts:
    """For every pin the seconds that a step takes longer for it, all others kept; and the pins without a
    price.

    `step_s` is the step time under all pins. `search` returns the least that was found under some of them, or
    None where it gave up before it could tell. A search that stops at a gap may find less without a pin than
    with it: that costs nothing.
    """
    found, unpriced = [], []
    for text, without in pins.parts():
        other_s = search(without)
        if other_s is None:
            unpriced.append(text)
        else:
            best_s = min(step_s, other_s)
            found.append(PinCost(pin=text, step_s=best_s, cost_s=step_s - best_s))
    return tuple(found), tuple(unpriced)


def with_pin_costs(plan: Plan, costs: PinCosts) -> Plan:
    """The plan, with what each of its pins costs, and a warning that names those without a price."""
    priced, unpriced = costs
    warnings = plan.warnings
    if unpriced:
        remark = f"there was no time to find out what these pins cost: {', '.join(unpriced)}"
        warnings = (*warnings, remark)
    return plan.model_copy(update={"pin_costs": priced, "warnings": warnings})


class PinPricer:
    """Searches again without some pins, for what beats the `best` plan under all `pins`; what it gains less
    than the tolerance of a search counts as nothing. All searches together do so much `work`, and end at the
    planner's deadline."""

    def __init__(self, planner: Planner, pins: Pins, best: Solved, work: int = MOST_WORK) -> None:
        self.planner = planner
        self.pins = pins
        self.best = best
        self.work = work

    def costs(self) -> PinCosts:
        """As `pin_costs`."""
        return pin_costs(self._step_s, self.pins, self.best.evaluated.step_s)

    def _step_s(self, pins: Pins) -> float | None:
        best: Solved | None = self.best
        for left in self._spaces(pins):
            best = self._faster(left, best) if best is not None else None
        return None if best is None else best.evaluated.step_s

    def _spaces(self, pins: Pins) -> Iterator[Pins]:
        """The pins, and where the planner keeps states on the host of its own accord, with that."""
        yield pins
        if self.planner.pins.offload != self.pins.offload:
            yield replace(pins, offload=self.planner.pins.offload)

    def _faster(self, pins: Pins, best: Solved) -> Solved | None:
        """The better of `best` and what pins allow; None where the work, or the time, did not suffice."""
        if self.work <= 0:
            return None
        planner = silenced(self.planner.under(pins))
        try:
            found = planner.search(best, most_work=min(self.work, MOST_OF_ONE))
        except PinConflictError:
            return best  # what the pin asks for is not even tried without it
        except KeyboardInterrupt:
            self.work = 0
            return None
        self.work = 0 if found.stopped == "interrupted" else self.work - found.work
        return None if found.stopped else found.best or best


def silenced(planner: Planner) -> Planner:
    """The planner, which tells nobody of its progress: searches without a pin are short."""
    planner.report = lambda progress: None
    return planner
