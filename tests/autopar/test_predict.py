"""Published runs, predicted from their models: the figures that a reader of docs/accuracy.md relies on."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.records.clusters import cluster_of
from autopar.records.configuration import configuration
from autopar.records.predict import RunPredictor, by_model, captured, predict
from autopar.records.schema import Record, read_records
from costmodel import usual_policy

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published.json"


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    return {record.id: record for record in read_records(PUBLISHED)}


def test_korthikanti_table_5(records: dict[str, Record]) -> None:
    """Sequence parallelism and selective recomputation from 22B to 1T parameters (arXiv:2205.05198)."""
    runs = [record for record in records.values() if record.group == "korthikanti-table5"]
    errors = _errors(runs)
    assert sum(map(abs, errors)) / len(errors) <= 0.035
    assert max(map(abs, errors)) <= 0.08


def test_memory_of_truncated_llama_70b_on_b200(records: dict[str, Record]) -> None:
    runs = [record for record in records.values() if record.group == "simumax-b200-llama70b"][:8]
    for record, prediction in zip(runs, predict(runs, num_workers=1), strict=True):
        assert prediction.memory_bytes == pytest.approx(record.memory_bytes, rel=0.03)


def test_parallelisms_of_one_model_are_ranked_as_measured(records: dict[str, Record]) -> None:
    """18.4B-parameter GPT on 512 A100 is one capture for all parallelisms, and the order is right."""
    runs = [
        r for r in records.values() if r.id.startswith("vtrain-multi-3.6B-t") and r.batch.micro_batch == 8
    ]
    assert len(by_model(runs)) == 1
    predictions = predict(runs, num_workers=1)
    predicted = sorted(range(len(runs)), key=lambda n: predictions[n].step_time_s or 0.0)
    measured = sorted(range(len(runs)), key=lambda n: runs[n].step_time_s or 0.0)
    assert predicted[0] == measured[0]
    assert predicted[-1] == measured[-1]


def test_an_open_setting_takes_the_fastest_that_fits(records: dict[str, Record]) -> None:
    record = records["sc21-t1-1.7B"]
    how = configuration(record)
    assert len(how.microbatch_sizes) > 1
    runs = RunPredictor(captured(record))
    every = runs.runs(record, how, cluster_of(record))
    best = runs.best(record, how, cluster_of(record))
    assert best.evaluated.fits
    assert best.evaluated.step_s == min(run.evaluated.step_s for run in every)


def test_a_record_that_cannot_be_predicted_says_why(records: dict[str, Record]) -> None:
    good = records["korth-22B-full"]
    bad = good.model_copy(
        update={"id": "bad", "cluster": good.cluster.model_copy(update={"accelerator": "A1000"})}
    )
    odd = good.model_copy(update={"id": "odd", "model": good.model.model_copy(update={"heads": 63})})
    first, second = predict([bad, odd], num_workers=1)
    assert first.step_time_s is None
    assert "A1000" in (first.failure or "")
    assert second.step_time_s is None
    assert "63" in (second.failure or "")


def test_policies_follow_the_run() -> None:
    assert usual_policy("unfused-2020", "fp16").name == "adamw-mixed-fp32-gradients"
    assert usual_policy("torch-eager", "bf16", 3, fsdp=True).name == "adamw-sharded-fp32"


def _errors(runs: list[Record]) -> list[float]:
    predictions = predict(runs, num_workers=1)
    return [
        (prediction.step_time_s or 0.0) / (record.step_time_s or 1.0) - 1
        for record, prediction in zip(runs, predictions, strict=True)
    ]
