from __future__ import annotations

import numpy as np
import pytest

from costmodel import SCHEDULES, events
from costmodel.events import ordered_steps, run_steps, work_times
from costmodel.orders import numbered_orders
from costmodel.phases import FORWARD, OVERLAPPING


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (3, 9), (8, 40)])
def test_every_step_comes_after_those_before_it(name: str, p: int, m: int) -> None:
    for v in {"GPipe": (1,), "1F1B": (1,), "ZBVZeroBubble": (2,), "DualPipeV": (2,)}.get(name, (1, 2, 4)):
        steps, orders = ordered_steps(name, p, m, v), numbered_orders(name, p, m, v)
        in_order = steps.in_order()
        assert len(set(in_order)) == orders.ranks.size
        assert (in_order % p == orders.ranks).all()
        assert (steps.works.ravel()[in_order] % (p * v) == orders.stages).all()
        assert (np.diff(in_order)[np.diff(orders.ranks) == 0] > 0).all()
        assert (steps.waits // p < np.arange(len(steps.waits))[:, None])[1:].all()
        assert (np.delete(steps.works, in_order) == steps.idle).all()
        assert (np.delete(steps.waits, in_order) == 0).all()
        assert (steps.works[0] == steps.idle).all()
        assert steps.works.itemsize <= 2


@pytest.mark.parametrize(("p", "m"), [(1, 2), (4, 8), (5, 23)])
def test_what_runs_at_once_leaves_at_once(p: int, m: int) -> None:
    steps, orders = ordered_steps("DualPipeV", p, m, 2), numbered_orders("DualPipeV", p, m, 2)
    waited_for = np.isin(steps.in_order(), steps.waits)
    is_pair = (orders.phases[:-1] == FORWARD) & (orders.phases[1:] == OVERLAPPING)
    assert is_pair.any()
    assert not waited_for[:-1][is_pair].any()
    assert waited_for[1:][is_pair].all()


def test_more_work_than_two_bytes_can_number_has_steps_too() -> None:
    steps = ordered_steps("LoopedBFS", 2, 1, 6_000)
    ranks = np.arange(12_000) % 2
    assert (steps.works[range(1, 12_001), ranks] == range(12_000)).all()
    assert (steps.works[range(12_001, 24_001), ranks[::-1]] == range(23_999, 11_999, -1)).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_many_ranks_end_as_they_do_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    v = {"GPipe": 1, "1F1B": 1}.get(name, 2)
    p = events.MANY_RANKS
    m, num_total = 3 * p, p * v
    forward_s, backward_s = rng.random(num_total), 1 + rng.random(num_total)
    weight_s, send_s = rng.random(num_total), rng.random(num_total - 1)
    stages = (each.tolist() for each in (forward_s, backward_s, send_s, weight_s))
    steps, times = ordered_steps(name, p, m, v), work_times(name, p, v, *stages)
    at_once_s = run_steps(steps, times)
    monkeypatch.setattr(events, "MANY_RANKS", p + 1)
    assert (run_steps(steps, times) == at_once_s).all()
