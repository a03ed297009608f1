"""What to beat: one utilisation for everything, and what other tools published for the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopar.records.sweeps import mean

if TYPE_CHECKING:
    from autopar.records.schema import Record

UTILISATION = "mfu_noncausal_vs_bf16_peak"
"""The figure among a record's derived ones: measured model FLOP/s over the dense bf16 peak."""

STEP_TIME_SUFFIX = "_step_time_s"
MEMORY_SUFFIX = "_alloc_gib"


@dataclass(frozen=True)
class OtherTool:
    """Another tool's predictions for some rows.

    Attributes:
        name: of the tool.
        num_rows: for which it predicted a step time.
        mean_error: mean of |predicted / measured - 1| of the step time over these.
        memory_error: the same of the peak memory, where it predicted that.
    """

    name: str
    num_rows: int
    mean_error: float | None
    memory_error: float | None

    @staticmethod
    def over_groups(name: str, groups: Iterable[Sequence[OtherTool]]) -> OtherTool:
        """The mean over the groups in which the tool predicted anything."""
        mine = [tool for tools in groups for tool in tools if tool.name == name]
        return OtherTool(
            name,
            sum(tool.num_rows for tool in mine),
            mean(tool.mean_error for tool in mine if tool.mean_error is not None),
            mean(tool.memory_error for tool in mine if tool.memory_error is not None),
        )


def other_tools(records: Sequence[Record]) -> tuple[OtherTool, ...]:
    """The tools whose predictions the records of a group quote, in the order of their names."""
    names = {
        key.removesuffix(suffix)
        for record in records
        for key in record.anchor_predictions
        for suffix in (STEP_TIME_SUFFIX, MEMORY_SUFFIX)
        if key.endswith(suffix)
    }
    return tuple(_other_tool(name, records) for name in sorted(names))


def _other_tool(name: str, records: Sequence[Record]) -> OtherTool:
    errors = [
        abs(predicted_s / record.step_time_s - 1)
        for record in records
        if (predicted_s := record.anchor_predictions.get(name + STEP_TIME_SUFFIX)) is not None
        and record.step_time_s is not None
    ]
    memory_errors = [
        abs(predicted_gib * 2**30 / record.memory_bytes - 1)
        for record in records
        if (predicted_gib := record.anchor_predictions.get(name + MEMORY_SUFFIX)) is not None
        and record.memory_bytes is not None
    ]
    return OtherTool(name, len(errors), mean(errors), mean(memory_errors))


def constant_utilisation(records: Sequence[Record]) -> float | None:
    """The utilisation u for which "every row runs at u of the peak" has the least mean error over groups.

    A row that ran at u_i is predicted to take u_i / u of its measured time. So the error is the sum of
    w_i |u_i / u - 1|, where w_i is one over the size of the row's group: in 1 / u a weighted distance to the
    points 1 / u_i, which is least at their weighted median. None when no record tells its utilisation.
    """
    known = [(record.group, used) for record in records if (used := _utilisation(record)) is not None]
    sizes = Counter(group for group, _ in known)
    weights = sorted(((used, used / sizes[group]) for group, used in known), reverse=True)
    left = sum(weight for _, weight in weights) / 2
    for used, weight in weights:
        left -= weight
        if left <= 0:
            return used
    return None


def constant_utilisation_error(records: Sequence[Record], utilisation: float | None) -> float | None:
    """Mean |error| over a group's records if each ran at that utilisation."""
    if utilisation is None:
        return None
    known = (used for record in records if (used := _utilisation(record)) is not None)
    return mean(abs(used / utilisation - 1) for used in known)


def _utilisation(record: Record) -> float | None:
    value = record.derived.get(UTILISATION)
    return None if value is None else float(value)
