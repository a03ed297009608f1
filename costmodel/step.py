"""What a training step costs, and why: the time of its slowest rank, split into terms that add up to it.

A stage's forward takes compute, the tensor-parallel communication in it, and what the gathers of its sharded
parameters leave exposed; its backward the same, with recomputation. The schedule (`steady.rank_finish_s`)
says when each rank ends its last backward. Gradients are reduced once a step, behind the last microbatch's
backward as far as they fit; then the optimizer runs. For an amount X of communication that may hide behind a
time T,

    exposed = max(X - overlap · T, X / num_units)        cost = exposed + contention · (X - exposed)

because the first gather and the last reduction of a stage's `num_units` sharding units find nothing to hide
behind, and because what hides takes memory bandwidth and cores from the compute it hides behind. The step is
the largest of finish + cost of gradient synchronisation + optimizer, plus a constant overhead. That rank, the
bottleneck, is accounted for: its own work, how much later messages made it finish (send_recv), and what is
left, the bubble. Tensor-parallel communication counts as far as DualPipeV does not hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache, partial
from typing import TypeVar

from costmodel.errors import CostModelError
from costmodel.events import overlap_saving_s
from costmodel.orders import OVERLAPPING_SCHEDULES, alone_parts, rank_stages
from costmodel.steady import rank_finish_s

TERMS = (
    "compute",
    "recompute",
    "tensor_parallel",
    "parameter_gather",
    "send_recv",
    "pipeline_bubble",
    "gradient_sync",
    "optimizer",
    "overhead",
)


@dataclass(frozen=True, slots=True)
class StageWork:
    """What one (virtual) stage does on one of its ranks, in seconds; per microbatch unless said otherwise.

    `weight_s` is the part of the backward that makes weight gradients, which some schedules put off;
    `recompute_s` is the part of the forward, communication in it included, that runs again before the
    backward; `*_communication_s` is what runs in line with compute (tensor, sequence, context and expert
    parallelism); `*_gather_s` gathers ZeRO-3 parameters and `gradient_sync_s`, once a step, reduces
    gradients, in `num_units` roughly equal buckets (fully_shard units); `partial_sum_s`, once a step, is
    synchronisation that has to wait for the end of the backward; `optimizer_s` is once a step.
    """

    forward_s: float
    backward_s: float
    recompute_s: float = 0.0
    forward_communication_s: float = 0.0
    backward_communication_s: float = 0.0
    forward_gather_s: float = 0.0
    backward_gather_s: float = 0.0
    gradient_sync_s: float = 0.0
    partial_sum_s: float = 0.0
    optimizer_s: float = 0.0
    num_units: int = 1
    weight_s: float = 0.0

    def __post_init__(self) -> None:
        for name in _SECONDS:
            if getattr(self, name) < 0:
                raise CostModelError(f"a stage cannot take negative time: {name} is {getattr(self, name):g}")
        if self.num_units < 1:
            raise CostModelError(f"a stage has at least one sharding unit, got {self.num_units}")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Which share of a computation's time communication can run behind: 1 is ideal, 0 none.

    `contention` is how much longer computing takes for a second of what runs behind it. The ideal is the
    default: it claims no measurement.
    """

    gradient_sync: float = 1.0
    parameter_gather: float = 1.0
    contention: float = 0.0


IDEAL_OVERLAP = Overlap()
T = TypeVar("T")


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step, and the rank that it waits for."""

    total_s: float
    bottleneck_rank: int
    _account: Callable[[], Mapping[str, float]] = field(repr=False, compare=False)

    @cached_property
    def terms(self) -> Mapping[str, float]:
        """The bottleneck rank's seconds by the names in `TERMS`, which add up to the total. Accounted for
        when asked: a planner reads no more than the total of most."""
        return self._account()


def step_cost(
    stages: Sequence[StageWork],
    num_microbatches: int,
    schedule_name: str = "1F1B",
    num_virtual: int = 1,
    send_s: float | Sequence[float] = 0.0,
    overlap: Overlap = IDEAL_OVERLAP,
    *,
    blocking_sends: bool = False,
    overhead_s: float = 0.0,
) -> StepCost:
    """The cost of one step over `stages`, in the order of the model, `num_virtual` of them on each rank.

    `send_s` is the time of a message between neighbouring stages, one number or one per boundary; with
    `blocking_sends` it stops both. `overhead_s` is added to every step. Without a pipeline, pass one stage:
    every schedule is then plain gradient accumulation. Raises CostModelError when the stages do not divide
    into ranks, or for a schedule that does not run them.
    """
    num_ranks, remainder = divmod(len(stages), num_virtual) if num_virtual > 0 else (0, 0)
    if not num_ranks or remainder:
        raise CostModelError(f"{len(stages)} stages do not divide into ranks of {num_virtual} virtual stages")
    exposed = _once_each(partial(communication_cost, overlap=overlap), stages)
    forward_s = [
        s.forward_s + s.forward_communication_s + e.forward_gather_s
        for s, e in zip(stages, exposed, strict=True)
    ]
    backward_s = [
        s.recompute_s + s.backward_s + s.backward_communication_s + e.backward_gather_s
        for s, e in zip(stages, exposed, strict=True)
    ]
    savings_s = _savings_s(stages) if schedule_name in OVERLAPPING_SCHEDULES else [0.0] * len(stages)
    weight_s = [stage.weight_s for stage in stages]
    finish = partial(
        _finish_s, schedule_name, num_ranks, num_microbatches, tuple(forward_s), tuple(backward_s),
        num_virtual=num_virtual, weight_s=tuple(weight_s),
        overlap_saving_s=tuple(savings_s),
    )  # fmt: skip
    sends_s = tuple(send_s) if isinstance(send_s, Sequence) else send_s
    finish_s = finish(send_s=sends_s, blocking_sends=blocking_sends)

    mine = [rank_stages(schedule_name, rank, num_ranks, num_virtual) for rank in range(num_ranks)]
    once_s = [
        s.optimizer_s + s.partial_sum_s + e.gradient_sync_s for s, e in zip(stages, exposed, strict=True)
    ]
    ends_s = [finish_s[rank] + sum(once_s[stage] for stage in mine[rank]) for rank in range(num_ranks)]
    slowest = ends_s.index(max(ends_s))
    own = mine[slowest]

    def account() -> dict[str, float]:
        unhindered_s = finish_s[slowest]
        if sends_s:
            unhindered_s = finish()[slowest]
        terms = _work_terms([stages[n] for n in own], [exposed[n] for n in own], num_microbatches)
        _, alone = alone_parts(schedule_name, num_ranks, num_microbatches, num_virtual)
        hidden_s = num_microbatches * sum((1 - float(alone[n])) * savings_s[n] for n in own)
        terms["tensor_parallel"] -= hidden_s
        busy_s = num_microbatches * sum(forward_s[n] + backward_s[n] for n in own) - hidden_s
        terms["pipeline_bubble"] = max(0.0, unhindered_s - busy_s)
        terms["send_recv"] = max(0.0, finish_s[slowest] - unhindered_s)
        terms["overhead"] = overhead_s
        return {name: terms[name] for name in TERMS}

    return StepCost(ends_s[slowest] + overhead_s, slowest, account)


_finish_s = lru_cache(maxsize=1024)(rank_finish_s)
"""Kept, because ways to shard and to synchronise that differ once a step have the same pipeline."""


def _once_each(make: Callable[[StageWork], T], stages: Sequence[StageWork]) -> list[T]:
    """What is made of every stage, once for those that are the same object."""
    made = {key: make(stage) for key, stage in {id(stage): stage for stage in stages}.items()}
    return [made[id(stage)] for stage in stages]


def _savings_s(stages: Sequence[StageWork]) -> list[float]:
    """What a backward of each stage saves beside a forward of the other stage of its rank in a V."""
    return [
        overlap_saving_s(
            other.forward_s,
            other.forward_communication_s,
            one.recompute_s + one.backward_s,
            one.backward_communication_s,
        )
        for one, other in zip(stages, reversed(stages), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class CommunicationCost:
    """What communication behind compute costs a stage: gathers per microbatch, the synchronisation per
    step."""

    forward_gather_s: float
    backward_gather_s: float
    gradient_sync_s: float


def communication_cost(stage: StageWork, overlap: Overlap) -> CommunicationCost:
    """What gathers and synchronisation cost a stage."""

    def exposed_s(communication_s: float, hiding_s: float) -> float:
        return max(communication_s - hiding_s, communication_s / stage.num_units)

    def cost_s(communication_s: float, exposed_s: float) -> float:
        return exposed_s + overlap.contention * (communication_s - exposed_s)

    backward_s = stage.recompute_s + stage.backward_s
    forward_gather_s = exposed_s(stage.forward_gather_s, overlap.parameter_gather * stage.forward_s)
    backward_gather_s = exposed_s(stage.backward_gather_s, overlap.parameter_gather * backward_s)
    # Both use the network: what a gather hides behind is taken.
    taken_s = stage.backward_gather_s - backward_gather_s
    gradient_sync_s = exposed_s(stage.gradient_sync_s, max(0.0, overlap.gradient_sync * backward_s - taken_s))
    return CommunicationCost(
        cost_s(stage.forward_gather_s, forward_gather_s),
        cost_s(stage.backward_gather_s, backward_gather_s),
        cost_s(stage.gradient_sync_s, gradient_sync_s),
    )


def _work_terms(
    stages: Sequence[StageWork], exposed: Sequence[CommunicationCost], num_microbatches: int
) -> dict[str, float]:
    """The terms of one rank, of the stages on it, that do not depend on the schedule."""
    return {
        "compute": num_microbatches * sum(s.forward_s + s.backward_s for s in stages),
        "recompute": num_microbatches * sum(s.recompute_s for s in stages),
        "tensor_parallel": num_microbatches
        * sum(s.forward_communication_s + s.backward_communication_s for s in stages),
        "parameter_gather": num_microbatches * sum(e.forward_gather_s + e.backward_gather_s for e in exposed),
        "gradient_sync": sum(e.gradient_sync_s for e in exposed) + sum(s.partial_sum_s for s in stages),
        "optimizer": sum(s.optimizer_s for s in stages),
    }


_SECONDS = tuple(each.name for each in fields(StageWork) if each.name.endswith("_s"))
