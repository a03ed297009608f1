from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import pytest

from costmodel import (
    CostModelError,
    Event,
    Timeline,
    closed_form_step_s,
    simulate,
)
from costmodel.events import ordered_steps, overlap_saving_s, work_times
from costmodel.orders import numbered_orders, stage_ranks
from tests.costmodel.counting import num_calls

F, B = 1.0, 2.0
UNIFORM = [
    *((name, p, m, 1) for name in ("GPipe", "1F1B") for p in (1, 2, 4, 7) for m in (1, 3, 8, 20)),
    *(("Interleaved1F1B", p, p * k, v) for p in (2, 4, 7) for k in (1, 2, 5) for v in (1, 2, 4)),
    *(("LoopedBFS", p, m, v) for p in (1, 3, 4) for m in (4, 9) for v in (1, 2, 3)),
    *(("InterleavedZeroBubble", p, p * k, v) for p in (1, 3, 4) for k in (1, 2, 5) for v in (1, 2, 3)),
    *(("ZBVZeroBubble", p, m, 2) for p in (1, 2, 5) for m in (10, 11, 23)),
    *(("DualPipeV", p, m, 2) for p in (1, 2, 5) for m in (10, 11, 23)),
]
ALL_SCHEDULES = dict.fromkeys(name for name, *_ in UNIFORM)


def uniform(name: str, p: int, m: int, v: int, b: float = B, w: float = 0.0) -> Timeline:
    n = p * v
    return simulate(name, p, m, [F / v] * n, [b / v] * n, num_virtual=v, weight_s=[w / v] * n)


@pytest.mark.parametrize(("name", "p", "m", "v"), UNIFORM)
@pytest.mark.parametrize(("b", "w"), [(2.0, 1.0), (2.4, 0.9), (1.7, 1.3), (0.9, 0.2), (3.2, 3.0)])
def test_uniform_stages_take_the_closed_form(name: str, p: int, m: int, v: int, b: float, w: float) -> None:
    assert uniform(name, p, m, v, b, w).step_s == pytest.approx(closed_form_step_s(name, p, m, F, b, v, w))


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 1), (8, 32, 1), (4, 8, 2), (8, 32, 4)])
def test_the_bubble_is_the_megatron_papers(p: int, m: int, v: int) -> None:
    # arXiv:2104.04473, section 2.2: bubble time over ideal time is (p - 1) / (v m).
    timeline = uniform("Interleaved1F1B" if v > 1 else "1F1B", p, m, v)
    ideal_s = timeline.busy_s[0]
    assert (timeline.step_s - ideal_s) / ideal_s == pytest.approx((p - 1) / (v * m))


@pytest.mark.parametrize(("p", "m"), [(2, 6), (4, 8), (8, 32)])
@pytest.mark.parametrize(("b", "w"), [(2.0, 1.0), (2.2, 1.0), (2.2, 0.7)])
def test_zb_h1_has_the_papers_bubble(p: int, m: int, b: float, w: float) -> None:
    # arXiv:2401.10241, table 1: (p - 1)(T_F + T_B - T_W), T_B the input part.
    timeline = uniform("InterleavedZeroBubble", p, m, 1, b, w)
    assert timeline.step_s - timeline.busy_s[0] == pytest.approx((p - 1) * (F + (b - w) - w))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16), (8, 40)])
def test_zbv_has_no_bubble_when_its_three_parts_are_equal(p: int, m: int) -> None:
    # arXiv:2401.10241, section 6: a rank that has begun never waits.
    timeline = uniform("ZBVZeroBubble", p, m, 2, 2.0, 1.0)
    waits_s = [end - busy for end, busy in zip(timeline.finish_s, timeline.busy_s, strict=True)]
    assert waits_s == pytest.approx([rank * F / 2 for rank in range(p)])  # until its first forward


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 40)])
def test_dual_pipe_v_has_deepseeks_bubble(p: int, m: int) -> None:
    # github.com/deepseek-ai/DualPipe: (p - 1)(F&B + B - 3 W) on p ranks, F&B both in turn.
    equal = uniform("DualPipeV", p, m, 2, 2.0, 1.0)
    f, b, w = 0.5, 1.0, 0.5
    assert equal.step_s - equal.busy_s[0] == pytest.approx((p - 1) * ((f + b) + b - 3 * w))
    # The last rank parts its first pair, which pays where backwards are long.
    longer = uniform("DualPipeV", p, m, 2, 4.0, 2.0)
    f, b, w = 0.5, 2.0, 1.0
    assert longer.step_s - longer.busy_s[0] == pytest.approx((p - 1) * ((f + b) + b - 3 * w) - f)


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_no_order_deadlocks(name: str) -> None:
    rng = random.Random(name)
    for _ in range(40):
        p, v = rng.randint(1, 9), rng.randint(1, 4)
        v = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(name, v)
        m = rng.randint(1, 30)
        m = {"DualPipeV": m + 2 * p - 1, "Interleaved1F1B": m * p, "InterleavedZeroBubble": m * p}.get(
            name, m
        )
        timeline = uniform(name, p, m, v, w=1.0)
        assert timeline.busy_s == pytest.approx([m * (F + B)] * p)


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


class Case(NamedTuple):
    name: str
    p: int
    m: int
    forward_s: list[float]
    backward_s: list[float]
    send_s: list[float]
    v: int
    weight_s: list[float]

    def simulate(self) -> Timeline:
        return simulate(*self[:-1], weight_s=self.weight_s)


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    name = list(ALL_SCHEDULES)[seed % len(ALL_SCHEDULES)]
    v = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(name, rng.choice([1, 2, 3]))
    p = rng.randint(1, 5)
    m = 2 * p * rng.randint(1, 3)
    forward_s, backward_s = ([rng.uniform(0.1, 2) for _ in range(p * v)] for _ in range(2))
    weight_s = [rng.random() * whole for whole in backward_s]
    return Case(name, p, m, forward_s, backward_s, [rng.random() for _ in range(p * v - 1)], v, weight_s)


@pytest.mark.parametrize("seed", range(70))
def test_events_respect_every_dependency_and_waste_nothing(seed: int) -> None:
    case = random_case(seed)
    ranks = stage_ranks(case.name, case.p, case.v)
    last = case.p * case.v - 1
    durations_s = {
        "forward": case.forward_s,
        "backward": case.backward_s,
        "backward_input": [b - w for b, w in zip(case.backward_s, case.weight_s, strict=True)],
        "backward_weight": case.weight_s,
    }
    end_s: dict[tuple[str, int, int], float] = {}
    events = case.simulate().events
    for event in events:
        direction = "backward" if event.phase == "backward_input" else event.phase
        end_s[direction, event.stage, event.microbatch] = event.end_s

    def message_s(stage: int, other: int) -> float:
        return 0.0 if ranks[stage] == ranks[other] else case.send_s[min(stage, other)]

    def arrivals_s(event: Event) -> list[float]:
        stage, microbatch = event.stage, event.microbatch
        if event.phase == "backward_weight" or (event.phase == "forward" and stage == 0):
            return []
        if event.phase == "forward":
            return [end_s["forward", stage - 1, microbatch] + message_s(stage, stage - 1)]
        if stage == last:
            return [end_s["forward", stage, microbatch]]
        return [end_s["backward", stage + 1, microbatch] + message_s(stage, stage + 1)]

    for rank in range(case.p):
        free_s = 0.0
        own = [event for event in events if event.rank == rank]
        # What runs at once starts and ends at once: DualPipeV's pairs.
        for (start_s, stop_s), group in itertools.groupby(own, key=lambda e: (e.start_s, e.end_s)):
            together = list(group)
            assert all(ranks[event.stage] == rank for event in together)
            assert len(together) == 1 or case.name == "DualPipeV"
            duration_s = sum(durations_s[event.phase][event.stage] for event in together)
            assert stop_s - start_s == pytest.approx(duration_s)
            arrived_s = [at_s for event in together for at_s in arrivals_s(event)]
            assert start_s == pytest.approx(max(free_s, *arrived_s, 0.0))
            free_s = stop_s


@pytest.mark.parametrize("case", [
    case for case in map(random_case, range(70)) if case.name != "DualPipeV"  # whose chains pass two at once
])  # fmt: skip
def test_the_chain_to_the_end_of_a_rank_takes_as_long_as_the_rank(case: Case) -> None:
    timeline, ranks = case.simulate(), stage_ranks(case.name, case.p, case.v)
    compute_s = work_times(*case[:2], case.v, *case[3:6], case.weight_s).compute_s
    for rank in range(case.p):
        works = timeline.works_to_end(rank).tolist()
        stages = [work % len(ranks) for work in works]
        sent_s = [
            case.send_s[min(pair)] for pair in itertools.pairwise(stages) if ranks[pair[0]] != ranks[pair[1]]
        ]
        assert ranks[stages[0]] == rank
        assert sum(sent_s) + sum(compute_s[work] for work in works) == pytest.approx(timeline.finish_s[rank])


@pytest.mark.parametrize(("p", "m"), [(3, 3), (4, 40), (8, 21)])
def test_blocking_sends_expose_two_messages_a_microbatch(p: int, m: int) -> None:
    # Megatron-LM: send_forward_recv_backward and send_backward_recv_forward, around each forward and backward
    # but for the first and the last of the step.
    d = 0.1
    blocking = simulate("1F1B", p, m, [F] * p, [B] * p, d, blocking_sends=True)
    assert blocking.step_s == pytest.approx((m + p - 1) * (F + B + 2 * d) - 3 * d)


def test_blocking_two_stages_by_hand() -> None:
    # Rank 0: F0, send, F1, send and receive, B0, receive, B1. Rank 1 receives before each F, sends after B.
    timeline = simulate("1F1B", 2, 2, [1, 1], [2, 2], send_s=0.5, blocking_sends=True)
    ends_s = {(e.stage, e.phase[0], e.microbatch): e.end_s for e in timeline.events}
    assert ends_s == {
        (0, "f", 0): 1,
        (1, "f", 0): 2.5,
        (0, "f", 1): 2.5,
        (1, "b", 0): 4.5,
        (0, "b", 0): 7,
        (1, "f", 1): 6,
        (1, "b", 1): 8,
        (0, "b", 1): 10.5,
    }


def test_overlapping_hides_communication_but_not_compute() -> None:
    assert overlap_saving_s(1.0, 0.0, 2.0, 0.0) == 0
    assert overlap_saving_s(1.0, 0.5, 2.0, 0.5) == 1.0  # 4 seconds become the 3 of compute
    assert overlap_saving_s(1.0, 3.0, 2.0, 3.0) == 3.0  # 9 seconds become the 6 of communication
    p, m, saving_s = 4, 64, 0.25
    stages = ([F / 2] * 2 * p, [B / 2] * 2 * p)
    parts: dict[str, Any] = {"num_virtual": 2, "weight_s": [B / 4] * 2 * p}
    plain = simulate("DualPipeV", p, m, *stages, **parts)
    overlapped = simulate("DualPipeV", p, m, *stages, **parts, overlap_saving_s=saving_s)
    num_pairs = 2 * (m - 2 * p + 1) + p - 1  # of the first rank
    assert plain.busy_s[0] - overlapped.busy_s[0] == pytest.approx(num_pairs * saving_s)
    assert plain.step_s - overlapped.step_s == pytest.approx(num_pairs * saving_s, rel=0.1)


def test_the_slowest_stage_sets_the_pace() -> None:
    steps_s = [simulate("1F1B", 4, m, [1, 1, 3, 1], [2, 2, 6, 2]).step_s for m in (40, 41, 42)]
    assert [b - a for a, b in itertools.pairwise(steps_s)] == pytest.approx([9, 9])


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_64_stages_and_512_microbatches_are_simulated_many_at_once(name: str) -> None:
    forward_s = [1.0 + stage % 3 for stage in range(64)]
    numbered_orders.cache_clear()
    ordered_steps.cache_clear()
    found: list[Timeline] = []
    calls = num_calls(lambda: found.append(simulate(name, 64, 512, forward_s, forward_s, 0.1)))
    (timeline,) = found
    assert calls < len(timeline.events) / 4
    assert len(timeline.events) == 2 * 64 * 512


def test_times_that_make_no_sense_are_refused() -> None:
    stages = ([1.0] * 4, [2.0] * 4)
    with pytest.raises(CostModelError, match="ZBVZeroBubble splits backwards; pass weight_s"):
        simulate("ZBVZeroBubble", 2, 4, *stages, num_virtual=2)
    with pytest.raises(CostModelError, match="stage 1's backward takes 3 s of its 2 s"):
        simulate("ZBVZeroBubble", 2, 4, *stages, num_virtual=2, weight_s=[1, 3, 1, 1])
    with pytest.raises(CostModelError, match="4 virtual stages need as many weight times, got 1"):
        simulate("ZBVZeroBubble", 2, 4, *stages, num_virtual=2, weight_s=[1])
    with pytest.raises(CostModelError, match="saves at most the shorter one's 1 s, got 3"):
        simulate("DualPipeV", 2, 4, *stages, num_virtual=2, weight_s=[1] * 4, overlap_saving_s=3)


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


@pytest.mark.parametrize(
    ("name", "m", "message"),
    [
        ("Interleaved1F1B", 10, "whole rounds of 4 microbatches, got 10"),
        ("ZBVZeroBubble", 7, "8 or more microbatches, got 7"),
        ("LoopedBFS", 3, "4 or more microbatches, got 3"),
    ],
)
def test_closed_forms_have_their_limits(name: str, m: int, message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        closed_form_step_s(name, 4, m, F, B, 2)
