"""Does the prediction put configurations of one job in the right order?

A sweep is three or more rows of a group that train the same model on the same cluster with the same global
batch and precision, so that only the parallelism differs: the choice that a planner has to make.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from autopar.records.schema import Record

MIN_ROWS = 3


@dataclass(frozen=True)
class Sweep:
    """One sweep and how well it was ranked.

    Attributes:
        record_ids: its rows, fastest first.
        rank_correlation: Spearman's, between predicted and measured step times; None where it is undefined.
        regret: measured time of the row predicted fastest / measured time of the fastest row - 1.
    """

    record_ids: tuple[str, ...]
    rank_correlation: float | None
    regret: float


def sweeps(records: Iterable[Record], predicted_s: Mapping[str, float | None]) -> tuple[Sweep, ...]:
    """The sweeps among the records of a group, with the predicted step time of each record by its id.

    A row that was not predicted cannot be ranked first, yet it may be the best that there was.
    """
    found: dict[Hashable, list[Record]] = {}
    for record in records:
        if record.step_time_s is not None and record.batch.global_batch is not None:
            found.setdefault(_job(record), []).append(record)
    ranked = (_sweep(rows, predicted_s) for rows in found.values() if len(rows) >= MIN_ROWS)
    return tuple(sweep for sweep in ranked if sweep is not None)


def _job(record: Record) -> Hashable:
    return record.model, record.cluster, record.batch.global_batch, record.precision


def _sweep(records: Sequence[Record], predicted_s: Mapping[str, float | None]) -> Sweep | None:
    measured = {record.id: record.step_time_s or 0.0 for record in records}
    predicted = {id_: time_s for id_ in measured if (time_s := predicted_s.get(id_)) is not None}
    if len(predicted) < MIN_ROWS:
        return None
    first = min(predicted, key=lambda id_: (predicted[id_], id_))
    return Sweep(
        tuple(sorted(measured, key=lambda id_: (measured[id_], id_))),
        spearman([measured[id_] for id_ in predicted], list(predicted.values())),
        measured[first] / min(measured.values()) - 1,
    )


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, ties at their average rank, from -1 to 1.

    None where it is undefined: fewer than two values, or all of one side equal.
    """
    ranks = average_ranks(first), average_ranks(second)
    deviations = [rank - rank.mean() for rank in ranks if rank.size]
    norm = float(np.prod([np.linalg.norm(each) for each in deviations]))
    if len(deviations) < 2 or norm == 0:
        return None
    return float(deviations[0] @ deviations[1]) / norm


def average_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """The rank of each value, from 1; equal values share the mean of the ranks that they take up."""
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], dtype=np.float64)


def mean(values: Iterable[float]) -> float | None:
    """The arithmetic mean, or None of nothing."""
    known = list(values)
    return fmean(known) if known else None
