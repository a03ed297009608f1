"""The floor of one unit against the operator program of the whole axis in which only that unit costs."""

from __future__ import annotations

from functools import cache

import pytest

import graphs
from autopar.search.block_floor import BlockFloor, Trade, kept_relaxations
from autopar.search.block_ilp import BlockIlp, Part
from autopar.search.programs import Programs
from autopar.search.solver import solve
from autopar.search.space import parallelism
from autopar.search.units import Stretch, stretches
from tests.autopar.small_models import cluster
from tests.models import case

LOOKS = ((None, False), (None, True), (1e-11, False), (1e-10, True))
"""Seconds a kept byte, from where all is kept to where most is made again, and whether something hides what
is communicated."""


@cache
def axis(name: str, tp: int) -> tuple[BlockIlp, list[Stretch]]:
    """The operator program of a model on a tensor axis, and where its units are."""
    programs = Programs(graphs.capture(case(name).build(), case(name).inputs, name=name), cluster())
    key = programs.key(parallelism(microbatch_size=2, tp=tp, dp_replicate=2), 0)
    replica = programs.replica_of(key)
    return programs.ilp(key), [*stretches(replica.whole, replica.local.graph)]


def again_of(ilp: BlockIlp, start: int, stop: int) -> dict[int, float]:
    """Seconds in which every other op runs again, as far as that matters here."""
    problem = ilp.problem
    ops = {problem.graph.representative[index] for index in range(start, stop)}
    return {op: 0.3 * problem.computed_s[op] / problem.instances[op] for op in sorted(ops)[::2]}


def whole_s(
    ilp: BlockIlp, start: int, stop: int, price: float | None, again_s: dict[int, float], *, hides: bool
) -> float:
    """The relaxation with all rows, and costs where `[start, stop)` computes, converts or keeps something."""
    problem, graph = ilp.problem, ilp.problem.graph
    ops = {graph.representative[index] for index in range(start, stop)}
    read = {name for op in graph.ops[start:stop] for name in op.inputs}
    made = {name for op in graph.ops[start:stop] for name in op.outputs}

    def is_own(part: Part) -> bool:
        if part.tensors is None:
            return part.op in ops
        return part.op in ops and bool({*part.tensors.members} & (made if part.is_made else read))

    costs = [0.0] * len(ilp.model.costs)
    for variable, part in ilp.parts.items():
        if is_own(part):
            time_s = ilp.op_computed_s.get(variable, 0.0) if hides else ilp.model.costs[variable]
            costs[variable] = time_s / part.num_instances
            if price is not None and part.tensors is None:
                costs[variable] += min(price * part.result_bytes, again_s.get(part.op, 0.0))
            elif price is not None and part.tensors is not None:
                moved_s = problem.conversion_again_s(part.tensors.name, *part.states)
                costs[variable] += min(price * part.result_bytes, moved_s)
    return solve(ilp.model.priced(costs, relaxed=True)).bound


@pytest.mark.parametrize(("name", "tp"), [("llama", 4), ("mixtral", 2)])
def test_rows_in_which_a_unit_has_no_cost_do_not_matter(name: str, tp: int) -> None:
    """Nor does what the relaxations that units share were asked before."""
    (ilp, units), relaxation_of = axis(name, tp), kept_relaxations()
    for start, stop, _ in (*units, *reversed(units)):
        floor, again_s = BlockFloor(ilp, start, stop, relaxation_of), again_of(ilp, start, stop)
        for price, hides in LOOKS:
            found_s = floor.least_s(None if price is None else Trade(price, again_s), hides=hides)
            true_s = whole_s(ilp, start, stop, price, again_s, hides=hides)
            assert found_s == pytest.approx(true_s), (start, stop, price, hides)
            assert found_s >= floor.computed_s * (1 - 1e-9)


def test_floors_add_up_to_no_more_than_the_whole_program() -> None:
    ilp, units = axis("llama", 4)
    floors_s = sum(BlockFloor(ilp, start, stop).least_s() for start, stop, _ in units)
    assert 0.5 * ilp.solve(1 << 30).time_s < floors_s <= ilp.solve(1 << 30).time_s * (1 + 1e-9)
