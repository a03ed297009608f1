"""Which models train equal to their originals under which plans: the table of `docs/models.md`.

    .venv/bin/python benchmarks/model_matrix.py [MODEL ...]

Every model of `tests/models.py` is captured, planned on local CPU devices with the degrees of the column,
written out, and run by torchrun on gloo ranks. A cell is the largest relative difference of any gradient
after the first step, where loss, gradients and the parameters after three AdamW steps all are within
tolerance; otherwise what went wrong. With no models named, the table is written to `docs/models.md` too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import autopar  # noqa: E402  # after the path that makes `tests` importable
from autopar.errors import AutoparError  # noqa: E402  # the same
from graphs import Capture, GraphError, capture  # noqa: E402  # the same
from tests.models import ALL, Case, case  # noqa: E402  # the same

DRIVER = ROOT / "tests" / "autopar" / "run_programs.py"
PAGE = ROOT / "docs" / "models.md"
SINGLE_PRECISION = frozenset({"mixtral", "qwen3moe", "deepseekv3"})
"""torch's grouped matrix product has no kernel for doubles."""

PLANS: Mapping[str, Mapping[str, int]] = {
    "dp 2": {"dp": 2},
    "tp 2": {"tp": 2},
    "ZeRO-3 dp 2, tp 2": {"dp": 2, "dp_shard": 2, "tp": 2, "zero_stage": 3},
    "pp 2": {"pp": 2},
}
MICROBATCH_SIZE = 2
NUM_MICROBATCHES = 2

INTRODUCTION = """# Models and plans

Each model below, at a size that trains in no time, was captured, given the plan of the column, written out
as a program, and trained for three steps on real ranks (gloo) beside the original in one process. A number is
the largest relative difference of any gradient; loss and parameters after the third step agree too, within
the tolerances of `parity.py`. Models marked with * ran in single precision, as torch has no grouped matrix
product for doubles.

Made by `python benchmarks/model_matrix.py` with torch {torch} and transformers {transformers}. It says
nothing of speed.

"""


@dataclass(frozen=True)
class Cell:
    """One model under one plan: where its program is, or why there is none."""

    model: str
    plan: str
    directory: Path | None
    refusal: str = ""


def prepare(model_case: Case, folder: Path) -> list[Cell]:
    """Write the programs of one model, with what the original does beside each."""
    torch.manual_seed(0)
    dtype = torch.float32 if model_case.name in SINGLE_PRECISION else torch.float64
    model = model_case.build().to(dtype)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        given = model_case.inputs(batch).items()
        return {name: each.to(dtype) if _is_real(each) else each for name, each in given}

    captured = capture(model, inputs, name=model_case.name)
    cells = []
    for label, degrees in PLANS.items():
        directory = folder / model_case.name / label.replace(" ", "_")
        try:
            program = _compiled(captured, degrees)
        except (AutoparError, GraphError) as error:
            cells.append(Cell(model_case.name, label, None, str(error).partition("\n")[0]))
            continue
        program.save(directory)
        autopar.save_reference(program, model, inputs, directory)
        cells.append(Cell(model_case.name, label, directory))
    return cells


def _compiled(captured: Capture, degrees: Mapping[str, Any]) -> autopar.Program:
    num_devices = degrees.get("dp", 1) * degrees.get("tp", 1) * degrees.get("pp", 1)
    plan = autopar.evaluate(
        captured,
        f"local-cpu*{num_devices}",
        global_batch=MICROBATCH_SIZE * NUM_MICROBATCHES * degrees.get("dp", 1),
        microbatch_size=MICROBATCH_SIZE,
        **degrees,
    )
    return autopar.compile(captured, plan)


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def run(directories: Sequence[Path], num_ranks: int) -> dict[Path, str]:
    """The verdict on every program: its largest gradient difference, or what went wrong."""
    verdicts: dict[Path, str] = {}
    left = list(directories)
    while left:
        output = _torchrun(left, num_ranks)
        found = _verdicts(output)
        verdicts |= {path: found[path] for path in left if path in found}
        left = [path for path in left if path not in found]
        if left:  # the first of them broke off the run
            print(output[-3000:], file=sys.stderr)
            verdicts[left.pop(0)] = "failed"
    return verdicts


def _torchrun(directories: Sequence[Path], num_ranks: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(DRIVER)]
    done = subprocess.run(
        [*command, *map(str, directories)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.stdout


def _verdicts(output: str) -> dict[Path, str]:
    """What rank 0 printed about each program; the output between two verdicts is of the second one."""
    found: dict[Path, str] = {}
    start = 0
    for match in re.finditer(r"^\[rank 0\] (.*): (equal|NOT EQUAL)$", output, re.MULTILINE):
        differences = re.findall(
            r"gradients: largest relative difference (\S+)", output[start : match.start()]
        )
        text = differences[-1] if differences else "?"
        found[Path(match[1])] = text if match[2] == "equal" else f"NOT EQUAL {text}"
        start = match.end()
    return found


def measure(cases: Sequence[Case]) -> dict[str, dict[str, str]]:
    """The cells of the table, by model and plan."""
    table: dict[str, dict[str, str]] = {each.name: {} for each in cases}
    with tempfile.TemporaryDirectory() as folder:
        cells = [cell for each in cases for cell in prepare(each, Path(folder))]
        for label, degrees in PLANS.items():
            num_ranks = degrees.get("dp", 1) * degrees.get("tp", 1) * degrees.get("pp", 1)
            mine = [cell for cell in cells if cell.plan == label]
            verdicts = run([cell.directory for cell in mine if cell.directory], num_ranks)
            for cell in mine:
                verdict = f"refused: {cell.refusal}" if cell.directory is None else verdicts[cell.directory]
                table[cell.model][label] = verdict
    return table


def markdown(table: Mapping[str, Mapping[str, str]]) -> str:
    """The table as Markdown."""
    rows = [["model", *PLANS], ["---"] * (len(PLANS) + 1)]
    rows += [
        [f"{name}{'*' if name in SINGLE_PRECISION else ''}", *(cells[label] for label in PLANS)]
        for name, cells in table.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    import transformers

    names = sys.argv[1:]
    text = markdown(measure([case(name) for name in names] if names else ALL))
    print(text)
    if not names:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        PAGE.write_text(INTRODUCTION.format(**versions) + text, encoding="utf-8")


if __name__ == "__main__":
    main()
