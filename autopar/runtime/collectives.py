"""Changes of how a tensor lies on the ranks: forward, and the conjugate change of its gradient backward.

Programs run on local shards with plain autograd. A tensor has a state on each mesh axis: how its value
lies on the ranks, and how its gradient does. `S(d)` is a slice of dimension d (value and gradient), `R`
the whole value, `P` a term of a sum. Each function below changes the state forward and does the conjugate
change backward:

    all_gather             S(d) -> R, gradient P     all_gather      | reduce_scatter
    all_gather_replicated  S(d) -> R, gradient R     all_gather      | slice
    shard                  R, gradient R -> S(d)     slice           | all_gather
    shard_partial          R, gradient P -> S(d)     slice           | zero padding
    copy                   R, gradient R -> P        -               | all_reduce
    all_reduce             P -> R, gradient R        all_reduce      | -
    all_reduce_partial     P -> R, gradient P        all_reduce      | all_reduce
    reduce_scatter         P -> S(d)                 reduce_scatter  | all_gather
    all_to_all             S(i) -> S(j)              all_to_all      | all_to_all
    first_only             R -> P                    zero but on the first rank | -
    first_grad             gradient P -> R           -               | zero but on the first rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.runtime.moves import (
    exchanged,
    exchanged_back,
    gathered,
    on_first_rank,
    padded,
    scattered,
    sliced,
    summed,
    untouched,
)

Move = Callable[..., Tensor]
"""A function of `(x, group, *dims, **order)` that autograd does not see."""


def conjugate(forward: Move, backward: Move) -> Callable[..., Tensor]:
    """A differentiable function `(x, group, *dims, **order)` that moves data with `forward`, and gradients
    with `backward`."""

    class Conjugate(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, group: ProcessGroup, dims: tuple[Any, ...], order: dict[str, Any]
        ) -> Tensor:
            ctx.group, ctx.dims, ctx.order = group, dims, order
            return forward(x, group, *dims, **order)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return backward(gradient, ctx.group, *ctx.dims, **ctx.order), None, None, None

    apply: Callable[..., Tensor] = Conjugate.apply
    return lambda x, group, *dims, **order: apply(x, group, dims, order)


all_gather = conjugate(gathered, scattered)
all_gather_replicated = conjugate(gathered, sliced)
shard = conjugate(sliced, gathered)
shard_partial = conjugate(sliced, padded)
copy = conjugate(untouched, summed)
all_reduce = conjugate(summed, untouched)
all_reduce_partial = conjugate(summed, summed)
reduce_scatter = conjugate(scattered, gathered)
all_to_all = conjugate(exchanged, exchanged_back)
first_only = conjugate(on_first_rank, untouched)
first_grad = conjugate(untouched, on_first_rank)
