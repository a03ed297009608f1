"""Recomputation: what a block keeps of its forward."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Result = TypeVar("Result")

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a forward under `checkpoint`, and around the one that computes it again."""


KINDS = {
    "products": r"aten::(mm|addmm|convolution|_grouped_mm)|autopar::rows_by_group",
    "batched_products": r"aten::(bmm|baddbmm)",
    "attention": r"aten::_scaled_dot_product\w*",
    "collectives": r"_c10d_functional::(all|reduce)_\w+|autopar::moved_rows",
    "received": r"_c10d_functional::\w+",  # what waits for the collective before it, and goes with it
}
"""The ops whose results may be kept; the first pattern that fits counts."""


def recomputable(forward: Callable[..., Result]) -> Callable[..., Result]:
    """The `forward` of a block that may be told what to `keep`: the rest it computes again in the backward.

    It does so inside of the block's hooks, so that `fully_shard` gathers parameters before, not while
    something is computed again, and what `torch.compile` makes of a block has its recomputation in it.
    """

    @wraps(forward)
    def again(self: nn.Module, *args: Tensor, keep: Callable[[], Contexts] | None = None) -> Any:
        if keep is None:
            return forward(self, *args)

        def run(*given: Tensor) -> Result:
            return forward(self, *given)

        if keep is keep_nothing:  # torch.compile takes no contexts that do nothing
            return checkpoint(run, *args, use_reentrant=False)
        return checkpoint(run, *args, use_reentrant=False, context_fn=keep)

    return again


def keep_nothing() -> Contexts:
    """Recomputation of everything."""
    return nullcontext(), nullcontext()


def keep(**numbers: Sequence[int]) -> Callable[[], Contexts]:
    """Recomputation of all but some results: of each of `KINDS` the ops with these numbers, counted from 0 as
    a block runs them."""

    def contexts() -> Contexts:
        forward, recomputation = create_selective_checkpoint_contexts(_Kept(numbers))
        return forward, recomputation

    return contexts


class _Kept:
    """Counts the ops of one run of a block."""

    def __init__(self, numbers: Mapping[str, Sequence[int]]) -> None:
        self.numbers = numbers
        self.counts: Counter[tuple[bool, str | None]] = Counter()
        self.is_received = False

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = _kind(op)
        if kind == "received":
            is_kept = self.is_received
        else:
            at = (context.is_recompute, kind)
            is_kept = kind is not None and self.counts[at] in self.numbers.get(kind, ())
            self.counts[at] += 1
            if kind == "collectives":
                self.is_received = is_kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kind(op: Any) -> str | None:
    name = op.name().split(".")[0] if hasattr(op, "name") else str(op)
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), None)


def keep_matmuls() -> Contexts:
    """Selective recomputation: keep the results of matrix products, attention and collectives, compute the
    rest again."""
    forward, recomputation = create_selective_checkpoint_contexts(_keep_matmul)
    return forward, recomputation


def _keep_matmul(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE if _kind(op) is None else CheckpointPolicy.MUST_SAVE
