from __future__ import annotations

import collections

import pytest
from torch.distributed.pipelining import schedules

from costmodel import CostModelError, peak_activation_bytes, peak_in_flight, rank_orders

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
    schedule.microbatches_per_round = num_microbatches // max(1, num_microbatches // num_ranks)
    actions = schedule._calculate_single_rank_operations(rank)
    return [str(action) for action in actions if action is not None]


def our_order(name: str, rank: int, num_ranks: int, num_microbatches: int, num_virtual: int) -> list[str]:
    num_stages = num_ranks * num_virtual
    return [
        f"{leg}F{m}" if leg < num_stages else f"{2 * num_stages - 1 - leg}B{m}"
        for leg, m in rank_orders(name, num_ranks, num_microbatches, num_virtual)[rank]
    ]


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_orders_are_torchs(name: str, p: int, m: int, v: int) -> None:
    for rank in range(p):
        theirs = torch_order(name, rank, p, m, v)
        assert len(theirs) == 2 * m * v
        assert our_order(name, rank, p, m, v) == theirs


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_every_rank_runs_its_stages_once_per_microbatch(name: str, p: int, m: int, v: int) -> None:
    for rank, order in enumerate(rank_orders(name, p, m, v)):
        stages = [rank + chunk * p for chunk in range(v)]
        legs = [*stages, *(2 * p * v - 1 - stage for stage in stages)]
        assert collections.Counter(order) == collections.Counter((leg, i) for leg in legs for i in range(m))


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_peak_in_flight_is_what_the_order_holds(name: str, p: int, m: int, v: int) -> None:
    for rank, peak in enumerate(peak_in_flight(name, p, m, v)):
        changes = [1 if leg < p * v else -1 for leg, _ in rank_orders(name, p, m, v)[rank]]
        assert peak == max(sum(changes[:stop]) for stop in range(len(changes) + 1))


def test_peak_in_flight_by_hand() -> None:
    assert peak_in_flight("GPipe", 4, 16) == (16, 16, 16, 16)
    assert peak_in_flight("1F1B", 4, 16) == (4, 3, 2, 1)
    assert peak_in_flight("1F1B", 4, 2) == (2, 2, 2, 1)
    # Megatron-LM's interleaved warm-up, (v - 1) p + 2 (p - 1 - r), and the forward after it.
    assert peak_in_flight("Interleaved1F1B", 4, 16, 2) == (11, 9, 7, 5)


def test_interleaving_costs_the_memory_that_the_megatron_paper_says() -> None:
    # arXiv:2205.05198: 1 + (p - 1) / (p v) times the activations of 1F1B on the first rank.
    p, v = 8, 4
    plain = peak_activation_bytes("1F1B", p, 64, [v * 1.0] * p)
    interleaved = peak_activation_bytes("Interleaved1F1B", p, 64, [1.0] * p * v, v)
    assert interleaved[0] / plain[0] == pytest.approx(1 + (p - 1) / (p * v))


def test_peak_bytes_weigh_each_stage() -> None:
    assert peak_activation_bytes("1F1B", 3, 8, [10, 20, 30]) == (30, 40, 30)
    # Rank 1 of 2 with stages 1 and 3: two forwards of stage 1, then stage 3 one at a time.
    assert peak_activation_bytes("Interleaved1F1B", 2, 4, [0, 5, 0, 100], 2)[1] == 2 * 5 + 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ZB", 2, 4, 1), "unknown schedule 'ZB'; known are GPipe"),
        (("1F1B", 2, 4, 2), "use Interleaved1F1B"),
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
