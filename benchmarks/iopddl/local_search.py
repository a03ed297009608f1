"""A good answer to a reduced contest problem, quickly: descent under a price of memory that rises until it
fits.

Deterministic. One sweep gives every node its best strategy while its neighbours stay; where nothing changes
any more, pairs of neighbours move together. What overflows the room is paid for, ever more dearly. Then, from
the first answer that fits, descent goes on among answers that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.iopddl.network import Network, Vector

Chosen = dict[int, int]
"""The position of the strategy of every node that is left."""

MOST_SWEEPS = 40
MOST_PRICES = 40
PRICE_STEP = 4.0


@dataclass
class _State:
    """One choice, with the room it leaves at every point of time."""

    network: Network
    chosen: Chosen
    room: Vector

    @classmethod
    def of(cls, network: Network, chosen: Chosen) -> _State:
        state = cls(network, dict(chosen), network.room.copy())
        for node in chosen:
            state._hold(node, -1)
        return state

    def _hold(self, node: int, sign: int) -> None:
        for load in self.network.loads[node]:
            self.room[load.start : load.end] += sign * load.usages[self.chosen[node]]

    def overflow(self) -> float:
        """The memory beyond the limit, summed over points of time."""
        return float(-np.minimum(self.room, 0).sum())

    def _priced(self, node: int, price: float, apart_from: int | None = None) -> Vector:
        """What each strategy costs here without the edge to `apart_from`, `node` itself having let go of its
        memory; what does not fit costs `price` per unit and point of time."""
        total = self.network.costs[node].copy()
        for other, costs in self.network.edges[node].items():
            if other != apart_from:
                total += costs[:, self.chosen[other]]
        for load in self.network.loads[node]:
            room = self.room[load.start : load.end]
            excess = np.maximum(load.usages[:, None] - np.maximum(room, 0), 0).sum(axis=1)
            total[excess > 0] += price * excess[excess > 0]
        return total

    def move(self, node: int, price: float) -> bool:
        """Gives the node its cheapest strategy; whether that is another."""
        self._hold(node, 1)
        total = self._priced(node, price)
        before, best = self.chosen[node], int(total.argmin())
        if total[best] < total[before]:
            self.chosen[node] = best
        self._hold(node, -1)
        return self.chosen[node] != before

    def move_pair(self, first: int, second: int, price: float) -> bool:
        """Gives two neighbours their cheapest pair of strategies; whether that is another.

        Their memory is priced as if they never lived together; `descend` keeps only what truly gains.
        """
        before = self.chosen[first], self.chosen[second]
        self._hold(first, 1)
        self._hold(second, 1)
        alone = self._priced(first, price, second)
        other = self._priced(second, price, first)
        total = alone[:, None] + other + self.network.edges[first][second]
        best = np.unravel_index(total.argmin(), total.shape)
        if total[best] < total[before]:
            self.chosen[first], self.chosen[second] = int(best[0]), int(best[1])
        self._hold(first, -1)
        self._hold(second, -1)
        return (self.chosen[first], self.chosen[second]) != before


def cost_of(network: Network, chosen: Chosen) -> float:
    """The cost of the whole problem's answer; memory apart."""
    total = network.constant + sum(float(network.costs[node][k]) for node, k in chosen.items())
    for first, edges in network.edges.items():
        for second, costs in edges.items():
            if first < second:
                total += float(costs[chosen[first], chosen[second]])
    return total


def fits(network: Network, chosen: Chosen) -> bool:
    return _State.of(network, chosen).overflow() == 0


def descend(network: Network, chosen: Chosen, price: float) -> Chosen:
    """Sweeps of single moves, and of moves of pairs where those end, until neither gains."""
    pairs = [
        (first, second) for first, others in network.edges.items() for second in others if first < second
    ]
    best, best_total = dict(chosen), _total(_State.of(network, chosen), price)
    for _ in range(MOST_SWEEPS):
        state = _State.of(network, best)
        moved = [state.move(node, price) for node in network.costs]
        if not any(moved):
            moved = [state.move_pair(*pair, price) for pair in pairs]
        total = _total(state, price)
        if not any(moved) or total >= best_total:
            break
        best, best_total = dict(state.chosen), total
    return best


def _total(state: _State, price: float) -> float:
    overflow = state.overflow()
    return cost_of(state.network, state.chosen) + (price * overflow if overflow else 0.0)


def local_search(network: Network, start: Chosen | None = None) -> Chosen | None:
    """An answer that fits, None where none was found; from `start`, or from every node's own cheapest."""
    chosen = (
        dict(start)
        if start is not None
        else {node: int(costs.argmin()) for node, costs in network.costs.items()}
    )
    scale = max((float(costs[np.isfinite(costs)].max()) for costs in network.costs.values()), default=1.0)
    price = 1e-9 * max(scale, 1.0)
    for _ in range(MOST_PRICES):
        chosen = descend(network, chosen, price)
        if fits(network, chosen):
            chosen = descend(network, chosen, np.inf)
            return chosen if np.isfinite(cost_of(network, chosen)) else None
        price *= PRICE_STEP
    return None
