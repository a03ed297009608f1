"""A contest problem as a mixed-integer program of ours, solved with a bound.

What the reductions of `network` leave is written down as a program over nodes v with strategies k and edges
(u, v) with pairs of strategies; c are costs, m usages, T points of time:

    minimise   Σ c_vk x_vk + Σ c_uv(p, q) f_uv(p, q)

    x_vk ∈ {0,1},  Σ_k x_vk = 1                                    every node takes one strategy    `_choose`
    Σ_q f_uv(p, q) = Σ_{k in p} x_uk,   Σ_p f_uv(p, q) = Σ_{k in q} x_vk,   f ≥ 0                    `_flow`
    Σ_v m_vk(t) x_vk ≤ room(t)                                     at every point t that can fill   `_fit`

p and q are classes of strategies that an edge treats alike, up to a cost of each strategy's own, which moves
to the node. Equality rows make the relaxation as tight as an edge alone can be; it is integral on trees
without memory. Points with equal loads share one row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autopar.search.linear_model import LinearModel, Size, Term
from autopar.search.solver import Backend, solve
from benchmarks.iopddl.local_search import Chosen, local_search
from benchmarks.iopddl.network import Indices, Network, Vector
from benchmarks.iopddl.problem import Problem, is_within_limit, score


@dataclass(frozen=True)
class Result:
    """What is known of a problem: no answer costs less than `bound`; `answer` costs `incumbent`.

    Without an answer, `incumbent` is None. `first_incumbent` is what descent found, from nothing and from the
    rounded relaxation; `size` is the program's after the reductions, `cpu_s` the processor time of it all.
    """

    bound: float
    incumbent: int | None
    first_incumbent: int | None
    answer: tuple[int, ...]
    size: Size
    cpu_s: float


class Program:
    """The rows of a reduced network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.model = LinearModel()
        self.x = {node: self._choose(costs) for node, costs in network.costs.items()}
        self.flows: list[tuple[int, int, Indices, Indices, dict[tuple[int, int], int]]] = []
        for first, edges in network.edges.items():
            for second, costs in edges.items():
                if first < second:
                    self._flow(first, second, costs)
        self._fit()

    def _choose(self, costs: Vector) -> list[int]:
        found = [self.model.variable(float(cost), integer=True) for cost in costs]
        self.model.row(1, 1, [(variable, 1.0) for variable in found])
        return found

    def _flow(self, first: int, second: int, costs: Vector) -> None:
        costs = costs.copy()
        for matrix, node in ((costs, first), (costs.T, second)):  # views: each makes its own rows start at 0
            own = matrix.min(axis=1)
            matrix -= own[:, None]
            for variable, cost in zip(self.x[node], own, strict=True):
                self.model.costs[variable] += float(cost)
        between, of_first = np.unique(costs, axis=0, return_inverse=True)
        between, of_second = np.unique(between, axis=1, return_inverse=True)
        out: dict[int, list[Term]] = {p: [] for p in range(between.shape[0])}
        into: dict[int, list[Term]] = {q: [] for q in range(between.shape[1])}
        for terms, classes, node in ((out, of_first, first), (into, of_second, second)):
            for variable, where in zip(self.x[node], classes, strict=True):
                terms[int(where)].append((variable, -1.0))
        flow = {}
        for (p, q), cost in np.ndenumerate(between):
            if np.isfinite(cost):
                flow[p, q] = self.model.variable(float(cost))
                out[p].append((flow[p, q], 1.0))
                into[q].append((flow[p, q], 1.0))
        for terms_of_class in (*out.values(), *into.values()):
            self.model.row(0, 0, terms_of_class)
        self.flows.append((first, second, of_first, of_second, flow))

    def _fit(self) -> None:
        """One row per stretch of time in which no load changes, at the point of it with the least room."""
        loads = [(node, load) for node, held in self.network.loads.items() for load in held]
        cuts = sorted({load.start for _, load in loads} | {load.end for _, load in loads})
        for start, end in pairwise(cuts):
            terms = [
                (variable, float(usage))
                for node, load in loads
                if load.start <= start and end <= load.end
                for variable, usage in zip(self.x[node], load.usages, strict=True)
                if usage
            ]
            if terms:
                room = float(self.network.room[start:end].min())
                scale = max(usage for _, usage in terms)
                scaled = [(variable, usage / scale) for variable, usage in terms]
                self.model.row(float("-inf"), room / scale, scaled)

    def values(self, chosen: Chosen) -> tuple[float, ...]:
        """The values of all variables at an answer."""
        found = [0.0] * len(self.model.costs)
        for node, k in chosen.items():
            found[self.x[node][k]] = 1.0
        for first, second, of_first, of_second, flow in self.flows:
            found[flow[int(of_first[chosen[first]]), int(of_second[chosen[second]])]] = 1.0
        return tuple(found)

    def chosen(self, values: Sequence[float]) -> Chosen:
        """The strategies that the values choose most of."""
        return {
            node: max(range(len(variables)), key=[values[variable] for variable in variables].__getitem__)
            for node, variables in self.x.items()
        }


def solve_problem(
    problem: Problem,
    *,
    backend: Backend = "glop+scip",
    node_limit: int | None = None,
    time_limit_s: float | None = None,
    relative_gap: float = 1e-6,
) -> Result:
    """Reduces, relaxes, rounds and branches; the answer's cost is that of `problem.score`, not the solver's.

    Deterministic unless a time limit is given. `node_limit` bounds the branching.
    """
    start_s = time.process_time()
    network = Network(problem)
    network.reduce()
    program = Program(network)
    first = local_search(network)
    begun = [] if first is None else [program.values(first)]

    def rounding(values: Sequence[float]) -> tuple[float, ...] | None:
        better = local_search(network, program.chosen(values))
        if better is None:
            return None
        begun.append(program.values(better))
        return begun[-1]

    solution = solve(
        program.model,
        backend=backend,
        node_limit=node_limit,
        time_limit_s=time_limit_s,
        relative_gap=relative_gap,
        hint=begun[0] if begun else None,
        rounding=rounding,
    )
    answers = [solution.values, *begun] if solution.status in ("optimal", "feasible") else begun
    found = min(answers, key=program.model.cost_of, default=None)
    answer = () if found is None else network.answer(program.chosen(found))
    result = None if found is None else score(problem, answer)
    assert result is None or is_within_limit(problem, result), "an answer of ours overflows"
    heuristic = min(map(program.model.cost_of, begun), default=None)
    return Result(
        bound=solution.bound + network.constant,
        incumbent=result.cost if result else None,
        first_incumbent=None if heuristic is None else round(heuristic + network.constant),
        answer=answer,
        size=solution.size,
        cpu_s=time.process_time() - start_s,
    )
