"""How long capture and search take.

python benchmarks/plan_speed.py [MODEL CLUSTER GLOBAL_BATCH]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from autopar import api, models
from autopar.report.table import table
from graphs import capture

CASES = (
    ("gpt2", "dgx-a100", 64),
    ("llama3-8b", "dgx-h100*8", 512),
    ("llama3-70b", "dgx-h100*32", 1024),
    ("gpt3-175b", "dgx-a100*128", 1536),
)

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds that `call` took, and what it returned."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def measure(model: str, cluster: str, global_batch: int) -> tuple[str, ...]:
    """One row: capture and search times, and what was found."""
    spec = models.load(model)
    capture_s, captured = timed(lambda: capture(spec.build_without_memory(), spec.inputs, name=model))
    search_s, plan = timed(lambda: api.plan(captured, cluster, global_batch=global_batch))
    searched = f"{plan.certificate.num_solved}/{plan.certificate.num_candidates}"
    times = f"{capture_s:.1f}", f"{search_s:.1f}"
    return model, cluster, *times, searched, f"{plan.prediction.step_s:.3f}", str(plan.parallelism)


def main() -> None:
    cases = ((sys.argv[1], sys.argv[2], int(sys.argv[3])),) if len(sys.argv) == 4 else CASES
    head = ("model", "cluster", "capture s", "search s", "solved", "step s", "plan")
    print("\n".join(table([head, *(measure(*case) for case in cases)], right=(2, 3, 4, 5), indent="")))


if __name__ == "__main__":
    main()
