"""The floor of one unit against the operator program of the whole axis in which only that unit costs."""

from __future__ import annotations

from functools import cache

import pytest

import graphs
from autopar.search.block_floor import BlockFloor, RunAgain, kept_relaxations
from autopar.search.block_ilp import BlockIlp, Part
from autopar.search.programs import Programs
from autopar.search.solver import solve
from autopar.search.space import parallelism
from autopar.search.units import Stretch, stretches
from tests.autopar.small_models import cluster
from tests.models import case

LOOKS = ((None, None), (None, 1.0), (None, 0.75), (1e-11, None), (1e-11, 0.75), (1e-10, 1.0))
"""Seconds a kept byte, from where all is kept to where most is made again, and where something hides what is
communicated, how much arithmetic counts beside whole backwards."""


@cache
def axis(name: str, tp: int) -> tuple[BlockIlp, list[Stretch]]:
    """The operator program of a model on a tensor axis, and where its units are."""
    programs = Programs(graphs.capture(case(name).build(), case(name).inputs, name=name), cluster())
    key = programs.key(parallelism(microbatch_size=2, tp=tp, dp_replicate=2), 0)
    replica = programs.replica_of(key)
    return programs.ilp(key), [*stretches(replica.whole, replica.local.graph)]


def again_of(ilp: BlockIlp, start: int, stop: int) -> RunAgain:
    """Of three ops one always runs again, and one unless it is kept, as far as that matters here."""
    ops = sorted({ilp.problem.graph.representative[index] for index in range(start, stop)})
    return RunAgain(frozenset(ops[::3]), frozenset(ops[1::3]))


def least_s(floor: BlockFloor, price: float | None, again: RunAgain, arithmetic: float | None) -> float:
    return floor.least_s(arithmetic) if price is None else floor.traded(price, again, arithmetic).seconds


def whole_s(
    ilp: BlockIlp, start: int, stop: int, price: float | None, again: RunAgain, arithmetic: float | None
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
            time_s, number = ilp.model.costs[variable], part.num_instances
            if part.tensors is None:
                backward_s = ilp.op_costs[variable].total_s - ilp.op_costs[variable].forward_total_s
            else:
                backward_s = time_s - number * problem.conversion_again_s(part.tensors.name, *part.states)
            forward_s = (time_s - backward_s) / number
            if arithmetic is not None:
                computed_s = 0.0 if part.tensors else ilp.op_costs[variable].computed_s
                time_s = arithmetic * computed_s + (1 - arithmetic) * backward_s
            costs[variable] = time_s / number
            if price is not None and part.op in (again.all if part.tensors else again.results):
                costs[variable] += min(price * part.result_bytes, forward_s)
            elif price is not None and part.op in again.always:
                costs[variable] += forward_s
    return solve(ilp.model.priced(costs, relaxed=True)).bound


@pytest.mark.parametrize(("name", "tp"), [("llama", 4), ("mixtral", 2)])
def test_rows_in_which_a_unit_has_no_cost_do_not_matter(name: str, tp: int) -> None:
    """Nor does what the relaxations that units share were asked before."""
    (ilp, units), relaxation_of = axis(name, tp), kept_relaxations()
    for start, stop, _ in (*units, *reversed(units)):
        floor, again = BlockFloor(ilp, start, stop, relaxation_of), again_of(ilp, start, stop)
        for price, arithmetic in LOOKS:
            found_s = least_s(floor, price, again, arithmetic)
            true_s = whole_s(ilp, start, stop, price, again, arithmetic)
            assert found_s == pytest.approx(true_s), (start, stop, price, arithmetic)


def test_a_traded_line_is_reached_where_it_says() -> None:
    """What another price costs at least with what is kept there is no less than its own line."""
    ilp, units = axis("llama", 4)
    start, stop = next((start, stop) for start, stop, block in units if block)
    floor, again = BlockFloor(ilp, start, stop), again_of(ilp, start, stop)
    prices = (1e-13, 1e-12, 1e-11, 1e-10)
    reached = [floor.traded(price, again) for price in prices]
    kept = [traded.num_bytes for traded in reached]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1], "memory that is dear is kept less"
    for price, traded in zip(prices, reached, strict=True):
        for other, there in zip(prices, reached, strict=True):
            assert traded.seconds <= there.seconds + (price - other) * there.num_bytes + 1e-12


def test_floors_add_up_to_no_more_than_the_whole_program() -> None:
    ilp, units = axis("llama", 4)
    floors_s = sum(BlockFloor(ilp, start, stop).least_s() for start, stop, _ in units)
    assert 0.5 * ilp.solve(1 << 30).time_s < floors_s <= ilp.solve(1 << 30).time_s * (1 + 1e-9)
