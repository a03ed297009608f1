"""What a plan costs to find, beside what it may cost: processor time, memory, and the gap that is proven.

    .venv/bin/python -m benchmarks.bench                      all rows of benchmarks/bench_rows.json
    .venv/bin/python -m benchmarks.bench --row llama3-8b      one of them, or several
    .venv/bin/python -m benchmarks.bench --runs 3             each row three times, the quickest counts
    .venv/bin/python -m benchmarks.bench --page docs/benchmarks.md

Every row runs in a process of its own, from the model's name to the plan, as a user would call it, and
nothing is cached between rows. Processor seconds count from the import of torch on. A busy machine makes them
longer, up to several times; a yardstick, the same work before and after each row, tells by how much, and
instructions are the same on any day. What else runs only adds, so of several runs the quickest is nearest to
what a row takes. Prints tables in markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.instructions import Instructions

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "bench_rows.json"
BEGIN, END = "<!-- begin: made by benchmarks/bench.py -->", "<!-- end -->"
MAX_GAP = 0.01
PATIENCE_S = 900
"""A row that takes longer is stopped."""
YARDSTICK_ROUNDS = 1_000_000
_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024

HEAD = (
    "row", "model", "devices", "CPU s", "limit", "model s", "process CPU s", "yardstick s", "instructions",
    "peak GB", "limit", "gap", "step s", "solved", "verdict",
)  # fmt: skip
LAYERS_HEAD = ("row", "layer", "problems", "variables", "rows", "integer", "CPU s")


@dataclass(frozen=True)
class Row:
    """A planning problem; `max_cpu_s` and `max_bytes` are what it may take, None where it is only watched.

    The whole space is searched, unless the row is of what programs can be written for; for `time_limit_s` at
    most, where a proof takes too long to wait for.
    """

    name: str
    model: str
    cluster: str
    global_batch: int
    seq_len: int | None = None
    num_layers: int | None = None
    pins: Mapping[str, Any] = field(default_factory=dict)
    space: Literal["programs", "whole"] = "whole"
    max_cpu_s: float | None = None
    max_bytes: float | None = None
    time_limit_s: float | None = None
    others: str = ""


@dataclass(frozen=True)
class Result:
    """What a row took, and the plan; with an `error`, no plan.

    `cpu_s` is processor time after the import of torch, of which the user's model takes `model_s`: to import
    what it is written in, and to build it. `process_cpu_s` is that of the whole process, `yardstick_s` what
    fixed work took around it, `instructions` what was executed in `cpu_s`, 0 where it cannot be counted;
    `layers` are those of the certificate.
    """

    cpu_s: float = 0.0
    model_s: float = 0.0
    process_cpu_s: float = 0.0
    yardstick_s: float = 0.0
    instructions: int = 0
    peak_bytes: float = 0.0
    num_devices: int = 0
    gap: float = 1.0
    step_s: float = 0.0
    plan: str = ""
    num_solved: int = 0
    num_candidates: int = 0
    pruned: Mapping[str, int] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Any]] = ()
    error: str = ""


def measured(row: Row) -> Result:
    """Plan the row in this process, which should have done nothing before.

    Imports stand here because they are part of what is measured.
    """
    import torch  # noqa: F401  not counted: every user of a torch model has it already

    before_s, counter = time.process_time(), Instructions()
    import autopar
    from autopar import models

    imported_s = time.process_time()
    spec = models.load(row.model, seq_len=row.seq_len)
    if row.num_layers is not None:
        spec.config.num_hidden_layers = row.num_layers
        spec = models.from_hugging_face_config(spec.config, row.name, seq_len=row.seq_len)
    model = spec.build_without_memory()
    built_s = time.process_time()
    pins = {key: tuple(value) if isinstance(value, list) else value for key, value in row.pins.items()}
    found = autopar.plan(
        model, row.cluster, inputs=spec.inputs, name=spec.name, global_batch=row.global_batch,
        pins=pins or None, space=row.space, price_pins=False, time_limit_s=row.time_limit_s,
    )  # fmt: skip
    certificate = found.certificate
    return Result(
        cpu_s=time.process_time() - before_s,
        model_s=built_s - imported_s,
        process_cpu_s=time.process_time(),
        instructions=counter.count or 0,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES,
        num_devices=found.cluster.num_devices,
        gap=certificate.gap,
        step_s=found.prediction.step_s,
        plan=str(found.parallelism),
        num_solved=certificate.num_solved,
        num_candidates=certificate.num_candidates,
        pruned=dict(certificate.pruned),
        layers=[
            {name: getattr(each, name) for name in type(each).model_fields} for each in certificate.layers
        ],
    )


def yardstick_s() -> float:
    """Processor seconds of a fixed piece of work on Python's objects, which is what a search mostly does."""
    before_s = time.process_time()
    seen: dict[tuple[int, int], float] = {}
    for number in range(YARDSTICK_ROUNDS):
        place = number % 1009, number % 997
        seen[place] = seen.get(place, 0.0) + number / 3
    sorted(seen.items(), key=lambda item: item[1])
    return time.process_time() - before_s


def run(row: Row) -> Result:
    """`measured` in a fresh process."""
    before_s = yardstick_s()
    command = [sys.executable, "-m", "benchmarks.bench", "--measure", row.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return Result(error=f"stopped after {PATIENCE_S} s")
    if done.returncode:
        return Result(error=(done.stderr.strip().splitlines() or ["no message"])[-1])
    found = Result(**json.loads(done.stdout.splitlines()[-1]))
    return replace(found, yardstick_s=(before_s + yardstick_s()) / 2)


def quickest(row: Row, num_runs: int) -> Result:
    """The run with the fewest processor seconds of so many, or the first that failed."""
    found = [run(row)]
    while len(found) < num_runs and not found[-1].error:
        found.append(run(row))
    return found[-1] if found[-1].error else min(found, key=lambda result: result.cpu_s)


def misses(row: Row, result: Result) -> Iterator[str]:
    """What of its limits a row exceeds, in words."""
    if result.error:
        yield result.error
        return
    if row.max_cpu_s is not None and result.cpu_s > row.max_cpu_s:
        yield f"{result.cpu_s / row.max_cpu_s:.2f} times the time"
    if row.max_bytes is not None and result.peak_bytes > row.max_bytes:
        yield f"{result.peak_bytes / row.max_bytes:.2f} times the memory"
    if result.gap > MAX_GAP:
        yield f"gap above {MAX_GAP:.0%}"


def cells(row: Row, result: Result) -> tuple[str, ...]:
    """A row of the table."""
    missed = "; ".join(misses(row, result))
    if result.error:
        return (row.name, row.model, *["-"] * (len(HEAD) - 3), f"**failed**: {missed}")
    return (
        row.name,
        row.model,
        f"{result.num_devices:,}",
        f"{result.cpu_s:.1f}",
        "-" if row.max_cpu_s is None else f"{row.max_cpu_s:g}",
        f"{result.model_s:.1f}",
        f"{result.process_cpu_s:.1f}",
        f"{result.yardstick_s:.2f}",
        f"{result.instructions / 1e9:.1f} G" if result.instructions else "-",
        f"{result.peak_bytes / 1e9:.2f}",
        "-" if row.max_bytes is None else f"{row.max_bytes / 1e9:g}",
        f"{result.gap:.2%}",
        f"{result.step_s:.4g}",
        f"{result.num_solved:,} of {result.num_candidates:,}",
        f"**missed**: {missed}" if missed else "met",
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def report(found: Sequence[tuple[Row, Result]]) -> str:
    """Three tables: what rows took and may take; their plans, what was pruned, and what other planners take;
    and what the layers of each search had to solve."""
    taken = [cells(row, result) for row, result in found]
    plans = [(row.name, result.plan or "-", _pruned(result), row.others or "-") for row, result in found]
    layers = [line for row, result in found for line in _layers(row, result)]
    tables = (HEAD, taken), (("row", "plan", "pruned", "others"), plans), (LAYERS_HEAD, layers)
    return "\n\n".join(markdown(head, lines) for head, lines in tables)


def _layers(row: Row, result: Result) -> Iterator[tuple[str, ...]]:
    """A line for each layer; the sizes are those of its largest problem."""
    for layer in result.layers:
        sizes = (layer[name] for name in ("num_variables", "num_rows", "num_integer"))
        numbers = (f"{size:,}" if layer["num_variables"] else "-" for size in sizes)
        yield row.name, layer["layer"], f"{layer['num_problems']:,}", *numbers, f"{layer['cpu_s']:.2f}"


def _pruned(result: Result) -> str:
    return ", ".join(f"{count:,} by {why}" for why, count in result.pruned.items() if count) or "-"


def rows_of_file() -> dict[str, Row]:
    """The rows of `bench_rows.json` by name."""
    data = json.loads(ROWS.read_text(encoding="utf-8"))
    return {item["name"]: Row(**item) for item in (*data["targets"], *data["growth"])}


def _into_page(page: Path, text: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """The command line of the module's docstring."""
    rows = rows_of_file()
    parser = argparse.ArgumentParser(description="what a plan costs to find")
    parser.add_argument("--row", action="append", choices=rows, help="one of the rows; may be repeated")
    parser.add_argument("--runs", type=int, default=1, help="how often, of which the quickest counts")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--measure", choices=rows, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(asdict(measured(rows[arguments.measure]))))
        return
    found = []
    for row in [rows[name] for name in arguments.row or rows]:
        result = quickest(row, arguments.runs)
        found.append((row, result))
        print(f"{row.name}: {'; '.join(misses(row, result)) or 'met'}", file=sys.stderr)
    text = report(found)
    print(text)
    if arguments.page:
        _into_page(arguments.page, text)


if __name__ == "__main__":
    main()
