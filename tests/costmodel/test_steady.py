from __future__ import annotations

import random
import time

import pytest

from costmodel import rank_finish_s, simulate


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize("spread", [0, 0.1, 1, 10])
@pytest.mark.parametrize("send_s", [0, 0.1, 3])
def test_finish_times_are_the_simulations(name: str, spread: float, send_s: float) -> None:
    rng = random.Random(f"{name}{spread}{send_s}")
    for _ in range(15):
        v = rng.choice([1, 2, 4]) if name == "Interleaved1F1B" else 1
        p = rng.randint(1, 6)
        m = p * rng.randint(1, 12) if v > 1 else rng.randint(1, 80)
        if name == "Interleaved1F1B" and m % max(1, m // p):
            continue
        forward_s = [1 + spread * rng.random() for _ in range(p * v)]
        backward_s = [2 + spread * rng.random() for _ in range(p * v)]
        arguments = (name, p, m, forward_s, backward_s, send_s, v)
        assert rank_finish_s(*arguments) == pytest.approx(simulate(*arguments).finish_s, rel=1e-9)


def test_partial_rounds_of_the_interleaved_schedule() -> None:
    arguments = ("Interleaved1F1B", 4, 10, [1.0] * 8, [2.0] * 8, 0.0, 2)
    assert rank_finish_s(*arguments) == simulate(*arguments).finish_s


def test_a_long_step_costs_no_more_to_ask_than_a_short_one() -> None:
    def asked_s(num_microbatches: int) -> float:
        forward_s = [1.0, 1.1, 1.2, 1.0]
        rank_finish_s("1F1B", 4, num_microbatches, forward_s, forward_s, 0.01)
        start_s = time.process_time()
        rank_finish_s("1F1B", 4, num_microbatches, forward_s, forward_s, 0.01)
        return time.process_time() - start_s

    assert asked_s(40_000) < 20 * asked_s(80)  # 500 times the microbatches
