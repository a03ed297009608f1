"""The schedule of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    _PipelineSchedule,
    get_schedule_class,
)

PipelineSchedule = _PipelineSchedule
"""What runs the stages of a rank: torch's own, under a public name."""

Border = Sequence[tuple[tuple[int, ...], torch.dtype] | tuple[tuple[int, ...], torch.dtype, Literal[False]]]
"""Shape and dtype of each tensor that passes between two stages; a third item tells that numbers have no
gradient."""


StageMaker = Callable[[DeviceMesh], nn.Module]
"""What makes a stage as one rank runs it."""

SplitBackward = Callable[[nn.Module], Callable[[], Callable[[], None]]]
"""What makes of a stage the `dw_builder` of its `PipelineStage`."""


def pipeline(
    stages: Mapping[int, nn.Module],
    borders: Sequence[Border],
    schedule: str,
    num_microbatches: int,
    mesh: DeviceMesh,
    device: torch.device,
    split_backward: SplitBackward | None = None,
) -> PipelineSchedule:
    """The schedule that drives this rank's `stages`, given by their number in the pipeline.

    `borders[i]` is what stage i receives; the last stage returns the loss. `split_backward` makes the
    backward of a stage leave the gradients of weights, for schedules that compute them apart from those of
    activations.
    """

    def activations(border: Border) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty(shape, dtype=dtype, device=device).requires_grad_(
                dtype.is_floating_point and not never
            )
            for shape, dtype, *never in border
        )

    for module in stages.values():
        module.register_forward_hook(_contiguous)

    kind = get_schedule_class(schedule)
    built: list[Any] = [
        PipelineStage(
            module,
            index,
            len(borders) - 1,
            device,
            input_args=activations(borders[index]),
            output_args=activations(borders[index + 1]),
            group=mesh.get_group("pp"),
            dw_builder=split_backward(module) if split_backward else None,
        )
        for index, module in stages.items()
    ]
    options = {"loss_fn": lambda loss, _: loss / num_microbatches, "scale_grads": False}
    several = issubclass(kind, PipelineScheduleMulti)
    made: PipelineSchedule = kind(built if several else built[0], num_microbatches, **options)
    return made


def _contiguous(module: nn.Module, args: object, sent: Tensor | tuple[Tensor, ...]) -> object:
    """What a stage returns, as it can be sent."""
    return sent.contiguous() if isinstance(sent, Tensor) else tuple(each.contiguous() for each in sent)
