"""Problems of one form share their rows, and are what they are alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

import graphs
from autopar.search.axis_form import FREE, NO_MOVE, PAID, FormedProblem
from autopar.search.block_ilp import BlockIlp, MemoryPrice
from autopar.search.block_rows import rows_of
from autopar.search.programs import Programs
from autopar.search.space import parallelism
from autopar.strategies import Offers, natural_sections, strategies
from graphs import Capture
from tests.autopar.small_models import cluster
from tests.autopar.tiny_models import tiny
from tests.models import case

BATCHES = (3, 5, 6, 10)
NAMES = ("mlp", "resnet", "gpt2", "llama", "mixtral", "experts")


@cache
def captured(name: str) -> Capture:
    if name == "experts":
        return tiny("experts", 64, 7, 64)
    return graphs.capture(case(name).build(), case(name).inputs, name=name)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    rows_of.cache_clear()
    yield
    rows_of.cache_clear()


def ilp(programs: Programs, batch: int, size: int) -> BlockIlp:
    return programs.ilp(programs.key(parallelism(microbatch_size=batch, tp=size, dp_replicate=2), 0))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_problem_is_the_same_alone_and_after_others(name: str, size: int) -> None:
    programs, price = Programs(captured(name), cluster(8)), MemoryPrice(1e-13, 1e-12)
    after_others = [ilp(programs, batch, size) for batch in BATCHES]
    for batch, found in zip(BATCHES, after_others, strict=True):
        rows_of.cache_clear()
        alone = ilp(Programs(captured(name), cluster(8)), batch, size)
        assert found.model == alone.model
        assert list(found.parts.items()) == list(alone.parts.items())
        assert found.solve(4, price) == alone.solve(4, price)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_sizes_that_differ_in_prices_alone_share_rows(name: str) -> None:
    programs = Programs(captured(name), cluster(8))
    small, large = (ilp(programs, batch, 2) for batch in (6, 10))
    assert small.model.constraints is large.model.constraints
    assert small.model.costs != large.model.costs


def test_a_size_that_does_not_divide_has_rows_of_its_own() -> None:
    programs = Programs(captured("llama"), cluster(8))
    one, other = (ilp(programs, 4, size) for size in (2, 3))
    assert one.problem.offered.keys() == other.problem.offered.keys()
    assert one.model.size.rows != other.model.size.rows


@pytest.mark.parametrize("name", NAMES)
def test_a_form_says_which_moves_there_are_and_which_cost(name: str) -> None:
    problem = ilp(Programs(captured(name), cluster(8)), 4, 2).problem
    formed = FormedProblem(problem)
    kinds = set()
    for tensors, carried, moves_s in zip(
        problem.tensor_classes, formed.form.tensors, formed.moves_s, strict=True
    ):
        pairs = ((p, q) for p in carried.given for q in carried.wanted)
        for (p, q), kind, seconds in zip(pairs, carried.moves, moves_s, strict=True):
            assert seconds == problem.conversion_s(tensors.name, formed.states[p], formed.states[q])
            assert kind == (NO_MOVE if seconds is None else PAID if seconds > 0 else FREE)
            kinds.add(kind)
    assert kinds == {NO_MOVE, FREE, PAID}


@pytest.mark.parametrize("name", NAMES)
def test_ops_that_do_the_same_are_offered_what_each_would_be_alone(name: str) -> None:
    graph = captured(name).at(4)
    sections = natural_sections(graph, 2)
    offers = Offers(graph, 2, sections)
    assert all(offers.of(op) == strategies(op, graph, 2, sections) for op in graph.ops)
