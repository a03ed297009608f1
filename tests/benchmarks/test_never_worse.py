"""Published runs against plans: what counts as the same problem, what as missed, and one run for real."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.records.configuration import configuration
from autopar.records.schema import Record, read_records
from benchmarks.never_worse import (
    OUTSIDE,
    PUBLISHED,
    Comparison,
    Problem,
    compared,
    is_missed,
    problem_of,
    report,
)


def record(record_id: str) -> Record:
    return next(each for each in read_records(PUBLISHED) if each.id == record_id)


def problem(record_id: str) -> Problem:
    found = record(record_id)
    return problem_of(found, configuration(found))


def test_runs_of_one_job_pose_one_problem_whatever_their_settings() -> None:
    first = problem("vtrain-multi-3.6B-t16d4p1m32-21")
    assert first == problem("vtrain-multi-3.6B-t16d4p1m16-22")
    assert first != problem("llm-foundry-a100-80-125m-s2048-n8-mb40")


def test_low_precision_and_the_memory_that_runs_could_use_are_part_of_the_problem() -> None:
    found = problem("llm-foundry-h100-3b-s2048-n8-mb10-fp8")
    assert found.low_precision == "fp8"
    assert found.cluster.device.memory_bytes == pytest.approx(80 * 2**30)
    assert problem("llm-foundry-a100-80-125m-s2048-n8-mb40").low_precision is None


def test_a_plan_may_be_slower_by_the_tolerance_of_the_search_and_no_more() -> None:
    same = Comparison("same", 1.0, 1.004, "run", "plan")
    assert not is_missed(same)
    assert is_missed(replace(same, plan_s=1.02))
    assert is_missed(replace(same, plan_s=0.0))
    assert not is_missed(replace(same, plan_s=0.0, is_judged=False))


def test_the_report_counts_and_has_the_worst_first() -> None:
    found = [
        Comparison("good", 2.0, 1.0, "run", "plan"),
        Comparison("bad", 1.0, 1.5, "run", "plan", (f"{OUTSIDE}: tp=7",)),
        Comparison("unknown", 0.0, 0.0, "-", "-", ("no such device",), is_judged=False),
    ]
    text = report(found)
    summary = text.splitlines()[0]
    assert "3 runs, 2 judged: 1 plans slower than the run, 1 runs outside of the space" in summary
    assert "worst 1.500" in summary
    assert text.index("bad") < text.index("good") < text.index("unknown")


def test_the_plan_for_a_published_run_is_no_slower_than_the_run() -> None:
    (found,) = compared([record("llm-foundry-a100-80-125m-s2048-n8-mb40")])
    assert found.is_judged
    assert found.ratio <= 1
    assert not any(OUTSIDE in remark for remark in found.remarks)


def test_a_search_without_time_is_not_judged_where_its_plan_is_slower() -> None:
    (found,) = compared([record("llm-foundry-a100-80-125m-s2048-n8-mb40")], seconds=0)
    assert found.plan_s > found.run_s
    assert not found.is_judged
    assert "time limit" in found.remarks[-1]
