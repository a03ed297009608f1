"""When the search looks at smaller programs of a way, leaves them, and comes back to them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from autopar.plan import Parallelism
from autopar.search.nodes import SmallerNode, WayNode
from autopar.search.other_programs import LOOKS, OtherPrograms, looks_at
from autopar.search.outcome import Outcome
from autopar.search.programs import MEMORY_PRICES
from autopar.search.staging import Draft

P = Parallelism(tp=2)
ENOUGH_S = 9.0
ALL_LOOKS = len(looks_at(P))


class FakePlanner:
    """Every relaxation is cut into stages that take `bound_s`, or into none; no two programs blend."""

    def __init__(self, bound_s: float | None) -> None:
        draft = None if bound_s is None else Draft((0,), bound_s)
        self.layer = SimpleNamespace(draft=lambda program, p: draft)
        self.programs = SimpleNamespace(
            least=SimpleNamespace(relaxed=lambda p, trades, mixed: None),
            program=lambda p, price: f"at {price}",
        )
        self.mixer = SimpleNamespace(blends=lambda p: ())


def others(bound_s: float | None = 8.0) -> OtherPrograms:
    return OtherPrograms(cast(Any, FakePlanner(bound_s)), Outcome())


def looked_at(found: OtherPrograms, floor_s: float, node: SmallerNode) -> list[tuple[float, Any]]:
    return list(found.closer(floor_s, node, ENOUGH_S))


def test_relaxations_raise_the_floor_first() -> None:
    node = SmallerNode(P, 1, fastest_s=10.0)
    assert looked_at(others(), 7.0, node) == [(8.0, node._replace(rigour=1))]
    assert looked_at(others(), 8.5, node) == [(8.5, node._replace(rigour=1))]


def test_ways_are_bounded_as_their_stages_are_cut_and_as_their_schedule_hides() -> None:
    """Quickly first; by chains of work only where stages are several on a rank."""
    interleaved = Parallelism(tp=2, pp=2, num_virtual_stages=2, schedule="Interleaved1F1B")
    hiding = Parallelism(tp=2, pp=2, num_virtual_stages=2, schedule="DualPipeV")
    assert looks_at(interleaved) == LOOKS
    for p in (P, interleaved, hiding):
        looks = looks_at(p)
        assert not looks[0].trades
        assert all(look.trades for look in looks[1:])
        assert any(look.is_tight for look in looks) == (p is not P)
        assert {look.is_mixed for look in looks} == ({False, True} if p is hiding else {False})


def test_a_way_whose_relaxation_does_not_fit_has_no_program_unless_one_was_found() -> None:
    for fastest_s, decided in ((float("inf"), 1), (10.0, 0)):
        found = others(bound_s=None)
        assert not looked_at(found, 7.0, SmallerNode(P, 1, fastest_s))
        assert found.outcome.num_decided == decided


def test_a_smaller_program_is_made_where_it_may_be_faster() -> None:
    found = others()
    found.note(P, 0, 10.0)
    [(floor_s, made)] = looked_at(found, 8.0, SmallerNode(P, 1, 10.0, ALL_LOOKS))
    assert floor_s == 8.0
    assert made == WayNode(P, cast(Any, "at 1"), is_close=True)


def test_what_was_left_comes_back_once_the_fastest_program_disappoints() -> None:
    found, node = others(), SmallerNode(P, 1, 8.0, ALL_LOOKS)
    found.note(P, 0, 8.0)
    assert not looked_at(found, 8.0, node)  # the draft takes no longer than any program must
    assert found.outcome.floor_s == 8.0

    assert not list(found.reopened(P, 0.01))
    found.note(P, 0, 8.05)
    assert not list(found.reopened(P, 0.01))
    found.note(P, 0, 8.5)  # solved, it takes longer than that
    assert list(found.reopened(P, 0.01)) == [(8.0, node._replace(fastest_s=8.5))]
    assert not list(found.reopened(P, 0.01))


def test_the_best_program_for_all_blocks_counts() -> None:
    found = others()
    found.note(P, 0, 8.0)
    assert not looked_at(found, 8.0, SmallerNode(P, 1, 8.0, ALL_LOOKS))
    found.note(P, 0, 9.0)
    found.note(P, 1, 8.01)
    assert not list(found.reopened(P, 0.01))


@pytest.mark.parametrize("floor_s", [7.0, 8.0])
def test_after_the_smallest_program_the_floor_is_what_no_program_beats(floor_s: float) -> None:
    found = others()
    assert not looked_at(found, floor_s, SmallerNode(P, len(MEMORY_PRICES), 10.0, ALL_LOOKS))
    assert found.outcome.floor_s == floor_s
