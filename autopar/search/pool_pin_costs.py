"""What each pin of a plan for pools costs: their search once more without it, for what is faster."""

from __future__ import annotations

import time

from autopar.errors import PinConflictError
from autopar.search.pin_costs import MOST_OF_ONE, MOST_WORK, PinCosts, pin_costs, silenced
from autopar.search.pins import Pins
from autopar.search.pool_legs import Legs
from autopar.search.pool_outcome import PoolsResult
from autopar.search.pools import PoolSearch


class PoolPinPricer:
    """Searches pools again without some pins, for what beats the `result` of `search`, whose gain counts as
    for one cluster (`autopar.search.pin_costs.PinPricer`). All searches together do so much `work`."""

    def __init__(self, search: PoolSearch, result: PoolsResult, work: int = MOST_WORK) -> None:
        self.search = search
        self.result = result
        self.work = 0 if result.stopped else work

    def costs(self) -> PinCosts:
        """As `pin_costs`."""
        return pin_costs(self._step_s, self.search.planners[0].pins, self.search.best_s)

    def _step_s(self, pins: Pins) -> float | None:
        """The least of a step under other pins; None where the work, or the time, did not suffice."""
        if self.work <= 0:
            return None
        deadline = self.search.deadline
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            planners = [silenced(planner.under(pins)) for planner in self.search.planners]
            search = PoolSearch(Legs(planners, self.search.legs.pools), left_s)
            search.best, search.alone = self.result.best, self.result.alone
            search.most_work = min(self.work, MOST_OF_ONE)
            found = search.run()
        except PinConflictError:
            return self.search.best_s  # what the pin asks for is not even tried without it
        except KeyboardInterrupt:
            self.work = 0
            return None
        self.work = 0 if found.stopped == "interrupted" else self.work - search.work
        return None if found.stopped else search.best_s
