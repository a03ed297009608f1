from __future__ import annotations

import random
import time

import pytest

from costmodel import TERMS, CostModelError, Overlap, StageWork, closed_form_step_s, simulate, step_cost


def test_one_rank_does_its_work_one_microbatch_after_the_other() -> None:
    stage = StageWork(
        forward_s=1,
        backward_s=2,
        recompute_s=1,
        forward_communication_s=0.25,
        optimizer_s=5,
        gradient_sync_s=1,
    )
    cost = step_cost([stage], 8)
    assert cost.terms == {
        "compute": 24,
        "recompute": 8,
        "tensor_parallel": 2,
        "parameter_gather": 0,
        "send_recv": 0,
        "pipeline_bubble": 0,
        "gradient_sync": 1,  # one unit: nothing to hide it behind
        "optimizer": 5,
    }
    assert cost.total_s == 40


def test_a_uniform_pipelines_bubble_is_the_ramp() -> None:
    cost = step_cost([StageWork(1, 2)] * 4, 8, "1F1B")
    assert cost.total_s == closed_form_step_s("1F1B", 4, 8, 1, 2)
    assert cost.terms["compute"] == 24
    assert cost.terms["pipeline_bubble"] == 9
    assert cost.bottleneck_rank == 0


@pytest.mark.parametrize(
    ("sync_s", "overlap", "num_units", "exposed_s"),
    [
        (1.0, 1.0, 10, 0.1),  # fits behind the 2 s of backward, but for its last bucket
        (5.0, 1.0, 10, 3.0),
        (5.0, 0.5, 10, 4.0),
        (5.0, 0.0, 10, 5.0),
        (0.0, 1.0, 10, 0.0),
    ],
)
def test_gradients_hide_behind_the_last_backward(
    sync_s: float, overlap: float, num_units: int, exposed_s: float
) -> None:
    stage = StageWork(1, 2, gradient_sync_s=sync_s, num_units=num_units)
    cost = step_cost([stage], 4, overlap=Overlap(gradient_sync=overlap))
    assert cost.terms["gradient_sync"] == pytest.approx(exposed_s)


def test_gathers_hide_behind_each_microbatch() -> None:
    stage = StageWork(1, 2, forward_gather_s=1.5, backward_gather_s=1.5, num_units=15)
    # 1.5 behind a forward of 1 leaves half, behind a backward of 2 only the first unit.
    assert step_cost([stage], 4).terms["parameter_gather"] == pytest.approx(4 * (0.5 + 0.1))
    exposed = step_cost([stage], 4, overlap=Overlap(parameter_gather=0))
    assert exposed.terms["parameter_gather"] == pytest.approx(4 * 3)


def test_gathers_and_gradients_do_not_hide_behind_the_same_second() -> None:
    alone = StageWork(1, 2, gradient_sync_s=2, num_units=20)
    both = StageWork(1, 2, gradient_sync_s=2, backward_gather_s=1, num_units=20)
    assert step_cost([alone], 1).terms["gradient_sync"] == pytest.approx(0.1)
    assert step_cost([both], 1).terms["gradient_sync"] == pytest.approx(2 - (2 - 0.95))


def test_a_late_stages_synchronisation_hides_behind_the_ramp_down() -> None:
    # The last of four stages ends three backwards, six seconds, before the first.
    quiet, busy = StageWork(1, 2), StageWork(1, 2, gradient_sync_s=6)
    assert step_cost([quiet, quiet, quiet, busy], 8).total_s == step_cost([quiet] * 4, 8).total_s
    assert step_cost([busy, quiet, quiet, quiet], 8).total_s == step_cost([quiet] * 4, 8).total_s + 6


def test_messages_are_what_the_step_would_save_without_them() -> None:
    stages = [StageWork(1, 2)] * 4
    with_it, without = step_cost(stages, 8, send_s=0.5), step_cost(stages, 8)
    assert with_it.terms["send_recv"] == pytest.approx(with_it.total_s - without.total_s)
    assert with_it.terms["pipeline_bubble"] == pytest.approx(without.terms["pipeline_bubble"])
    assert with_it.terms["send_recv"] >= 2 * 3 * 0.5


@pytest.mark.parametrize("seed", range(20))
def test_terms_are_the_step(seed: int) -> None:
    rng = random.Random(seed)
    v = rng.choice([1, 2])
    p, name = rng.randint(1, 4), "Interleaved1F1B" if v > 1 else rng.choice(["GPipe", "1F1B"])
    m = p * rng.randint(1, 10)

    def random_stage() -> StageWork:
        r = rng.random
        return StageWork(r(), r(), r(), r(), r(), r(), r(), r(), r(), num_units=rng.randint(1, 8))

    stages = [random_stage() for _ in range(p * v)]
    cost = step_cost(stages, m, name, v, rng.random() / 10, Overlap(rng.random(), rng.random()))
    assert tuple(cost.terms) == TERMS
    assert min(cost.terms.values()) >= 0
    assert cost.total_s == sum(cost.terms.values())
    own = stages[cost.bottleneck_rank :: p]
    assert cost.terms["compute"] == pytest.approx(m * sum(s.forward_s + s.backward_s for s in own))
    ideal_s = max(m * sum(s.forward_s + s.backward_s for s in stages[r::p]) for r in range(p))
    assert cost.total_s >= ideal_s


def test_the_total_is_the_simulated_step() -> None:
    stages = [StageWork(1 + i / 3, 2, forward_communication_s=0.1, recompute_s=0.2) for i in range(4)]
    timeline = simulate("1F1B", 4, 30, [s.forward_s + 0.1 for s in stages], [2.2] * 4, 0.05)
    assert step_cost(stages, 30, send_s=0.05).total_s == pytest.approx(timeline.step_s)


def test_a_planner_can_price_a_thousand_plans_a_second() -> None:
    step_cost([StageWork(1, 2), *[StageWork(1, 2.1)] * 7], 64, send_s=0.01)
    start_s = time.process_time()
    for i in range(100):
        step_cost([StageWork(1, 2), *[StageWork(1 + i, 2.1)] * 7], 64, send_s=0.01)
    assert time.process_time() - start_s < 0.5  # measured 0.06: room for a busy machine


@pytest.mark.parametrize(
    ("stages", "num_virtual", "message"),
    [
        ([], 1, "0 stages"),
        ([StageWork(1, 1)] * 3, 2, "3 stages do not divide"),
        ([StageWork(1, 1)], 0, "of 0"),
    ],
)
def test_stages_divide_into_ranks(stages: list[StageWork], num_virtual: int, message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        step_cost(stages, 4, "Interleaved1F1B", num_virtual)


def test_negative_times_are_refused() -> None:
    with pytest.raises(CostModelError, match="recompute_s is -1"):
        StageWork(1, 1, recompute_s=-1)
    with pytest.raises(CostModelError, match="sharding unit, got 0"):
        StageWork(1, 1, num_units=0)
