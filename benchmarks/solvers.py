"""The solvers behind the seam, on the same models: size, processor seconds, what was proven and found.

python -m benchmarks.solvers [IOPDDL_INSTANCE...]        the paths are of the contest's own instances
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from autopar.report.table import table
from autopar.search.block_ilp import BlockIlp, MemoryPrice
from autopar.search.linear_model import Size
from autopar.search.solver import Backend, solve
from benchmarks.iopddl.instances import DIRECTORY, axis_problem
from benchmarks.iopddl.problem import read
from benchmarks.iopddl.program import solve_problem

TIME_LIMIT_S = 60.0
HEAD = ("problem", "solver", "variables", "rows", "CPU-s", "bound", "incumbent", "gap")


@dataclass(frozen=True)
class Measured:
    """One solver on one model; `incumbent` is None where it found nothing in the time."""

    size: Size
    cpu_s: float
    bound: float
    incumbent: float | None


def of_block(ilp: BlockIlp, price: MemoryPrice, backend: Backend) -> Measured:
    """One operator layer, at the price of memory; costs in milliseconds."""
    found = solve(ilp.priced(8, price), backend=backend, time_limit_s=TIME_LIMIT_S)
    return Measured(
        found.size, found.cpu_s, 1e3 * found.bound, 1e3 * found.objective if found.values else None
    )


def of_instance(path: Path, backend: Backend) -> Measured:
    """One contest problem, from its reduction to its score."""
    found = solve_problem(read(path), backend=backend, time_limit_s=TIME_LIMIT_S)
    return Measured(found.size, found.cpu_s, found.bound, found.incumbent)


def cases(paths: list[str]) -> Iterator[tuple[str, Callable[[Backend], Measured]]]:
    block = BlockIlp(axis_problem("llama3-8b", 8))
    yield "llama3-8b, tp 8", partial(of_block, block, MemoryPrice())
    yield "the same, memory priced", partial(of_block, block, MemoryPrice(1e-12, 1e-11))
    for path in paths or [str(DIRECTORY / "llama3-8b-tp8-tight.json"), str(DIRECTORY / "layers-30x4.json")]:
        yield Path(path).name.split(".")[0], partial(of_instance, Path(path))


def row(name: str, backend: Backend, found: Measured) -> tuple[str, ...]:
    incumbent, gap = "none", ""
    if found.incumbent is not None:
        incumbent, gap = f"{found.incumbent:.9g}", f"{max(0.0, 1 - found.bound / found.incumbent):.3%}"
    size = f"{found.size.variables:,}", f"{found.size.rows:,}"
    return name, backend, *size, f"{found.cpu_s:.2f}", f"{found.bound:.9g}", incumbent, gap


def main() -> None:
    paths = sys.argv[1:]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        sys.exit(f"no such instance: {', '.join(missing)}; our own are in {DIRECTORY}")
    backends: tuple[Backend, ...] = get_args(Backend)
    rows = [row(name, backend, run(backend)) for name, run in cases(paths) for backend in backends]
    print("\n".join(table([HEAD, *rows], right=(2, 3, 4, 5, 6, 7), indent="")))


if __name__ == "__main__":
    main()
