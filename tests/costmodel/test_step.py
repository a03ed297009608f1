from __future__ import annotations

import random
from dataclasses import fields
from math import isclose
from typing import Any

import pytest

from costmodel import (
    SCHEDULES,
    TERMS,
    CostModelError,
    Overlap,
    StageWork,
    closed_form_step_s,
    simulate,
    step_cost,
)
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES, rank_stages
from tests.costmodel.counting import num_calls


def test_one_rank_does_its_work_one_microbatch_after_the_other() -> None:
    stage = StageWork(
        forward_s=1,
        backward_s=2,
        recompute_s=1,
        forward_communication_s=0.25,
        optimizer_s=5,
        gradient_sync_s=1,
    )
    cost = step_cost([stage], 8, overhead_s=3)
    assert cost.terms == {
        "compute": 24,
        "recompute": 8,
        "tensor_parallel": 2,
        "parameter_gather": 0,
        "send_recv": 0,
        "pipeline_bubble": 0,
        "gradient_sync": 1,  # one unit: nothing to hide it behind
        "optimizer": 5,
        "overhead": 3,
    }
    assert cost.total_s == 43


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


def test_blocking_messages_cost_two_a_microbatch_where_passing_ones_cost_the_ramp() -> None:
    """Megatron-LM without overlapped point-to-point communication: each forward and each backward waits."""
    stages, p, m, send_s = [StageWork(1, 2)] * 4, 4, 16, 0.1
    passing, blocking = (
        step_cost(stages, m, send_s=send_s, blocking_sends=stops).terms["send_recv"]
        for stops in (False, True)
    )
    # A message to the first and last stage each way; in the steady state both directions pass at once.
    assert 2 * (p - 1) * send_s <= passing < blocking
    assert blocking == pytest.approx(2 * send_s * (m + p - 2), rel=0.15)


def test_sums_of_partial_gradients_wait_for_the_end_of_the_backward() -> None:
    """Over the tensor axis: synchronisation like that of replicas, but with nothing to hide behind."""
    stage = StageWork(1, 2, gradient_sync_s=1, partial_sum_s=0.5, num_units=10)
    assert step_cost([stage], 4).terms["gradient_sync"] == pytest.approx(0.1 + 0.5)


def test_what_hides_slows_down_what_it_hides_behind() -> None:
    stage = StageWork(1, 2, gradient_sync_s=1, forward_gather_s=0.5, num_units=10)
    ideal = step_cost([stage], 4).terms
    slowed = step_cost([stage], 4, overlap=Overlap(contention=0.25)).terms
    assert ideal["gradient_sync"] == pytest.approx(0.1)
    assert slowed["gradient_sync"] == pytest.approx(0.1 + 0.25 * 0.9)
    assert slowed["parameter_gather"] == pytest.approx(4 * (0.05 + 0.25 * 0.45))
    exposed = step_cost([stage], 4, overlap=Overlap(0, 0, contention=0.25)).terms
    assert exposed["gradient_sync"] == pytest.approx(1)  # nothing hides, so nothing is slowed down


def test_putting_weight_gradients_off_fills_bubbles() -> None:
    stages = [StageWork(1, 2, weight_s=1)] * 8
    bubbles = {
        name: step_cost(stages[: 4 * v], 16, name, v).terms["pipeline_bubble"]
        for name, v in (("1F1B", 1), ("InterleavedZeroBubble", 1), ("ZBVZeroBubble", 2), ("DualPipeV", 2))
    }
    assert bubbles["1F1B"] == 3 * 3
    assert bubbles["InterleavedZeroBubble"] == 3 * 1  # (p - 1) (f + i - w), arXiv:2401.10241
    assert bubbles["ZBVZeroBubble"] == 3 * 1  # n f, of stages half a rank's
    assert bubbles["DualPipeV"] == 3 * 2


@pytest.mark.parametrize("name", sorted(SPLIT_BACKWARD_SCHEDULES))
def test_a_backward_without_a_part_for_weights_fills_no_bubbles(name: str) -> None:
    """As where a model multiplies by views of its weights, whose gradients cannot wait."""
    num_stages = 8 if name in V_SCHEDULES else 4
    whole, split = (
        step_cost([StageWork(1, 2, weight_s=weight_s)] * num_stages, 8, name, num_stages // 4).total_s
        for weight_s in (0, 1)
    )
    assert whole > split


def test_dual_pipe_hides_communication_and_says_where() -> None:
    """What overlapping saves is tensor-parallel communication that nobody waits for."""
    stages = [StageWork(1, 2, 0, 0.3, 0.6, weight_s=1)] * 8
    silent = [StageWork(1, 2, weight_s=1)] * 8
    one, mute = step_cost(stages, 16, "DualPipeV", 2), step_cost(silent, 16, "DualPipeV", 2)
    v_shaped = step_cost(stages, 16, "ZBVZeroBubble", 2)
    whole_s = 16 * 2 * (0.3 + 0.6)
    assert v_shaped.terms["tensor_parallel"] == pytest.approx(whole_s)
    assert 0 < one.terms["tensor_parallel"] < whole_s
    assert one.terms["compute"] == mute.terms["compute"]
    assert mute.total_s < one.total_s < mute.total_s + whole_s


def test_a_forward_is_overlapped_with_the_backward_of_the_other_stage_of_its_rank() -> None:
    """Only the first stage communicates, and only forward: what hides is what its forward has to hide, behind
    the backward of the last stage, which is on the same rank."""
    talking = StageWork(1, 2, forward_communication_s=0.5, weight_s=1)
    stages = [talking, *[StageWork(1, 2, weight_s=1)] * 3]
    cost = step_cost(stages, 8, "DualPipeV", 2)
    timeline = simulate(
        "DualPipeV", 2, 8, [1.5, 1, 1, 1], [2.0] * 4, num_virtual=2, weight_s=[1.0] * 4,
        overlap_saving_s=[0, 0, 0, 0.5],
    )  # fmt: skip
    assert cost.total_s == pytest.approx(timeline.step_s)
    assert cost.terms["tensor_parallel"] < 8 * 0.5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", SCHEDULES)
def test_terms_are_the_step(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    v = 2 if name in V_SCHEDULES else 1 if name in ("GPipe", "1F1B") else rng.choice([1, 2, 3])
    p = rng.randint(2 if v > 1 else 1, 4)
    m = 2 * p * rng.randint(1, 5)

    def random_stage() -> StageWork:
        times_s: dict[str, Any] = {f.name: rng.random() for f in fields(StageWork) if f.name.endswith("_s")}
        times_s["weight_s"] *= times_s["backward_s"]
        return StageWork(**times_s, num_units=rng.randint(1, 8))

    stages = [random_stage() for _ in range(p * v)]
    overlap = Overlap(rng.random(), rng.random(), rng.random())
    cost = step_cost(
        stages, m, name, v, rng.random() / 10, overlap, blocking_sends=rng.random() < 0.5, overhead_s=0.5
    )
    assert tuple(cost.terms) == TERMS
    assert min(cost.terms.values()) >= 0
    assert isclose(cost.total_s, sum(cost.terms.values()), rel_tol=1e-12)
    assert cost.terms["overhead"] == 0.5
    mine = [[stages[n] for n in rank_stages(name, rank, p, v)] for rank in range(p)]
    compute_s = [m * sum(s.forward_s + s.backward_s for s in own) for own in mine]
    assert cost.terms["compute"] == pytest.approx(compute_s[cost.bottleneck_rank])
    assert cost.total_s >= max(compute_s) + 0.5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_slowest_rank_ends_when_its_schedule_and_its_optimizer_do(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    v = 2 if name in V_SCHEDULES else 1
    p, m = 3, 3 * rng.randint(2, 6)
    r = rng.random
    stages = [
        StageWork(1 + r(), 2 + r(), r(), forward_communication_s=r(), backward_communication_s=r(),
                  optimizer_s=4 * r(), weight_s=1)
        for _ in range(p * v)
    ]  # fmt: skip
    forward_s = [s.forward_s + s.forward_communication_s for s in stages]
    backward_s = [s.recompute_s + s.backward_s + s.backward_communication_s for s in stages]
    saved_s = [0.0] * len(stages)
    if name == "DualPipeV":
        for stage, (one, other) in enumerate(zip(stages, reversed(stages), strict=True)):
            compute_s = other.forward_s + one.recompute_s + one.backward_s
            moved_s = other.forward_communication_s + one.backward_communication_s
            in_turn_s = compute_s + moved_s
            at_once_s = max(compute_s, moved_s, forward_s[-1 - stage], backward_s[stage])
            saved_s[stage] = in_turn_s - at_once_s
    timeline = simulate(
        name, p, m, forward_s, backward_s, 0.2, v, weight_s=[1.0] * len(stages), overlap_saving_s=saved_s
    )
    ends_s = [
        finish + sum(stages[n].optimizer_s for n in rank_stages(name, rank, p, v))
        for rank, finish in enumerate(timeline.finish_s)
    ]
    cost = step_cost(stages, m, name, v, 0.2)
    assert isclose(cost.total_s, max(ends_s), rel_tol=1e-9)
    assert cost.bottleneck_rank == ends_s.index(max(ends_s))


def test_the_total_is_the_simulated_step() -> None:
    stages = [StageWork(1 + i / 3, 2, forward_communication_s=0.1, recompute_s=0.2) for i in range(4)]
    timeline = simulate("1F1B", 4, 30, [s.forward_s + 0.1 for s in stages], [2.2] * 4, 0.05)
    assert step_cost(stages, 30, send_s=0.05).total_s == pytest.approx(timeline.step_s)


def test_a_long_step_is_priced_in_as_little_as_a_short_one() -> None:
    stages = [StageWork(1, 2), *[StageWork(1, 2.1)] * 7]

    def priced(num_microbatches: int) -> int:
        step_cost(stages, num_microbatches, send_s=0.01)
        return num_calls(lambda: step_cost(stages, num_microbatches, send_s=0.01))

    assert priced(64) < 200  # a simulation of it makes thousands
    assert priced(6400) < 2 * priced(64)


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
