"""A failing plan, made small: of the hundreds of ops that a random plan splits, mostly one or two matter."""

from __future__ import annotations

from collections.abc import Callable, Collection

from autopar.plan import Plan
from autopar.strategies import REPLICATE

Split = tuple[str, str]
"""A mesh axis, and an op that does not run whole on every rank of it."""


def splits(plan: Plan) -> list[Split]:
    """What a plan splits, inner axes first: what an outer one splits decides what they may."""
    axes = reversed(list(plan.strategies.items()))
    return [(axis, op) for axis, keys in axes for op, key in keys.items() if key != REPLICATE]


def shrunk(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """The plan, which `fails`, without most of the splits and of the blocks that compute again which it does
    not need for that: taken back are halves of them, then quarters, and so on to single ones.

    `fails` must be false of plans that cannot be.
    """
    kept = splits(plan)
    size = len(kept)
    while size:
        position = 0
        while position < len(kept):
            fewer = kept[:position] + kept[position + size :]
            if fails(_with_only(plan, fewer)):
                kept = fewer
            else:
                position += size
        size //= 2
    plan = _with_only(plan, kept)
    for entry in plan.recomputation:
        others = tuple(each for each in plan.recomputation if each is not entry)
        without = plan.model_copy(update={"recomputation": others})
        plan = without if fails(without) else plan
    return plan


class _Keys(dict[str, str]):
    """Strategies by op; whole is what is not there, as are collectives that other splits of an outer axis
    need."""

    def get(self, op: str, default: object = None) -> str:
        return super().get(op, REPLICATE)


def _with_only(plan: Plan, kept: Collection[Split]) -> Plan:
    strategies = {
        axis: _Keys({op: key for op, key in keys.items() if (axis, op) in kept})
        for axis, keys in plan.strategies.items()
    }
    return plan.model_copy(update={"strategies": strategies})
