"""How well predictions agree with measured training runs.

The error of a row is predicted / measured - 1, of the step time, or of the time per token where the record
does not tell its global batch. Every figure is averaged within a group of rows (one publication) first and
over the groups then: groups differ in size a hundredfold, and the largest would otherwise speak for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from autopar.records.baselines import OtherTool, constant_utilisation, constant_utilisation_error, other_tools
from autopar.records.sweeps import Sweep, mean, sweeps

if TYPE_CHECKING:
    from autopar.records.schema import Record

__all__ = ["Accuracy", "GroupMetrics", "Prediction", "Row", "accuracy"]


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one record.

    Attributes:
        record_id: the record.
        step_time_s: of one optimizer step; None where it could not be predicted.
        memory_bytes: the peak of the fullest device; None where it could not be predicted.
        fits: whether that peak is within the device's memory.
        failure: why there is no prediction, or None.
        terms: the parts of the step time, in seconds.
        chosen: the configuration that was priced, where the record leaves some of it open.
        global_batch: samples of the step that was priced, where the record does not tell its own.
    """

    record_id: str
    step_time_s: float | None
    memory_bytes: float | None
    fits: bool
    failure: str | None = None
    terms: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    chosen: str = ""
    global_batch: int | None = None


@dataclass(frozen=True)
class Row:
    """A record beside its prediction."""

    record: Record
    prediction: Prediction

    @property
    def is_timed(self) -> bool:
        """Whether a time was measured, of the step or per token."""
        return self.record.step_time_s is not None or self.record.tokens_per_s_per_device is not None

    @property
    def error(self) -> float | None:
        """Predicted / measured - 1 of the time; None where either is missing."""
        record, predicted_s = self.record, self.prediction.step_time_s
        if predicted_s is None:
            return None
        if record.step_time_s is not None:
            return predicted_s / record.step_time_s - 1
        samples = record.batch.global_batch or self.prediction.global_batch
        if record.tokens_per_s_per_device is None or samples is None:
            return None
        tokens_per_device = samples * record.model.seq / record.cluster.n_devices
        return predicted_s * record.tokens_per_s_per_device / tokens_per_device - 1

    @property
    def memory_error(self) -> float | None:
        """Predicted / measured - 1 of the peak memory; None where either is missing."""
        measured_bytes, predicted_bytes = self.record.memory_bytes, self.prediction.memory_bytes
        if measured_bytes is None or predicted_bytes is None:
            return None
        return predicted_bytes / measured_bytes - 1

    @property
    def failure(self) -> str | None:
        """Why a measured row has no error; None where it has one."""
        if self.prediction.failure is not None:
            return self.prediction.failure
        if not self.is_timed or self.error is not None:
            return None
        if self.prediction.step_time_s is None:
            return "no step time was predicted"
        return "batch.global_batch is unknown, and so is the one that was priced"


@dataclass(frozen=True)
class GroupMetrics:
    """The figures of one group of rows, or of all groups together. A figure is None where nothing tells it.

    Attributes:
        name: of the group.
        num_rows: rows with a measured time or a published lack of memory.
        num_failures: of these, the ones that could not be predicted. They are in no other figure.
        mean_error: mean of |error|.
        worst_error: the error of largest magnitude, with its sign.
        bias: mean of the errors with their signs.
        rank_correlation: Spearman's, averaged over the sweeps.
        regret: how much slower the configuration ranked first really was, averaged over the sweeps.
        num_sweeps: that these are averages of.
        memory_error: mean of |error| of the peak memory.
        num_memory_rows: that this is the mean of.
        num_out_of_memory: rows that ran out of memory.
        num_caught: of these, the ones predicted not to fit.
        num_false_alarms: rows that ran and were predicted not to fit.
        constant_utilisation_error: mean |error| when every row runs at one share of the peak.
        other_tools: what other tools published for the same rows, in the order of their names.
        left_out_error: mean |error| with constants fitted on all other groups.
    """

    name: str
    num_rows: int
    num_failures: int
    mean_error: float | None
    worst_error: float | None
    bias: float | None
    rank_correlation: float | None
    regret: float | None
    num_sweeps: int
    memory_error: float | None
    num_memory_rows: int
    num_out_of_memory: int
    num_caught: int
    num_false_alarms: int
    constant_utilisation_error: float | None
    other_tools: tuple[OtherTool, ...]
    left_out_error: float | None


@dataclass(frozen=True)
class Accuracy:
    """Predictions against measurements.

    Attributes:
        rows: sorted by group and id.
        groups: sorted by name.
        overall: means over the groups, counts of all rows, and the worst row of all.
        constant_utilisation: the one share of the peak that suits all rows best, the baseline to beat.
    """

    rows: tuple[Row, ...]
    groups: tuple[GroupMetrics, ...]
    overall: GroupMetrics
    constant_utilisation: float | None

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that could not be predicted."""
        return tuple(row for row in self.rows if row.failure is not None)

    def worst(self, count: int) -> tuple[Row, ...]:
        """The `count` rows of largest |error|, worst first."""
        predicted = [row for row in self.rows if row.error is not None]
        return tuple(sorted(predicted, key=lambda row: -abs(row.error or 0.0))[:count])


def accuracy(
    records: Sequence[Record],
    predictions: Iterable[Prediction],
    left_out_errors: Mapping[str, float] = MappingProxyType({}),
) -> Accuracy:
    """Compare each record with its prediction.

    `left_out_errors` maps a group to its mean |error| under constants fitted without it. Records with nothing
    measured are left out. Raises KeyError when a record has no prediction.
    """
    by_id = {prediction.record_id: prediction for prediction in predictions}
    rows = tuple(
        row
        for record in sorted(records, key=lambda record: (record.group, record.id))
        if (row := Row(record, by_id[record.id])).is_timed or record.out_of_memory
    )
    utilisation = constant_utilisation([row.record for row in rows])
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(row.record.group, []).append(row)
    groups = tuple(
        _group(name, mine, utilisation, left_out_errors.get(name)) for name, mine in members.items()
    )
    return Accuracy(rows, groups, _overall(groups), utilisation)


def _group(
    name: str, rows: Sequence[Row], utilisation: float | None, left_out_error: float | None
) -> GroupMetrics:
    good = [row for row in rows if row.failure is None]
    errors = _known(row.error for row in good)
    memory_errors = _known(row.memory_error for row in good)
    short = [row for row in good if row.record.out_of_memory]
    found = _sweeps(rows)
    return GroupMetrics(
        name=name,
        num_rows=len(rows),
        num_failures=len(rows) - len(good),
        mean_error=mean(map(abs, errors)),
        worst_error=max(errors, key=abs, default=None),
        bias=mean(errors),
        rank_correlation=mean(_known(sweep.rank_correlation for sweep in found)),
        regret=mean(sweep.regret for sweep in found),
        num_sweeps=len(found),
        memory_error=mean(map(abs, memory_errors)),
        num_memory_rows=len(memory_errors),
        num_out_of_memory=sum(row.record.out_of_memory for row in rows),
        num_caught=sum(not row.prediction.fits for row in short),
        num_false_alarms=sum(row.is_timed and not row.prediction.fits for row in good),
        constant_utilisation_error=constant_utilisation_error([row.record for row in rows], utilisation),
        other_tools=other_tools([row.record for row in rows]),
        left_out_error=left_out_error,
    )


def _sweeps(rows: Sequence[Row]) -> tuple[Sweep, ...]:
    predicted_s = {row.record.id: row.prediction.step_time_s for row in rows if row.failure is None}
    return sweeps([row.record for row in rows], predicted_s)


def _overall(groups: Sequence[GroupMetrics]) -> GroupMetrics:
    def average(figure: Callable[[GroupMetrics], float | None]) -> float | None:
        return mean(_known(map(figure, groups)))

    names = sorted({tool.name for group in groups for tool in group.other_tools})
    return GroupMetrics(
        name=f"mean of {len(groups)} group{'s' * (len(groups) != 1)}",
        num_rows=sum(group.num_rows for group in groups),
        num_failures=sum(group.num_failures for group in groups),
        mean_error=average(lambda group: group.mean_error),
        worst_error=max(_known(group.worst_error for group in groups), key=abs, default=None),
        bias=average(lambda group: group.bias),
        rank_correlation=average(lambda group: group.rank_correlation),
        regret=average(lambda group: group.regret),
        num_sweeps=sum(group.num_sweeps for group in groups),
        memory_error=average(lambda group: group.memory_error),
        num_memory_rows=sum(group.num_memory_rows for group in groups),
        num_out_of_memory=sum(group.num_out_of_memory for group in groups),
        num_caught=sum(group.num_caught for group in groups),
        num_false_alarms=sum(group.num_false_alarms for group in groups),
        constant_utilisation_error=average(lambda group: group.constant_utilisation_error),
        other_tools=tuple(
            OtherTool.over_groups(name, [group.other_tools for group in groups]) for name in names
        ),
        left_out_error=average(lambda group: group.left_out_error),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
