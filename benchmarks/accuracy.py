"""How well measured training runs are predicted, beside what we want to reach.

    .venv/bin/python -m benchmarks.accuracy                                   the published runs kept here
    .venv/bin/python -m benchmarks.accuracy RECORDS.json                      your own
    .venv/bin/python -m benchmarks.accuracy --json accuracy.json --svg accuracy.svg
    .venv/bin/python -m benchmarks.accuracy --page docs/accuracy.md

The same figures as `autopar evaluate --records`, with the targets, a picture, and the table of a page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autopar.cli.output import progress, short_warnings
from autopar.errors import AutoparError
from autopar.records.assess import DEFAULT_TIERS, assess
from autopar.records.json import accuracy_json
from autopar.records.metrics import Accuracy, GroupMetrics
from autopar.records.table import accuracy_text
from autopar.report.table import table
from benchmarks.scatter import scatter_svg

PUBLISHED = Path(__file__).parent / "published.json"
FITTED = Path(__file__).parent / "fit.json"
BEGIN, END = "<!-- begin: made by benchmarks/accuracy.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Target:
    """A figure and the limit that it should keep: at most, or at least where `at_least` says so."""

    name: str
    limit: float
    value: Callable[[Accuracy], float | None]
    at_least: bool = False

    def row(self, accuracy: Accuracy) -> tuple[str, str, str, str]:
        """Name, figure, limit and verdict."""
        value = self.value(accuracy)
        bound = f"{'>=' if self.at_least else '<='} {self._text(self.limit)}"
        if value is None:
            return self.name, "-", bound, "not measured"
        met = value >= self.limit if self.at_least else value <= self.limit
        return self.name, self._text(value), bound, "met" if met else "MISSED"

    def _text(self, value: float) -> str:
        return f"{value:.2f}" if self.at_least else f"{100 * value:.1f} %"


def _of(group: str, figure: Callable[[GroupMetrics], float | None]) -> Callable[[Accuracy], float | None]:
    """The figure of one group; None when the rows have no such group."""

    def value(accuracy: Accuracy) -> float | None:
        return next((figure(each) for each in accuracy.groups if each.name == group), None)

    return value


def _mean_error(group: GroupMetrics) -> float | None:
    return group.mean_error


def _worst_memory_error(of_simulated_nodes: bool) -> Callable[[Accuracy], float | None]:
    """The largest memory error of a group, of those of the SimuMax project or of the others."""

    def value(accuracy: Accuracy) -> float | None:
        return max(
            (
                group.memory_error
                for group in accuracy.groups
                if group.memory_error is not None and group.name.startswith("simumax") == of_simulated_nodes
            ),
            default=None,
        )

    return value


def _magnitude(value: float | None) -> float | None:
    return None if value is None else abs(value)


TARGETS = (
    Target("mean error over groups", 0.08, lambda accuracy: accuracy.overall.mean_error),
    Target("|bias| over groups", 0.05, lambda accuracy: _magnitude(accuracy.overall.bias)),
    Target("mean error, group left out", 0.12, lambda accuracy: accuracy.overall.left_out_error),
    Target("korthikanti-table5 mean", 0.035, _of("korthikanti-table5", _mean_error)),
    Target("korthikanti-table5 worst", 0.08, _of("korthikanti-table5", lambda g: _magnitude(g.worst_error))),
    Target("megatron-sc21-table1 mean", 0.06, _of("megatron-sc21-table1", _mean_error)),
    Target("vtrain-single mean", 0.15, _of("vtrain-single", _mean_error)),
    Target("vtrain-multi-3.6B-39B mean", 0.09, _of("vtrain-multi-3.6B-39B", _mean_error)),
    Target(
        "vtrain-multi-3.6B-39B rank correlation",
        0.85,
        _of("vtrain-multi-3.6B-39B", lambda group: group.rank_correlation),
        at_least=True,
    ),
    Target("vtrain-multi-3.6B-39B regret", 0.02, _of("vtrain-multi-3.6B-39B", lambda group: group.regret)),
    Target("memory, worst SimuMax group", 0.03, _worst_memory_error(of_simulated_nodes=True)),
    Target("memory, worst other group", 0.10, _worst_memory_error(of_simulated_nodes=False)),
)


def targets_text(accuracy: Accuracy) -> str:
    """Every target beside the figure reached."""
    head = ("target", "reached", "limit", "")
    return (
        "\n".join(table([head, *(target.row(accuracy) for target in TARGETS)], right=(1, 2), indent=""))
        + "\n"
    )


def replace_between_markers(page: str, text: str) -> str:
    """The page with the text, as a code block, in place of what stands between the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise AutoparError(f"the page needs a line {BEGIN!r} and after it a line {END!r}")
    return f"{before}{BEGIN}\n```text\n{text}```\n{END}{after}"


def left_out_errors(records: Path) -> dict[str, float]:
    """What `benchmarks.fit` found for each group of the published runs when it was left out."""
    if records != PUBLISHED:
        return {}
    errors: dict[str, float] = json.loads(FITTED.read_text(encoding="utf-8"))["left_out_error"]
    return errors


def main() -> int:
    """Print the figures and the targets; write what was asked for. 1 when the file cannot be used."""
    options = _options()
    try:
        with short_warnings(quiet=False), progress(quiet=False) as on_progress:
            accuracy = assess(
                options.records,
                options.tiers.split(","),
                options.group,
                on_progress,
                left_out_errors(options.records),
            )
        text = accuracy_text(accuracy, options.worst) + "\n" + targets_text(accuracy)
        if options.page is not None:
            page = replace_between_markers(options.page.read_text(encoding="utf-8"), text)
            options.page.write_text(page, encoding="utf-8")
    except (AutoparError, OSError) as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 1
    print(text, end="")
    for path, content in ((options.json, accuracy_json), (options.svg, scatter_svg)):
        if path is not None:
            path.write_text(content(accuracy), encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "records", type=Path, nargs="?", default=PUBLISHED, metavar="RECORDS.json",
        help="default: benchmarks/published.json",
    )  # fmt: skip
    parser.add_argument("--tiers", default=",".join(DEFAULT_TIERS), help="default: %(default)s")
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help="may be repeated")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="rows to name (default: 10)")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="every figure and every row")
    parser.add_argument("--svg", type=Path, metavar="OUT.svg", help="predicted against measured times")
    parser.add_argument("--page", type=Path, metavar="PAGE.md", help="replace the table between its markers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
