from __future__ import annotations

import collections
import itertools
import random
from contextlib import suppress

import numpy as np
import pytest
from torch.distributed.pipelining import schedules

from costmodel import CostModelError, peak_activation_bytes, peak_in_flight, rank_orders
from costmodel.orders import alone_parts, least_alone, moments_in_flight, rank_stages, stage_ranks

SIZES = [
    ("GPipe", 1, 3, 1),
    ("GPipe", 4, 6, 1),
    ("1F1B", 2, 2, 1),
    ("1F1B", 4, 4, 1),
    ("1F1B", 4, 11, 1),
    ("Interleaved1F1B", 2, 4, 2),
    ("Interleaved1F1B", 4, 8, 2),
    ("Interleaved1F1B", 4, 4, 3),
    ("Interleaved1F1B", 4, 10, 2),
    ("Interleaved1F1B", 4, 3, 2),
    ("Interleaved1F1B", 3, 12, 4),
    ("Interleaved1F1B", 4, 8, 1),
    ("LoopedBFS", 1, 3, 1),
    ("LoopedBFS", 3, 5, 2),
    ("InterleavedZeroBubble", 4, 8, 1),
    ("InterleavedZeroBubble", 4, 3, 1),
    ("InterleavedZeroBubble", 3, 12, 4),
    ("InterleavedZeroBubble", 4, 10, 2),
    ("InterleavedZeroBubble", 1, 2, 2),
    ("ZBVZeroBubble", 1, 1, 2),
    ("ZBVZeroBubble", 4, 3, 2),
    ("ZBVZeroBubble", 4, 7, 2),
    ("ZBVZeroBubble", 5, 23, 2),
    ("DualPipeV", 1, 2, 2),
    ("DualPipeV", 2, 5, 2),
    ("DualPipeV", 4, 8, 2),
    ("DualPipeV", 5, 23, 2),
]


class RecordingStage:
    """Stands in for a torch pipeline stage; notes what a schedule runs on it."""

    def __init__(self, stage_index: int) -> None:
        self.stage_index = stage_index
        self.ran: list[str] = []

    def forward_one_chunk(self, microbatch: int, *_: object, **__: object) -> None:
        self.ran.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch: int, **_: object) -> None:
        self.ran.append(f"{self.stage_index}B{microbatch}")

    def no_messages(self, _: int) -> list[object]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages

    def perform_reduce_grad(self, _: int) -> None:
        pass


def torch_order(name: str, rank: int, num_ranks: int, num_microbatches: int, num_virtual: int) -> list[str]:
    """What torch's own schedule class runs, with neither process groups nor models.

    The single-stage schedules are run, for their `_get_pipeline_order` misnumbers the last rank of 1F1B.
    """
    schedule_class = schedules.get_schedule_class(name)
    schedule = schedule_class.__new__(schedule_class)
    schedule._n_microbatches = num_microbatches
    if issubclass(schedule_class, schedules.PipelineScheduleSingle):
        stage = RecordingStage(rank)
        schedule._stage, schedule._num_stages, schedule.scale_grads = stage, num_ranks, False
        for hook in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
            setattr(schedule, hook, lambda *_: None)
        schedule._check_inputs = lambda *_: ([()] * num_microbatches, [{}] * num_microbatches)
        schedule._step_microbatches()
        return stage.ran
    schedule.pp_group_size, schedule.n_local_stages = num_ranks, num_virtual
    schedule._stages, schedule.num_stages = [None] * num_virtual, num_ranks * num_virtual
    schedule.microbatches_per_round = num_microbatches // max(1, num_microbatches // num_ranks)
    actions = schedule._calculate_single_rank_operations(rank)
    return [str(part) for action in actions if action is not None for part in action.sub_actions or (action,)]


def our_order(name: str, rank: int, num_ranks: int, num_microbatches: int, num_virtual: int) -> list[str]:
    order = rank_orders(name, num_ranks, num_microbatches, num_virtual)[rank]
    return [f"{stage}{'B' if phase == 'O' else phase}{microbatch}" for phase, stage, microbatch in order]


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_orders_are_torchs(name: str, p: int, m: int, v: int) -> None:
    for rank in range(p):
        assert our_order(name, rank, p, m, v) == torch_order(name, rank, p, m, v)


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 5), (4, 8), (5, 23)])
def test_the_pairs_that_dual_pipe_overlaps_are_torchs(p: int, m: int) -> None:
    schedule = schedules.ScheduleDualPipeV.__new__(schedules.ScheduleDualPipeV)
    schedule.pp_group_size, schedule._n_microbatches = p, m
    for rank, order in enumerate(rank_orders("DualPipeV", p, m, 2)):
        pairs = [
            (f"{f_stage}F{f_microbatch}", f"{stage}B{microbatch}")
            for (_, f_stage, f_microbatch), (phase, stage, microbatch) in itertools.pairwise(order)
            if phase == "O"
        ]
        theirs = [action.sub_actions for action in schedule._calculate_single_rank_operations(rank)]
        assert pairs == [tuple(map(str, parts)) for parts in theirs if parts]


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_every_rank_runs_its_stages_once_per_microbatch(name: str, p: int, m: int, v: int) -> None:
    ranks = stage_ranks(name, p, v)
    for rank, order in enumerate(rank_orders(name, p, m, v)):
        stages = rank_stages(name, rank, p, v)
        assert all(ranks[stage] == rank for stage in stages)
        for phases in ("F", "BIO", "BWO"):
            done = collections.Counter((stage, i) for phase, stage, i in order if phase in phases)
            assert done == collections.Counter((stage, i) for stage in stages for i in range(m))


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
@pytest.mark.parametrize("rounds", [1, 9])
def test_peak_bytes_are_what_the_whole_order_holds(name: str, p: int, m: int, v: int, rounds: int) -> None:
    if name.startswith("Interleaved") and m % p:
        rounds = 1  # as many microbatches as they run in broken rounds
    m *= rounds
    rng = random.Random(f"{name}{p}{m}{v}")
    saved, kept = ([rng.randint(1, 9) for _ in range(p * v)] for _ in range(2))
    change = {
        "F": saved,
        "B": [-size for size in saved],
        "I": [later - size for size, later in zip(saved, kept, strict=True)],
        "W": [-later for later in kept],
    }
    change["O"] = change["B"]
    peaks = peak_activation_bytes(name, p, m, saved, v, kept)
    for peak, order in zip(peaks, rank_orders(name, p, m, v), strict=True):
        held = list(itertools.accumulate(change[phase][stage] for phase, stage, _ in order))
        assert peak == max(held)
        assert held[-1] == 0


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_moments_say_what_ranks_keep_at_most_whatever_stages_save(name: str, p: int, m: int, v: int) -> None:
    rng = np.random.default_rng(0)
    moments = moments_in_flight(name, p, m, v)
    for rank, order in enumerate(rank_orders(name, p, m, v)):
        place = {stage: index for index, stage in enumerate(rank_stages(name, rank, p, v))}
        steps = np.zeros((len(order), v), dtype=int)
        for step, (phase, stage, _) in enumerate(order):
            steps[step, place[stage]] = {"F": 1, "B": -1, "O": -1, "W": -1}.get(phase, 0)
        held = steps.cumsum(axis=0)
        for saved in (*rng.integers(1, 10, (8, v)), *np.eye(v, dtype=int)):
            assert (moments[rank] @ saved).max() == (held @ saved).max()


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("schedule", "num_virtual"), [("DualPipeV", 2), ("ZBVZeroBubble", 2)] + [
    (name, number) for name in ("InterleavedZeroBubble", "Interleaved1F1B") for number in (2, 3, 4)
])  # fmt: skip
def test_peak_in_flight_is_that_of_the_order(schedule: str, num_virtual: int, num_stages: int) -> None:
    ones = [1.0] * (num_stages * num_virtual)
    for num_microbatches in range(1, 6 * num_stages):
        with suppress(CostModelError):  # the schedule does not run so many
            shape = num_stages, num_microbatches
            peaks = peak_activation_bytes(schedule, *shape, ones, num_virtual)
            assert peak_in_flight(schedule, *shape, num_virtual) == peaks


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_what_runs_alone_is_counted_in_the_order(num_stages: int) -> None:
    for num_microbatches in range(2 * num_stages, 6 * num_stages):
        shape = "DualPipeV", num_stages, num_microbatches, 2
        pairs = collections.Counter(
            each
            for order in rank_orders(*shape)
            for before, op in itertools.pairwise(order)
            if op[0] == "O"
            for each in ((0, before[1]), (1, op[1]))
        )
        parts = alone_parts(*shape)
        for (phase, stage), part in np.ndenumerate(parts):
            assert part == pytest.approx(1 - pairs[phase, stage] / num_microbatches)
        assert least_alone(num_stages, num_microbatches) == pytest.approx(parts.min())


def test_peak_in_flight_by_hand() -> None:
    assert peak_in_flight("GPipe", 4, 16) == (16, 16, 16, 16)
    assert peak_in_flight("1F1B", 4, 16) == (4, 3, 2, 1)
    assert peak_in_flight("1F1B", 4, 2) == (2, 2, 2, 1)
    # Megatron-LM's interleaved warm-up, (v - 1) p + 2 (p - 1 - r), and the forward after it.
    assert peak_in_flight("Interleaved1F1B", 4, 16, 2) == (11, 9, 7, 5)
    # Two stages a rank, so 2 p half-sized activations are 1F1B's memory: arXiv:2401.10241, section 6.
    assert peak_in_flight("ZBVZeroBubble", 4, 16, 2) == (8, 8, 8, 8)
    # One microbatch more than that: github.com/deepseek-ai/DualPipe, "PP + 1".
    assert max(peak_in_flight("DualPipeV", 4, 16, 2)) == 9


def test_interleaving_costs_the_memory_that_the_megatron_paper_says() -> None:
    # arXiv:2205.05198: 1 + (p - 1) / (p v) times the activations of 1F1B on the first rank.
    p, v = 8, 4
    plain = peak_activation_bytes("1F1B", p, 64, [v * 1.0] * p)
    interleaved = peak_activation_bytes("Interleaved1F1B", p, 64, [1.0] * p * v, v)
    assert interleaved[0] / plain[0] == pytest.approx(1 + (p - 1) / (p * v))


def test_what_weight_gradients_need_stays_longer() -> None:
    # ZB-H1 delays rank r's weight gradients by r microbatches: 1F1B's memory if all of it waits for them,
    # and so much less as the input gradient frees.
    plain = peak_activation_bytes("1F1B", 4, 16, [1.0] * 4)
    assert plain == (4, 3, 2, 1)
    assert peak_activation_bytes("InterleavedZeroBubble", 4, 16, [1.0] * 4) == (4, 4, 4, 4)
    assert peak_activation_bytes("InterleavedZeroBubble", 4, 16, [1.0] * 4, 1, [0.0] * 4) == plain


def test_peak_bytes_weigh_each_stage() -> None:
    assert peak_activation_bytes("1F1B", 3, 8, [10, 20, 30]) == (30, 40, 30)
    # Rank 1 of 2 with stages 1 and 3: two forwards of stage 1, then stage 3 one at a time.
    assert peak_activation_bytes("Interleaved1F1B", 2, 4, [0, 5, 0, 100], 2)[1] == 2 * 5 + 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ZB", 2, 4, 1), "unknown schedule 'ZB'; known are GPipe"),
        (("1F1B", 2, 4, 2), "use Interleaved1F1B"),
        (("ZBVZeroBubble", 2, 4, 1), "two stages per rank, got 1"),
        (("DualPipeV", 4, 7, 2), "4 ranks needs a microbatch for each of its 8 stages, got 7"),
        (("InterleavedZeroBubble", 4, 13, 2), "13 microbatches on 4 ranks in 3 rounds"),
        (("1F1B", 2, 0, 1), "at least one"),
        (("Interleaved1F1B", 4, 13, 2), "13 microbatches on 4 ranks in 3 rounds"),
    ],
)
def test_schedules_that_do_not_run(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        rank_orders(*arguments)


def test_peak_bytes_need_a_size_per_stage() -> None:
    with pytest.raises(CostModelError, match="4 virtual stages need as many sizes, got 2"):
        peak_activation_bytes("Interleaved1F1B", 2, 4, [1, 1], 2)
