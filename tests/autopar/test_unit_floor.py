"""What units take at least, and keep, against the units of programs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple, cast

import pytest

import graphs
from autopar.pricing import OpCost
from autopar.search.block_floor import BlockFloor, Fastest
from autopar.search.programs import MEMORY_PRICES, Programs
from autopar.search.relaxed import relaxed
from autopar.search.saved import Saved
from autopar.search.space import parallelism
from autopar.search.unit_floor import MIXED, UnitFloor
from autopar.search.units import Chain, Unit
from costmodel import software
from costmodel.events import overlap_saving_s
from tests.autopar.small_models import cluster, tower
from tests.models import case

ROUNDING = 1e-9
MODELS = (("llama", "torch-eager"), ("llama", "te-2024"), ("tower", "compiled-2024"), ("mixtral", "te-2026"))
CASES = [
    (name, era, tp, cp)
    for name, era in (
        ("llama", "torch-eager"),
        ("llama", "te-2024"),
        ("tower", "compiled-2024"),
        ("mixtral", "te-2026"),
    )
    for tp, cp in ((2, 1), (4, 1), (2, 2))
    if cp == 1 or name == "llama"
]


@cache
def programs_of(name: str, era: str) -> Programs:
    if name == "tower":
        return Programs(tower(), cluster(), software(era))
    return Programs(
        graphs.capture(case(name).build(), case(name).inputs, name=name), cluster(), software(era)
    )


def floored(name: str, era: str, tp: int, cp: int) -> Iterator[tuple[UnitFloor, Unit]]:
    """The blocks of every program of a layout, each with its floor."""
    programs = programs_of(name, era)
    p = parallelism(microbatch_size=2, tp=tp, cp=cp, num_microbatches=4)
    floors = programs.least._floors_of(programs.key(p, 0)._replace(num_microbatches=1))
    made = [*(programs.program(p, level) for level in range(len(MEMORY_PRICES))), programs.given(p)]
    for program in made:
        for floor, unit in zip(floors, program.chain.units, strict=True):
            if floor is not None and unit.is_block:
                yield floor, unit


def hidden_s(unit: Unit, arithmetic: float) -> float:
    """A mixture of what a unit computes and of its whole backward."""
    cost = unit.cost
    backward_s = cost.total_s - cost.forward_total_s
    return arithmetic * cost.computed_s + (1 - arithmetic) * backward_s


@pytest.mark.parametrize(("name", "era", "tp", "cp"), CASES)
def test_no_unit_is_below_the_lines(name: str, era: str, tp: int, cp: int) -> None:
    """Whichever of its results it keeps."""
    number = 0
    for floor, unit in floored(name, era, tp, cp):
        prices = [line.price for line in floor.lines(None).lines if line.price]
        assert prices
        for choice, again_s in unit.recompute_s.items():
            if choice in ("attention", "alternate"):
                continue  # of which the search makes no use
            kept_bytes = unit.saved[choice].num_bytes
            for found, alone_s in (
                (floor.lines(None), unit.cost.total_s),
                (floor.lines(1.0), hidden_s(unit, 1.0)),
                (floor.lines(MIXED), hidden_s(unit, MIXED)),
            ):
                seconds = (alone_s + again_s) * (1 + ROUNDING)
                assert found.seconds <= alone_s * (1 + ROUNDING)
                assert all(line.seconds_at(kept_bytes) <= seconds for line in found.lines), choice
                number += 1
            if choice != "none":
                for price in prices:
                    for arithmetic in (None, 1.0, MIXED):
                        paid_s = unit.cost.total_s if arithmetic is None else hidden_s(unit, arithmetic)
                        least_s = floor.reached(price, arithmetic).line.seconds
                        whole_s = paid_s + again_s + price * kept_bytes
                        assert least_s <= whole_s * (1 + ROUNDING), (choice, price, arithmetic)
    assert number


def is_product(target: str) -> bool:
    return any(kind in target for kind in ("linear", "mm", "attention"))


@pytest.mark.parametrize(("name", "era", "tp", "cp"), CASES)
def test_what_runs_again_is_told_by_name(name: str, era: str, tp: int, cp: int) -> None:
    """Other ops stand between those of one device where a context axis gathers."""
    for floor, _ in floored(name, era, tp, cp):
        graph, again = floor.ops.problem.graph, floor.again
        always, kept = ({graph.ops[index].target for index in ops} for ops in again)
        assert any(is_product(target) for target in kept)
        assert always
        assert not any(is_product(target) for target in always)
        assert not again.results & again.always
        if cp > 1:
            assert len(floor.names) < floor.ops.stop - floor.ops.start


class OneStrategy(NamedTuple):
    """The ops of a unit that has no choice."""

    fastest: Fastest

    def computed_s(self, forward_part: float = 1.0) -> float:
        return forward_part * self.fastest.cost.forward_s + self.fastest.cost.backward_s

    def least_s(self, arithmetic: float | None = None) -> float:
        cost = self.fastest.cost
        if arithmetic is None:
            return cost.total_s
        backward_s = cost.total_s - cost.forward_total_s
        return arithmetic * cost.computed_s + (1 - arithmetic) * backward_s


def pair_s(one: OpCost, other: OpCost) -> float:
    """What a forward of one unit takes beside a backward of another."""
    forward = one.forward_s, one.forward_communication_s
    backward = other.backward_s, other.backward_communication_s
    return sum(forward) + sum(backward) - overlap_saving_s(*forward, *backward)


@pytest.mark.parametrize("arithmetic", [1.0, MIXED])
@pytest.mark.parametrize("seed", range(100))
def test_a_pair_of_passes_is_no_longer_than_that_of_the_only_strategy(seed: int, arithmetic: float) -> None:
    """Nor is any pass by itself, nor a pair of unlike units."""
    rng, era = random.Random(seed), software("torch-eager")
    costs, floors = [], []
    for _ in range(2):
        forward_s, backward_s, there_s, back_s = (rng.choice((0.0, rng.uniform(0, 4))) for _ in range(4))
        cost = OpCost(forward_s, backward_s, there_s, back_s, weight_s=backward_s / 2)
        saved = {mode: Saved({}, 0) for mode in ("none", "full")}
        unit = Unit("", (), True, saved, (), 0, recompute_s={"none": 0.0})
        floor = UnitFloor(cast(BlockFloor, OneStrategy(Fastest(cost.total_s, cost))), unit, (), 1)
        chain = relaxed(Chain((unit,), {}, era), 1, 1, [floor], arithmetic=arithmetic)
        costs.append(cost)
        floors.append(chain.units[0].cost)
    for (one, least), (other, beside) in product(zip(costs, floors, strict=True), repeat=2):
        assert least.forward_total_s <= one.forward_total_s + ROUNDING
        assert least.total_s <= one.total_s + ROUNDING
        assert pair_s(least, beside) <= pair_s(one, other) + ROUNDING
