"""How many parallelisms are priced in a second: GPT-3 175B on 1,024 A100, captured once.

python benchmarks/evaluations.py [ERA]
"""

from __future__ import annotations

import resource
import sys
import time

from autopar import models
from autopar.plan import Parallelism
from autopar.pricing import DEFAULT_SOFTWARE
from autopar.report.table import table
from autopar.request import training_policy
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.given import GivenPrograms, evaluate_given
from autopar.search.pins import Pins
from autopar.search.planner import NUM_RUNNERS_UP
from autopar.search.shallow import shallow
from autopar.search.space import Degrees, layouts, ways
from autopar.search.units import RECOMPUTE_MODES
from costmodel import software
from graphs import capture
from hardware_db import cluster

MODEL, CLUSTER, GLOBAL_BATCH = "gpt3-175b", "dgx-a100*128", 1536
TENSOR_DEGREES = (1, 2, 4, 8)
NUM_LAYERS = 96


class Sweep:
    """Everything that is made after the capture, and how long that took."""

    def __init__(self, era: str) -> None:
        spec = models.load(MODEL)
        self.capture = capture(spec.build_without_memory(), spec.inputs, name=MODEL)
        self.machine = cluster(CLUSTER)
        self.captured_bytes = peak_bytes()
        began_s = time.process_time()
        degrees = Degrees(TENSOR_DEGREES, (1,), (1,), NUM_LAYERS, programs_only=True)
        self.candidates = tuple(
            p.model_copy(update={"recompute": mode})
            for layout in layouts(self.machine, GLOBAL_BATCH, degrees, Pins())
            for p in ways(layout, self.machine, degrees, Pins())
            for mode in RECOMPUTE_MODES
        )
        self.programs = GivenPrograms(shallow(self.capture))
        self.found = self.priced(era)
        self.cold_s = time.process_time() - began_s
        began_s = time.process_time()
        self.priced(era)
        self.warm_s = time.process_time() - began_s

    def priced(self, era: str) -> list[Evaluated]:
        """Every candidate's price, by a new evaluator."""
        evaluator = Evaluator(self.machine, training_policy(self.capture.graph), software(era))
        return [evaluate_given(self.programs, evaluator, p) for p in self.candidates]


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def values(found: tuple[Parallelism, ...], name: str) -> str:
    """The values that a setting takes in a sweep."""
    return ", ".join(map(str, dict.fromkeys(getattr(p, name) for p in found)))


def main() -> None:
    era = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_SOFTWARE
    sweep = Sweep(era)
    print(f"{MODEL} on {CLUSTER}, global batch {GLOBAL_BATCH}, {era}: {len(sweep.candidates):,} candidates")
    axes = ("tp", "pp", "num_virtual_stages", "dp", "zero_stage", "microbatch_size", "recompute", "schedule")
    print("\n".join(table([(name, values(sweep.candidates, name)) for name in axes])))
    rows = [("", "CPU s", "evaluations per CPU s")]
    for what, seconds in (("all after the capture", sweep.cold_s), ("programs known", sweep.warm_s)):
        rows.append((what, f"{seconds:.2f}", f"{len(sweep.candidates) / seconds:,.0f}"))
    print("\n".join(table(rows, right=(1, 2), indent="")))
    held = (
        f"{peak_bytes() / 1e6:,.0f} MB, {sweep.captured_bytes / 1e6:,.0f} MB of it by the end of the capture"
    )
    print(f"peak memory {held}")
    fitting = sorted((each for each in sweep.found if each.fits), key=lambda each: each.step_s)
    best = [("step s", "peak GB", "parallelism")]
    for each in fitting[: NUM_RUNNERS_UP + 1]:
        best.append((f"{each.step_s:.2f}", f"{each.peak_memory_bytes / 1e9:.1f}", str(each.parallelism)))
    print("\n".join(table(best, right=(0, 1), indent="")))


if __name__ == "__main__":
    main()
