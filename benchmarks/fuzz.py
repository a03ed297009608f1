"""Random programs against their originals: any model, any form of parallelism, any legal strategy of any op.

    python -m benchmarks.fuzz --cases 2000 --seed 0

A case is a model, a form and everything else drawn at random (`tests.autopar.random_cases`); its program runs
one step on gloo ranks, and loss, every gradient and the parameters after the step are compared with those of
the original in one process. Cases go round all models and forms. Printed are a table of them, and for each
case that is not equal what happened with the command that runs it alone. Ctrl-C ends it with the table.

With `--shrink` a case that fails is run again with less and less of it split, and what is left is printed:
some dozens of runs, for mostly one or two ops that matter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from random import Random

from autopar.report.table import table
from tests.autopar.case_runner import CaseRunner, Result, original
from tests.autopar.random_cases import FORMS, RandomCase, forms_of, plan_for, random_case
from tests.autopar.shrinking import shrunk, splits
from tests.models import ALL

MODELS = tuple(each.name for each in ALL)


@dataclass
class Tally:
    """Of one form: what became of its cases, and the worst difference in each precision."""

    kinds: Counter[str] = field(default_factory=Counter)
    worst: dict[int, float] = field(default_factory=dict)

    def add(self, case: RandomCase, result: Result) -> None:
        self.kinds[result.kind] += 1
        width = case.dtype.itemsize
        self.worst[width] = max(self.worst.get(width, 0.0), result.difference)

    def row(self) -> tuple[str, ...]:
        worst = (f"{self.worst[width]:.0e}" if width in self.worst else "" for width in (8, 4, 2))
        cells = (str(self.kinds[kind]) for kind in ("refused", "failed"))
        return (str(self.kinds.total()), *cells, *worst)


def cases(models: Sequence[str], forms: Sequence[str], first_seed: int) -> Iterator[RandomCase]:
    """One case of every model and form, in random order, then one with the next seed, and so on."""
    pairs = [(model, form) for model in models for form in forms_of(model) if form in forms]
    for seed in count(first_seed):
        yield from (random_case(model, form, seed) for model, form in Random(seed).sample(pairs, len(pairs)))


def shrink(case: RandomCase, runner: CaseRunner) -> str:
    """What a case that fails needs for that: splits and recomputed blocks, a line for each."""
    given = original(case.model, case.dtype)
    small = shrunk(plan_for(case, given.capture), partial(runner.fails, case))
    modules = {op.name: op.module or "root" for op in given.capture.graph.ops}
    lines = [f"{axis}: {op} by {small.strategies[axis][op]}, in {modules[op]}" for axis, op in splits(small)]
    lines += [f"{each.mode} recomputation of {', '.join(each.blocks)}" for each in small.recomputation]
    return "\n".join(lines) or "nothing of it: it fails with every op whole on every rank of cp and tp"


def fuzz(drawn: Iterator[RandomCase], *, shrinks: bool = False) -> bool:
    """Run cases, print what they come to, and return whether all are equal to their originals or refused."""
    by_form: dict[str, Tally] = {}
    by_model: dict[str, Tally] = {}
    began = time.perf_counter()
    with CaseRunner(num_steps=1) as runner, suppress(KeyboardInterrupt):
        for case in drawn:
            result = runner.run(case)
            by_form.setdefault(case.form, Tally()).add(case, result)
            by_model.setdefault(case.model, Tally()).add(case, result)
            if result.kind != "equal":
                print(f"{result.kind}: {case}\n  {case.recipe}\n{_indented(result.text)}", flush=True)
            if result.kind == "failed" and shrinks:
                print(f"  fails with this alone:\n{_indented(shrink(case, runner))}", flush=True)
    for what, tallies in (("form", by_form), ("model", by_model)):
        head = (what, "cases", "refused", "failed", "worst fp64", "fp32", "half")
        print("\n" + "\n".join(table([head, *((name, *each.row()) for name, each in tallies.items())])))
    num_cases = sum(each.kinds.total() for each in by_form.values())
    took_s = time.perf_counter() - began
    print(f"\n{num_cases} cases in {took_s:.0f} s, {took_s / max(1, num_cases):.2f} s each")
    return not any(each.kinds["failed"] for each in by_form.values())


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.strip().splitlines()[-25:])


def main() -> int:
    parser = argparse.ArgumentParser(description="Random programs against their originals.")
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the first round of cases")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=tuple(FORMS), metavar="FORM")
    parser.add_argument("--only", type=int, metavar="SEED", help="run the one case of a model, form and seed")
    parser.add_argument("--shrink", action="store_true", help="find out what a failing case needs for that")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.only is not None:
        drawn = cases(options.models, options.forms, options.only)
        options.cases = 1
    else:
        drawn = cases(options.models, options.forms, options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return 0 if fuzz(islice(drawn, options.cases), shrinks=options.shrink) else 1


if __name__ == "__main__":
    sys.exit(main())
