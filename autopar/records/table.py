"""The accuracy of predictions as text, at most 110 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from textwrap import wrap

from autopar.records.metrics import Accuracy, GroupMetrics, Row
from autopar.report.table import table
from autopar.report.units import seconds

__all__ = ["accuracy_text"]

WIDTH = 110
NOTHING = "-"

LEGEND = """\
In % of the measured step time: mean and worst error, and bias (the mean with signs). Rows: predicted / all.
Sweeps: configurations of one job. Rank: Spearman's correlation in them. Regret: how much slower than the best
the one that we rank first really was. Memory: mean error of the peak."""

BESIDE = """\
Mean errors beside ours. All at u %: every row at that share of the peak, the one that suits these rows best.
Left out: ours with constants fitted on all other groups. Other tools: over the rows that they predict."""

NAME_WIDTH = 52
"""Longer ids are shortened in the middle; the JSON has them whole."""

Column = tuple[str, Callable[[GroupMetrics], str]]


def accuracy_text(accuracy: Accuracy, num_worst: int = 10) -> str:
    """The figures of every group, those of others beside them, the worst rows, and the rows that failed."""
    beside = _beside(accuracy)
    parts = [
        LEGEND.splitlines(),
        _groups(accuracy, _figures(accuracy)),
        BESIDE.splitlines() if beside else [],
        _groups(accuracy, beside),
        _worst(accuracy.worst(num_worst)),
        _not_fitting(accuracy),
        _failures(accuracy.failures),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _figures(accuracy: Accuracy) -> list[Column]:
    columns: list[Column] = [
        ("rows", lambda group: f"{group.num_rows - group.num_failures}/{group.num_rows}"),
        ("mean", lambda group: _percent(group.mean_error)),
        ("worst", lambda group: _percent(group.worst_error, signed=True)),
        ("bias", lambda group: _percent(group.bias, signed=True)),
        ("sweeps", lambda group: str(group.num_sweeps or NOTHING)),
        ("rank", lambda group: _plain(group.rank_correlation)),
        ("regret", lambda group: _percent(group.regret)),
        ("memory", lambda group: _percent(group.memory_error)),
    ]
    if accuracy.overall.num_out_of_memory:
        columns.append(("OOM caught", _caught))
    return columns


def _beside(accuracy: Accuracy) -> list[Column]:
    """Our mean error beside what others achieve; nothing when there are no others."""
    columns: list[Column] = []
    if accuracy.constant_utilisation is not None:
        head = f"all at {100 * accuracy.constant_utilisation:.0f} %"
        columns.append((head, lambda group: _percent(group.constant_utilisation_error)))
    for tool in accuracy.overall.other_tools:
        columns.append((tool.name, partial(_tool, name=tool.name)))
        if tool.memory_error is not None:
            columns.append((f"{tool.name} memory", partial(_tool_memory, name=tool.name)))
    if accuracy.overall.left_out_error is not None:
        columns.append(("left out", lambda group: _percent(group.left_out_error)))
    ours: Column = ("autopar", lambda group: _percent(group.mean_error))
    return [ours, *columns] if columns else []


def _groups(accuracy: Accuracy, columns: Sequence[Column]) -> list[str]:
    if not columns:
        return []
    head = ["group", *(name for name, _ in columns)]
    every = [*accuracy.groups, accuracy.overall] if len(accuracy.groups) != 1 else accuracy.groups
    rows = [[group.name, *(text(group) for _, text in columns)] for group in every]
    return table([head, *rows], right=range(1, len(head)), indent="")


def _caught(group: GroupMetrics) -> str:
    return f"{group.num_caught}/{group.num_out_of_memory}" if group.num_out_of_memory else NOTHING


def _tool(group: GroupMetrics, name: str) -> str:
    return _percent(next((tool.mean_error for tool in group.other_tools if tool.name == name), None))


def _tool_memory(group: GroupMetrics, name: str) -> str:
    return _percent(next((tool.memory_error for tool in group.other_tools if tool.name == name), None))


def _worst(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ["worst rows", "measured", "predicted", "error", "mostly"]
    return table([head, *map(_worst_row, rows)], right=(1, 2, 3), indent="")


def _worst_row(row: Row) -> list[str]:
    predicted_s, error = row.prediction.step_time_s or 0.0, row.error or 0.0
    times = seconds(predicted_s / (1 + error)), seconds(predicted_s)
    terms = row.prediction.terms
    largest = max(terms, key=lambda name: (terms[name], name), default=NOTHING)
    return [_shortened(row.record.id), *times, _percent(error, signed=True), largest]


def _not_fitting(accuracy: Accuracy) -> list[str]:
    count = accuracy.overall.num_false_alarms
    verb = "row ran and is" if count == 1 else "rows ran and are"
    return [f"{count} {verb} predicted not to fit the memory."] if count else []


def _failures(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [f"{len(rows)} row{'s' * (len(rows) != 1)} could not be predicted:"]
    for row in rows:
        lines += wrap(f"  {row.record.id}: {row.failure}", WIDTH, subsequent_indent="    ")
    return lines


def _shortened(name: str) -> str:
    cut = len(name) - NAME_WIDTH + 3
    middle = (NAME_WIDTH - 3) // 2
    return name if cut <= 3 else f"{name[:middle]}...{name[middle + cut :]}"


def _percent(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return NOTHING
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"
