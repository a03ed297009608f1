"""Never worse than a person: published runs as they were configured, against the plan that the search finds.

    .venv/bin/python -m benchmarks.never_worse                        all complete runs (tiers A and B)
    .venv/bin/python -m benchmarks.never_worse --group calculon       runs whose group begins so
    .venv/bin/python -m benchmarks.never_worse --limit 10             the first runs only
    .venv/bin/python -m benchmarks.never_worse --seconds 60           no search takes longer

Both are priced by the same code for the same problem: model, cluster, global batch, sequence, era of
software, optimizer policy, precision of products, and memory. Runs that state the same problem share one
search. A ratio is the time of the plan's step over that of the run's; above 1 the search missed what a person
found. A configuration that the search could not even have chosen says so: the settings that
`autopar.search.space` does not list. A search that was stopped is judged only if its plan is no slower.

Exits with 1 when a plan is slower than a run by more than the gap at which the search stops.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import graphs
from autopar.plan import Parallelism
from autopar.records.clusters import cluster_of
from autopar.records.configuration import Configuration, configuration
from autopar.records.models import ModelKey, model_key, model_of
from autopar.records.predict import FAILURES, Run, RunPredictor, by_model, capacity_bytes, captured
from autopar.records.schema import Record, read_records
from autopar.request import with_memory
from autopar.search.planner import TOLERANCE, Planner, SearchResult
from autopar.search.space import ways
from costmodel import OptimizerPolicy, Software, software, usual_policy
from graphs import Capture
from hardware_db import Cluster

PUBLISHED = Path(__file__).parent / "published.json"
TIERS = ("A", "B")
OUTSIDE = "not in the space"
HEAD = ("ratio", "run", "run s", "plan s", "as it ran", "plan", "remarks")


@dataclass(frozen=True)
class Problem:
    """What is asked of the search."""

    model: ModelKey
    cluster: Cluster
    global_batch: int
    era: Software
    policy: OptimizerPolicy
    low_precision: str | None


Search = tuple[Planner, SearchResult] | str
"""A planner with the best plan that it found, or why there is none to compare with."""


@dataclass(frozen=True)
class Comparison:
    """One run beside the plan for its problem: seconds of a step, 0 where there is none, and remarks."""

    record_id: str
    run_s: float
    plan_s: float
    run: str
    plan: str
    remarks: tuple[str, ...] = ()
    is_judged: bool = True

    @property
    def ratio(self) -> float:
        return self.plan_s / self.run_s if self.run_s else float("nan")


def problem_of(record: Record, how: Configuration) -> Problem:
    """The problem that a run solved. Raises what the records package does."""
    era = how.used(software(how.era))
    cluster = cluster_of(record)
    return Problem(
        model=model_key(record),
        cluster=with_memory(cluster, capacity_bytes(cluster.device), "as published runs are judged"),
        global_batch=how.known.global_batch,
        era=era,
        policy=usual_policy(how.era, how.precision, how.known.zero_stage, fsdp=how.fsdp),
        low_precision=how.low_precision,
    )


def compared(records: Sequence[Record], seconds: float | None = None) -> list[Comparison]:
    """The comparisons of runs of one model, which is captured once, each problem searched once and for no
    more than some `seconds`."""
    try:
        runs = RunPredictor(captured(records[0]))
        spec = model_of(records[0])
        capture = graphs.capture(spec.build_without_memory(), spec.inputs, name=spec.name)
    except FAILURES as error:
        return [_unjudged(record, str(error)) for record in records]
    return list(_compared(records, runs, capture, seconds))


def _compared(
    records: Sequence[Record], runs: RunPredictor, capture: Capture, seconds: float | None
) -> Iterator[Comparison]:
    found: list[tuple[Problem, Search]] = []
    for record in records:
        try:
            how = configuration(record)
            problem = problem_of(record, how)
            run = runs.best(record, how, problem.cluster)
            search = next((search for known, search in found if known == problem), None)
            if search is None:
                search = _searched(problem, capture, seconds)
                found.append((problem, search))
        except FAILURES as error:
            yield _unjudged(record, str(error))
            continue
        yield _unjudged(record, search) if isinstance(search, str) else _comparison(record, how, run, *search)


def _searched(problem: Problem, capture: Capture, seconds: float | None) -> Search:
    planner = Planner(
        capture, problem.cluster, problem.policy, problem.era, global_batch=problem.global_batch,
        low_precision=problem.low_precision, time_limit_s=seconds,
    )  # fmt: skip
    try:
        return planner, planner.search()
    except FAILURES as error:
        return str(error)


def _comparison(
    record: Record, how: Configuration, run: Run, planner: Planner, result: SearchResult
) -> Comparison:
    p, best = run.parallelism, result.best
    is_judged = fits = run.held_bytes(how) <= planner.cluster.device.memory_bytes
    remarks = [f"{OUTSIDE}: {words}" for words in _unlisted(planner, p)]
    if not fits:
        remarks.append("as it ran it does not fit our model of memory")
    if how.recompute_share < 1:
        remarks.append(f"{how.recompute_share:.0%} of its layers recomputed")
    if how.offload_share:
        remarks.append(f"{OUTSIDE}: activations of {how.offload_share:.0%} of its layers offloaded")
    if best is None:
        remarks.append("no plan fits")
    elif result.stopped:
        remarks.append(f"the search was stopped ({result.stopped})")
        is_judged = fits and best.evaluated.step_s <= run.evaluated.step_s
    return Comparison(
        record_id=record.id,
        run_s=run.evaluated.step_s,
        plan_s=0.0 if best is None else best.evaluated.step_s,
        run=str(p),
        plan="-" if best is None else str(best.parallelism),
        remarks=tuple(remarks),
        is_judged=is_judged,
    )


def _unlisted(planner: Planner, p: Parallelism) -> Iterator[str]:
    """The settings of a parallelism that the space does not have, in words; what is computed again and the
    strategies of the tensor axis are for the search to choose, and no matter of the space."""
    names = ("microbatch_size", "tp", "cp", "ep", "pp")
    wanted = tuple(getattr(p, name) for name in names)
    listed = {tuple(getattr(layout, name) for name in names): layout for layout in planner.layouts}
    if wanted not in listed:
        columns = list(zip(*listed, strict=True))
        alone = [
            f"{name}={value}" for name, value, column in zip(names, wanted, columns, strict=True)
            if value not in column
        ]  # fmt: skip
        yield ", ".join(alone) or "these degrees together"
        return
    offered = list(ways(listed[wanted], planner.cluster, planner.degrees, planner.pins))
    pairs = [("schedule", "num_virtual_stages")]
    if p.dp_shard * p.cp > 1:  # else there is nobody to share with, whatever the stage
        pairs.append(("zero_stage", "dp_shard"))
    for pair in pairs:
        value = tuple(getattr(p, name) for name in pair)
        if value not in {tuple(getattr(way, name) for name in pair) for way in offered}:
            yield ", ".join(f"{n}={v}" for n, v in zip(pair, value, strict=True))


def _unjudged(record: Record, reason: str) -> Comparison:
    return Comparison(record.id, 0.0, 0.0, "-", "-", (reason,), is_judged=False)


def report(found: Sequence[Comparison]) -> str:
    """A summary and two tables in markdown: what is judged, worst first, and what cannot be."""
    judged = sorted((one for one in found if one.is_judged), key=lambda one: -_badness(one))
    others = [one for one in found if not one.is_judged]
    missed = [one for one in judged if is_missed(one)]
    outside = [one for one in found if any(OUTSIDE in remark for remark in one.remarks)]
    ratios = [one.ratio for one in judged if one.plan_s] or [float("nan")]
    summary = (
        f"{len(found)} runs, {len(judged)} judged: {len(missed)} plans slower than the run, {len(outside)} "
        f"runs outside of the space; plan over run at worst {max(ratios):.3f}, median {median(ratios):.3f}, "
        f"at best {min(ratios):.3f}."
    )
    return "\n\n".join([summary, _table(judged), f"{len(others)} not judged:", _table(others)])


def is_missed(one: Comparison) -> bool:
    """Whether a person found something better, or anything where the search found nothing."""
    return one.is_judged and (not one.plan_s or one.ratio > 1 + TOLERANCE)


def _badness(one: Comparison) -> float:
    return one.ratio if one.plan_s else float("inf")


def _table(found: Sequence[Comparison]) -> str:
    rows = [
        (
            f"{one.ratio:.3f}" if one.plan_s else "-", one.record_id, f"{one.run_s:.4g}", f"{one.plan_s:.4g}",
            one.run, one.plan, "; ".join(one.remarks).replace("|", "/").replace("\n", " "),
        )
        for one in found
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *rows))


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description="published runs against the plans that the search finds")
    parser.add_argument("--group", default="", help="only runs whose group begins so")
    parser.add_argument("--limit", type=int, help="only so many runs")
    parser.add_argument("--seconds", type=float, help="the longest that a search may take (no limit)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (all processors)")
    arguments = parser.parse_args()
    records = [
        record for record in read_records(PUBLISHED)
        if record.tier in TIERS and record.group.startswith(arguments.group)
    ][: arguments.limit]  # fmt: skip
    found: list[Comparison] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for comparisons in pool.map(partial(compared, seconds=arguments.seconds), by_model(records)):
            found += comparisons
            for one in comparisons:
                print(f"{len(found)} of {len(records)}: {one.ratio:.3f} {one.record_id}", file=sys.stderr)
    print(report(found))
    sys.exit(any(map(is_missed, found)))


if __name__ == "__main__":
    main()
