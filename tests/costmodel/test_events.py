from __future__ import annotations

import numpy as np
import pytest

from costmodel import SCHEDULES
from costmodel.events import ordered_steps
from costmodel.orders import numbered_orders
from costmodel.phases import FORWARD, OVERLAPPING


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (3, 9), (8, 40)])
def test_every_step_comes_after_those_before_it(name: str, p: int, m: int) -> None:
    for v in {"GPipe": (1,), "1F1B": (1,), "ZBVZeroBubble": (2,), "DualPipeV": (2,)}.get(name, (1, 2, 4)):
        steps, orders = ordered_steps(name, p, m, v), numbered_orders(name, p, m, v)
        in_order = steps.in_order()
        assert sorted(in_order) == list(range(orders.ranks.size))
        assert (np.asarray(steps.ranks)[in_order] == orders.ranks).all()
        assert (np.asarray(steps.works)[in_order] % (p * v) == orders.stages).all()
        assert (np.diff(in_order)[np.diff(orders.ranks) == 0] > 0).all()
        assert all(wait < position for position, (_, _, wait) in enumerate(steps))
        assert list(steps) == list(steps)  # they are gone through more than once
        assert steps.works.itemsize == steps.ranks.itemsize == 2


@pytest.mark.parametrize(("p", "m"), [(1, 2), (4, 8), (5, 23)])
def test_what_runs_at_once_leaves_at_once(p: int, m: int) -> None:
    steps, orders = ordered_steps("DualPipeV", p, m, 2), numbered_orders("DualPipeV", p, m, 2)
    waited_for = np.isin(steps.in_order(), steps.waits)
    is_pair = (orders.phases[:-1] == FORWARD) & (orders.phases[1:] == OVERLAPPING)
    assert is_pair.any()
    assert not waited_for[:-1][is_pair].any()
    assert waited_for[1:][is_pair].all()


def test_more_stages_than_two_bytes_can_number_have_steps_too() -> None:
    steps = ordered_steps("LoopedBFS", 66_000, 1, 1)
    assert list(steps.ranks) == [*range(66_000), *reversed(range(66_000))]
    assert list(steps.works) == [*range(66_000), *reversed(range(66_000, 132_000))]
    assert list(steps.waits) == list(range(-1, 131_999))
