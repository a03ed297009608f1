from __future__ import annotations

import itertools
import random
import time

import pytest

from costmodel import (
    CostModelError,
    Timeline,
    closed_form_step_s,
    pipeline_lower_bound_s,
    rank_orders,
    simulate,
)

F, B = 1.0, 2.0
UNIFORM = [
    *((name, p, m, 1) for name in ("GPipe", "1F1B") for p in (1, 2, 4, 7) for m in (1, 3, 8, 20)),
    *(("Interleaved1F1B", p, p * k, v) for p in (2, 4, 7) for k in (1, 2, 5) for v in (1, 2, 4)),
]


def uniform(name: str, p: int, m: int, v: int) -> Timeline:
    return simulate(name, p, m, [F / v] * (p * v), [B / v] * (p * v), num_virtual=v)


@pytest.mark.parametrize(("name", "p", "m", "v"), UNIFORM)
def test_uniform_stages_take_the_closed_form(name: str, p: int, m: int, v: int) -> None:
    assert uniform(name, p, m, v).step_s == pytest.approx(closed_form_step_s(name, p, m, F, B, v))


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 1), (8, 32, 1), (4, 8, 2), (8, 32, 4)])
def test_the_bubble_is_the_megatron_papers(p: int, m: int, v: int) -> None:
    # arXiv:2104.04473, section 2.2: bubble time over ideal time is (p - 1) / (v m).
    timeline = uniform("Interleaved1F1B" if v > 1 else "1F1B", p, m, v)
    ideal_s = timeline.busy_s[0]
    assert (timeline.step_s - ideal_s) / ideal_s == pytest.approx((p - 1) / (v * m))


def test_two_stages_by_hand() -> None:
    # Each message takes half a second; rank 0 runs F0 F1 B0 B1, rank 1 F0 B0 F1 B1.
    timeline = simulate("1F1B", 2, 2, [1, 1], [2, 2], send_s=0.5)
    spent = {(e.stage, e.phase[0], e.microbatch): (e.start_s, e.end_s) for e in timeline.events}
    assert spent == {
        (0, "f", 0): (0, 1),
        (0, "f", 1): (1, 2),
        (1, "f", 0): (1.5, 2.5),
        (1, "b", 0): (2.5, 4.5),
        (1, "f", 1): (4.5, 5.5),
        (1, "b", 1): (5.5, 7.5),
        (0, "b", 0): (5, 7),
        (0, "b", 1): (8, 10),
    }
    assert timeline.step_s == 10
    assert timeline.finish_s == (10, 7.5)
    assert timeline.busy_s == (6, 6)


def random_case(rng: random.Random) -> tuple[str, int, int, list[float], list[float], list[float], int]:
    name = rng.choice(["GPipe", "1F1B", "Interleaved1F1B"])
    v = rng.choice([1, 2, 3]) if name == "Interleaved1F1B" else 1
    p = rng.randint(1, 5)
    m = p * rng.randint(1, 5) if name == "Interleaved1F1B" else rng.randint(1, 20)
    forward_s, backward_s = ([rng.uniform(0.1, 2) for _ in range(p * v)] for _ in range(2))
    return name, p, m, forward_s, backward_s, [rng.uniform(0, 1) for _ in range(p * v - 1)], v


@pytest.mark.parametrize("seed", range(30))
def test_events_respect_every_dependency_and_waste_nothing(seed: int) -> None:
    name, p, m, forward_s, backward_s, send_s, v = random_case(random.Random(seed))
    events = simulate(name, p, m, forward_s, backward_s, send_s, v).events
    end_s = {(e.phase, e.stage, e.microbatch): e.end_s for e in events}
    previous_s = dict.fromkeys(range(p), 0.0)
    for event in events:
        stage, m_ = event.stage, event.microbatch
        duration_s = (forward_s if event.phase == "forward" else backward_s)[stage]
        assert event.end_s - event.start_s == pytest.approx(duration_s)
        assert event.rank == stage % p
        waits = [previous_s[event.rank]]
        if event.phase == "forward" and stage:
            waits.append(end_s["forward", stage - 1, m_] + (send_s[stage - 1] if p > 1 else 0))
        if event.phase == "backward":
            waits.append(end_s["forward", stage, m_])
            if stage < p * v - 1:
                waits.append(end_s["backward", stage + 1, m_] + (send_s[stage] if p > 1 else 0))
        assert event.start_s == pytest.approx(max(waits))
        previous_s[event.rank] = event.end_s


@pytest.mark.parametrize("seed", range(30))
def test_no_step_is_shorter_than_the_lower_bound(seed: int) -> None:
    name, p, m, forward_s, backward_s, send_s, v = random_case(random.Random(seed))
    bound_s = pipeline_lower_bound_s(p, m, forward_s, backward_s, send_s, v)
    assert simulate(name, p, m, forward_s, backward_s, send_s, v).step_s >= bound_s - 1e-9


def test_the_lower_bound_is_tight() -> None:
    assert pipeline_lower_bound_s(4, 8, [F] * 4, [B] * 4) == closed_form_step_s("1F1B", 4, 8, F, B)
    one_microbatch_s = 4 * (F + B) + 6 * 0.5
    assert pipeline_lower_bound_s(4, 1, [F] * 4, [B] * 4, 0.5) == pytest.approx(one_microbatch_s)
    assert simulate("1F1B", 4, 1, [F] * 4, [B] * 4, 0.5).step_s == pytest.approx(one_microbatch_s)


def test_the_slowest_stage_sets_the_pace() -> None:
    steps_s = [simulate("1F1B", 4, m, [1, 1, 3, 1], [2, 2, 6, 2]).step_s for m in (40, 41, 42)]
    assert [b - a for a, b in itertools.pairwise(steps_s)] == pytest.approx([9, 9])


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_64_stages_and_512_microbatches_simulate_at_once(name: str) -> None:
    forward_s = [1.0 + stage % 3 for stage in range(64)]
    rank_orders.cache_clear()
    start_s = time.process_time()
    timeline = simulate(name, 64, 512, forward_s, forward_s, 0.1)
    assert time.process_time() - start_s < 2  # a quarter of this on one core of 2020
    assert len(timeline.events) == 2 * 64 * 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 2, [1.0], [1.0, 1.0]), "need 2 forward and backward times, got 1 and 2"),
        ((2, 2, [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]), "1 boundaries, got 2"),
        ((2, 2, [1.0, -1.0], [1.0, 1.0]), "negative"),
    ],
)
def test_wrong_times_are_refused(arguments: tuple[int, int, list[float], list[float]], message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        simulate("1F1B", *arguments)


def test_the_interleaved_closed_form_needs_whole_rounds() -> None:
    with pytest.raises(CostModelError, match="whole rounds of 4"):
        closed_form_step_s("Interleaved1F1B", 4, 10, F, B, 2)
