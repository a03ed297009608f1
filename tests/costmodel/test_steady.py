from __future__ import annotations

import random
from typing import Any

import pytest

from costmodel import SCHEDULES, latest_finish_s, rank_finish_s, simulate
from tests.costmodel.counting import num_calls


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spread", [0, 0.1, 1, 10])
@pytest.mark.parametrize("send_s", [0, 0.1, 3])
def test_finish_times_are_the_simulations(name: str, spread: float, send_s: float) -> None:
    rng = random.Random(f"{name}{spread}{send_s}")
    for _ in range(12):
        v = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(name, rng.choice([1, 2, 4]))
        p = rng.randint(1, 6)
        m = p * rng.randint(1, 12) if name.startswith("Interleaved") else rng.randint(1, 80)
        m = max(m, 2 * p) if name == "DualPipeV" else m
        forward_s = [1 + spread * rng.random() for _ in range(p * v)]
        backward_s = [2 + spread * rng.random() for _ in range(p * v)]
        weight_s = [(0.5 if spread == 0 else rng.random()) * whole for whole in backward_s]
        arguments = (name, p, m, forward_s, backward_s, send_s, v)
        options: dict[str, Any] = {"weight_s": weight_s, "blocking_sends": rng.random() < 0.3}
        if name == "DualPipeV":
            options["overlap_saving_s"] = rng.choice([0.0, 0.3])
        simulated = simulate(*arguments, **options)
        assert rank_finish_s(*arguments, **options) == pytest.approx(simulated.finish_s, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("send_s", [0, 0.1, 3])
def test_no_rank_ends_later_than_with_all_stages_like_the_slowest(name: str, send_s: float) -> None:
    rng = random.Random(f"{name}{send_s}")
    for _ in range(20):
        v = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(name, rng.choice([1, 2, 4]))
        p = rng.randint(1, 6)
        fewest = 2 if name == "DualPipeV" else 1
        m = rng.randint(1, 30) if name in ("GPipe", "1F1B") else p * rng.randint(fewest, 6)
        forward_s = [1 + rng.random() for _ in range(p * v)]
        backward_s = [2 + rng.random() for _ in range(p * v)]
        weight_s = [rng.random() * whole for whole in backward_s]
        sends_s = [send_s * rng.random() for _ in range(p * v - 1)]
        arguments = (name, p, m, forward_s, backward_s, sends_s, v)
        latest_s = latest_finish_s(*arguments, weight_s=weight_s)
        assert max(simulate(*arguments, weight_s=weight_s).finish_s) <= latest_s * (1 + 1e-9)
        alike = (name, p, m, forward_s[:1] * (p * v), backward_s[:1] * (p * v), 0.0, v)
        alike_s = simulate(*alike, weight_s=weight_s[:1] * (p * v)).step_s
        alike_latest_s = latest_finish_s(*alike, weight_s=weight_s[:1] * (p * v))
        assert alike_latest_s in (pytest.approx(alike_s), float("inf"))
        assert alike_latest_s < float("inf") or m < 2 * p


def test_broken_rounds_may_end_whenever() -> None:
    assert latest_finish_s("Interleaved1F1B", 4, 10, [1.0] * 8, [2.0] * 8, 0.0, 2) == float("inf")


@pytest.mark.parametrize("seed", range(40))
def test_1f1b_with_other_ends_and_messages_is_simulated_exactly(seed: int) -> None:
    # Embedding and head make the first and the last stage lighter or heavier: all bottlenecks occur.
    rng = random.Random(seed)
    p = rng.randint(2, 12)
    m = rng.randint(p, 9 * p)
    forward_s, backward_s = [1.0] * p, [2.0] * p
    for end in (0, -1):
        forward_s[end] += rng.choice([0, rng.uniform(-0.9, 0.3), rng.uniform(0, 3)])
        backward_s[end] += rng.choice([0, rng.uniform(-1.8, 0.6), rng.uniform(0, 3)])
    send_s = rng.choice([0.01, 0.1, 1.0])
    arguments = ("1F1B", p, m, forward_s, backward_s, send_s)
    assert rank_finish_s(*arguments) == pytest.approx(simulate(*arguments).finish_s, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_uniform_step_is_asked_without_simulating_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v = 1 if name in ("GPipe", "1F1B") else 2
    n = 64 * v
    arguments = (name, 64, 512, [1.0] * n, [2.0] * n, 0.0, v)
    simulated = simulate(*arguments, weight_s=[1.0] * n)
    for walk in ("ordered_steps", "run_steps", "one_f_one_b_finish_s"):
        monkeypatch.delattr(f"costmodel.steady.{walk}")
    assert rank_finish_s(*arguments, weight_s=[1.0] * n) == pytest.approx(simulated.finish_s)


def test_partial_rounds_of_the_interleaved_schedule() -> None:
    arguments = ("Interleaved1F1B", 4, 10, [1.0] * 8, [2.0] * 8, 0.0, 2)
    assert rank_finish_s(*arguments) == simulate(*arguments).finish_s


@pytest.mark.parametrize(("name", "v"), [("1F1B", 1), ("Interleaved1F1B", 2)])
def test_a_long_step_costs_no_more_to_ask_than_a_short_one(name: str, v: int) -> None:
    def asked(num_microbatches: int) -> int:
        forward_s = [1.0, 1.1, 1.2, 1.0] * v
        arguments = (name, 4, num_microbatches, forward_s, forward_s, 0.01, v)
        rank_finish_s(*arguments)
        return num_calls(lambda: rank_finish_s(*arguments))

    assert asked(40_000) < 2 * asked(80)
