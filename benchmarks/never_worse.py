"""Never worse than a person: published runs as they were configured, against the plan that the search finds.

    .venv/bin/python -m benchmarks.never_worse                        all complete runs (tiers A and B)
    .venv/bin/python -m benchmarks.never_worse --group calculon       runs whose group begins so
    .venv/bin/python -m benchmarks.never_worse --limit 10             the first problems only

Both are priced by the same code for the same problem: model, cluster, global batch, sequence, era of
software, optimizer policy and memory. Runs that state the same problem share one search. A ratio is the time
of the plan's step over that of the run's; above 1 the search missed what a person found. A configuration that
the search could not even have chosen says so: the settings that `autopar.search.space` does not list.

Exits with 1 when a plan is slower than a run by more than the gap at which the search stops.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import graphs
from autopar.plan import Parallelism
from autopar.records.clusters import cluster_of
from autopar.records.configuration import Configuration, configuration
from autopar.records.models import ModelKey, model_key, model_of
from autopar.records.predict import FAILURES, LOW_PRECISIONS, Run, RunPredictor, captured
from autopar.records.schema import Record, read_records
from autopar.search.outcome import Solved
from autopar.search.planner import TOLERANCE, Planner
from autopar.search.space import ways
from costmodel import OptimizerPolicy, Software, software, usual_policy
from graphs import Capture
from hardware_db import Cluster

PUBLISHED = Path(__file__).parent / "published.json"
TIERS = ("A", "B")
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
    era = software(how.era)
    if how.tp_overlap:
        era = replace(era, tensor_parallel_overlap=1.0)
    return Problem(
        model=model_key(record),
        cluster=with_usable_memory(cluster_of(record)),
        global_batch=how.known.global_batch,
        era=era,
        policy=usual_policy(how.era, how.precision, how.known.zero_stage, fsdp=how.fsdp),
        low_precision=how.compute_dtype if how.compute_dtype in LOW_PRECISIONS else None,
    )


def with_usable_memory(cluster: Cluster) -> Cluster:
    """The cluster with what runs could really use, as records are judged: GB on a label are nearer to GiB."""
    memory = cluster.device.memory
    if memory.capacity_published_as != "GB_label":
        return cluster
    capacity = memory.capacity_bytes.scaled(2**30 / 1e9, "GiB in place of the label's GB")
    device = cluster.device.model_copy(
        update={"memory": memory.model_copy(update={"capacity_bytes": capacity})}
    )
    return replace(cluster, device=device)


def compared(records: Sequence[Record]) -> list[Comparison]:
    """The comparisons of runs of one model, which is captured once, each problem searched once."""
    try:
        runs = RunPredictor(captured(records[0]))
        spec = model_of(records[0])
        capture = graphs.capture(spec.build_without_memory(), spec.inputs, name=spec.name)
    except FAILURES as error:
        return [_unjudged(record, str(error)) for record in records]
    return list(_compared(records, runs, capture))


def _compared(records: Sequence[Record], runs: RunPredictor, capture: Capture) -> Iterator[Comparison]:
    problems: dict[str, Problem] = {}
    found: dict[str, tuple[Planner, Solved | None]] = {}
    for record in records:
        try:
            how = configuration(record)
            problem = problem_of(record, how)
            if problem.low_precision is not None:
                yield _unjudged(record, f"products in {problem.low_precision} are not searched")
                continue
            run = runs.best(record, how, problem.cluster)
            key = next((name for name, known in problems.items() if known == problem), record.id)
            if key not in found:
                problems[key] = problem
                found[key] = _searched(problem, capture)
            yield _comparison(record, how, run, *found[key])
        except FAILURES as error:
            yield _unjudged(record, str(error))


def _searched(problem: Problem, capture: Capture) -> tuple[Planner, Solved | None]:
    planner = Planner(
        capture, problem.cluster, problem.policy, problem.era, global_batch=problem.global_batch,
    )  # fmt: skip
    best = planner.search().best
    return planner, None if best is None else planner.finish(best)


def _comparison(
    record: Record, how: Configuration, run: Run, planner: Planner, best: Solved | None
) -> Comparison:
    p = run.parallelism
    fits = run.held_bytes(how) <= planner.cluster.device.memory_bytes
    remarks = [*_unlisted(planner, p)]
    if not fits:
        remarks.append("as it ran it does not fit our model of memory")
    if how.recompute_share < 1:
        remarks.append(f"{how.recompute_share:.0%} of its layers recomputed")
    if how.offload_share:
        remarks.append(f"activations of {how.offload_share:.0%} of its layers offloaded")
    if best is None:
        remarks.append("no plan fits")
    return Comparison(
        record_id=record.id,
        run_s=run.evaluated.step_s,
        plan_s=0.0 if best is None else best.evaluated.step_s,
        run=str(p),
        plan="-" if best is None else str(best.parallelism),
        remarks=tuple(remarks),
        is_judged=fits,
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
        yield f"not in the space: {', '.join(alone) or 'these degrees together'}"
        return
    offered = list(ways(listed[wanted], planner.cluster, planner.degrees, planner.pins))
    pairs = [("schedule", "num_virtual_stages")]
    if p.dp_shard * p.cp > 1:  # else there is nobody to share with, whatever the stage
        pairs.append(("zero_stage", "dp_shard"))
    for pair in pairs:
        value = tuple(getattr(p, name) for name in pair)
        if value not in {tuple(getattr(way, name) for name in pair) for way in offered}:
            yield f"not in the space: {', '.join(f'{n}={v}' for n, v in zip(pair, value, strict=True))}"


def _unjudged(record: Record, reason: str) -> Comparison:
    return Comparison(record.id, 0.0, 0.0, "-", "-", (reason,), is_judged=False)


def batches_of(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one model together."""
    batches: dict[object, list[Record]] = {}
    for record in records:
        batches.setdefault(model_key(record), []).append(record)
    return list(batches.values())


def report(found: Sequence[Comparison]) -> str:
    """A summary and two tables in markdown: what is judged, worst first, and what cannot be."""
    judged = sorted((one for one in found if one.is_judged), key=lambda one: -_badness(one))
    others = [one for one in found if not one.is_judged]
    missed = [one for one in judged if is_missed(one)]
    ratios = [one.ratio for one in judged if one.plan_s] or [float("nan")]
    summary = (
        f"{len(judged)} of {len(found)} runs judged: {len(missed)} plans slower than the run, worst "
        f"{max(ratios):.3f}, median {median(ratios):.3f}, best {min(ratios):.3f} of its time."
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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (all processors)")
    arguments = parser.parse_args()
    records = [
        record for record in read_records(PUBLISHED)
        if record.tier in TIERS and record.group.startswith(arguments.group)
    ]  # fmt: skip
    batches = batches_of(records[: arguments.limit])
    found: list[Comparison] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for comparisons in pool.map(compared, batches):
            found += comparisons
            print(f"{len(found)} of {len(records[: arguments.limit])} runs", file=sys.stderr)
    print(report(found))
    sys.exit(any(map(is_missed, found)))


if __name__ == "__main__":
    main()
