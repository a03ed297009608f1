"""Which models train equal to their originals under which plans: the table of `docs/models.md`.

    python -m benchmarks.model_matrix [MODEL ...]

Every model of `tests/models.py` is captured, planned on local CPU devices with the settings of the column,
written out, and run on gloo ranks. A cell is the largest relative difference of any gradient after the first
step, where loss, gradients and the parameters after three AdamW steps all are within tolerance; otherwise
`refused`, with the reason below the table, or `failed`, with the reason printed. `docs/models.md` gets the
rows of the models named, or of all.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

import autopar
from autopar.rewrite.program import Program
from tests.autopar.case_runner import CaseRunner, Original, Result, is_rounding, original, own_rounding
from tests.autopar.random_cases import EXPERTS
from tests.models import ALL

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MICROBATCH_SIZE = 2


@dataclass(frozen=True)
class Column:
    """A plan for every model: the settings of `autopar.evaluate`, or, where it is searched, the number of
    devices alone."""

    settings: Mapping[str, object] = field(default_factory=dict)
    num_microbatches: int = 2
    policy: str | None = None
    num_searched: int = 0

    @property
    def num_devices(self) -> int:
        return self.num_searched or self._product("dp", "cp", "tp", "pp")

    @property
    def global_batch(self) -> int:
        """Samples of a step; the search decides how many of them a microbatch has."""
        return MICROBATCH_SIZE * (4 if self.num_searched else self.num_microbatches * self._product("dp"))

    def _product(self, *axes: str) -> int:
        return prod(size for axis in axes if isinstance(size := self.settings.get(axis, 1), int))

    def applies_to(self, model: str) -> bool:
        return "ep" not in self.settings or model in EXPERTS


def staged(schedule: str, num_virtual_stages: int = 1) -> Column:
    """A pipeline of two ranks."""
    return Column({"pp": 2, "schedule": schedule, "num_virtual_stages": num_virtual_stages}, 4)


COLUMNS: Mapping[str, Column] = {
    "dp 2": Column({"dp": 2}),
    "tp 2": Column({"tp": 2, "sequence_parallel": False}),
    "tp 2, sequence parallel": Column({"tp": 2, "sequence_parallel": True}),
    "cp 2": Column({"cp": 2}),
    "ep 2": Column({"dp": 2, "ep": 2}),
    "ZeRO-3 dp 2, tp 2": Column({"dp": 2, "zero_stage": 3, "tp": 2}),
    "dp 2, tp 2, pp 2": Column({"dp": 2, "tp": 2, "pp": 2}),
    "1F1B": staged("1F1B"),
    "Interleaved1F1B": staged("Interleaved1F1B", 2),
    "ZBVZeroBubble": staged("ZBVZeroBubble", 2),
    "DualPipeV": staged("DualPipeV", 2),
    "recomputation": Column({"dp": 2, "recompute": "full"}),
    "bf16 mixed, ZeRO-3": Column({"dp": 2, "zero_stage": 3}, policy="adamw-mixed"),
    "searched, 4 devices": Column(num_searched=4),
}

ROUNDING_NOTE = (
    "program and original round at different places; in bf16 that alone puts gradients of this original off "
    "by {:.0%} of those in double precision"
)

INTRODUCTION = """# Models and plans

Each model below, at a size that trains in no time, was captured, given the plan of the column, written out
as a program, and trained for three steps on real ranks (gloo) beside the original in one process. A number is
the largest relative difference of any gradient; loss and parameters after the third step agree too, within
the tolerances of `parity.py`, but where a cell says otherwise. Models marked with * ran in single precision,
as torch has no grouped matrix product for doubles; those without it in double precision, but for the column
of bf16. Many models compute norms, softmax or their loss in single precision inside: their differences are of
its order.

The pipeline schedules have two ranks, and two stages on each but for 1F1B. In the last column only the number
of devices is given, and everything else is what the search finds.

Made by `python -m benchmarks.model_matrix` with torch {torch} and transformers {transformers}. It says
nothing of speed. `python -m benchmarks.fuzz` tries what lies between the columns.

"""


def dtype_of(model: str, column: Column) -> torch.dtype:
    """In which precision a model is held against its original."""
    if column.policy is not None:
        return torch.bfloat16
    return torch.float32 if model in EXPERTS else torch.float64


def compiled(given: Original, column: Column) -> Program:
    """The program of a model under the plan of a column."""
    cluster = f"local-cpu*{column.num_devices}"
    if column.num_searched:
        plan = autopar.plan(given.capture, cluster, global_batch=column.global_batch)
    else:
        plan = autopar.evaluate(
            given.capture,
            cluster,
            global_batch=column.global_batch,
            microbatch_size=MICROBATCH_SIZE,
            policy=column.policy,
            **column.settings,  # type: ignore[arg-type]  # of the types that evaluate checks itself
        )
    return autopar.compile(given.capture, plan)


def measure(model: str, runner: CaseRunner) -> dict[str, Result]:
    """The cells of a row, by column."""
    found = {}
    for label, column in COLUMNS.items():
        if column.applies_to(model):
            given = original(model, dtype_of(model, column))
            result = runner.check(given, partial(compiled, given, column))
            if column.policy and is_rounding(result, model, column.global_batch, given):
                note = ROUNDING_NOTE.format(own_rounding(model, torch.bfloat16, column.global_batch))
                result = replace(result, kind="equal", text=note)
            found[label] = result
    return found


def page(model: str, cells: Mapping[str, Result], before: str) -> str:
    """The page as Markdown: the row of a model, and of others what stands in the page `before`."""
    import transformers

    rows, notes = _parts(before)
    rows[model] = [f"{model}{'*' if model in EXPERTS else ''}"]
    rows[model] += [_cell(cells[label]) if label in cells else "-" for label in COLUMNS]
    notes[model] = [
        f"- {model}, {label}: {each.text}"
        for label, each in cells.items()
        if each.text and each.kind != "failed"
    ]
    known = [each.name for each in ALL if each.name in rows]
    table = [["model", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *(rows[model] for model in known)]
    lines = [f"| {' | '.join(row)} |" for row in table]
    lines += ["", *(note for model in known for note in notes.get(model, []))]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return INTRODUCTION.format(**versions) + "\n".join(lines).rstrip() + "\n"


def _parts(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The rows of a page by model, where it has today's columns, and the notes below them."""
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[each.strip() for each in row] for row in table]
    if not cells or cells[0] != ["model", *COLUMNS]:
        return {}, {}
    notes: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("- "):
            notes.setdefault(line.removeprefix("- ").partition(",")[0], []).append(line)
    return {row[0].rstrip("*"): row for row in cells[2:]}, notes


def _cell(result: Result) -> str:
    if result.kind == "equal":
        return f"{result.difference:.1e}" + (" (see below)" if result.text else "")
    return "refused" if result.kind == "refused" else "failed"


def main() -> None:
    warnings.simplefilter("ignore")
    with CaseRunner(num_steps=3) as runner:
        for model in sys.argv[1:] or [each.name for each in ALL]:
            began = time.perf_counter()
            cells = measure(model, runner)
            PAGE.write_text(page(model, cells, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"{model}: {time.perf_counter() - began:.0f} s", flush=True)
            for label, each in cells.items():
                if each.kind == "failed":
                    print(f"{label}: {each.text}", flush=True)


if __name__ == "__main__":
    main()
