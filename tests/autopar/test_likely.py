"""In which order the search looks at what is likely."""

from __future__ import annotations

import pytest

from autopar.plan import Parallelism
from autopar.search.likely import AT_FIRST, MISFIT, TRUST, Expected, Open
from autopar.search.space import Layout

LAYOUT = Layout(microbatch_size=1, tp=2, cp=1, ep=1, dp=2, pp=2, num_microbatches=8)
P = Parallelism(tp=2, pp=2, dp_replicate=2, num_microbatches=8)


def test_what_is_likely_to_take_least_comes_first_however_often_it_was_looked_at() -> None:
    expected = Expected()
    items = [Open(LAYOUT, (3.0,), False), Open(P, (1.0, 1.5, 2.0), False), Open(LAYOUT, (1.0,), False)]
    for tie, item in enumerate(items):
        expected.push(item, tie)
    order = []
    while (first := expected.first())[1]:
        order.append(expected.pop(first[1]))
    assert order == [items[2], items[1], items[0]]
    assert expected.first() == (float("inf"), 0)


def test_drafts_teach_how_far_off_the_mark_each_look_is() -> None:
    expected = Expected()
    expected.push(Open(LAYOUT, (5.0,), False), 0)
    expected.learn(Open(P, (4.0, 8.0, 8.0, 16.0), False), 16.0)
    assert expected.slower == pytest.approx([4.0**TRUST, 2.0**TRUST, 2.0**TRUST, 1.0])
    assert expected.first()[0] == pytest.approx(5.0 * 4.0**TRUST)

    expected.learn(Open(P, (8.0, 8.0, 8.0, 8.0), False), 16.0)  # the best draft counts
    assert expected.slower == pytest.approx([2.0**TRUST, 2.0**TRUST, 2.0**TRUST, 1.0])


def test_what_does_not_fit_makes_its_likes_less_likely_until_one_fits() -> None:
    expected = Expected()
    expected.learn_misfit()
    expected.learn_misfit()
    assert expected.slower == pytest.approx([MISFIT**2 * slower for slower in AT_FIRST])
    expected.learn(Open(P, (8.0, 8.0, 8.0, 8.0), False), 8.0)
    expected.learn_misfit()
    assert expected.slower == [1.0] * 4


def test_closer_looks_never_promise_more() -> None:
    item = Open(LAYOUT, (3.0,), True)
    assert item.closer(P, 2.0).likely_s == (3.0, 3.0)
    assert item.closer(P, 4.0).likely_s == (3.0, 4.0)


def test_ways_are_alike_that_have_the_same_degrees_and_schedule() -> None:
    item = Open(LAYOUT, (3.0,), True)
    assert item.alike == (2, 1, 1, True, None)
    assert item.closer(P, 4.0).alike == (2, 1, 1, True, "1F1B")
