"""Predicts published runs: each record's model is captured once, and its configuration priced.

What a record leaves open is chosen as a person tuning the run would have: the fastest of the configurations
that agree with it and fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context

import graphs
from autopar.errors import AutoparError
from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.records.clusters import cluster_of
from autopar.records.configuration import Configuration, configuration
from autopar.records.metrics import Prediction
from autopar.records.models import ModelKey, layer_period, model_key, model_of, num_special_layers
from autopar.records.schema import Record
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.given import GivenPrograms, even_cuts
from autopar.search.shallow import Shallow, shallow
from autopar.search.units import Chain, Unit
from costmodel import CostModelError, Software, optimizer_policy, software
from graphs import GraphError
from hardware_db import Cluster, HardwareError

Progress = Callable[[str, int, int], None]

LOW_PRECISIONS = ("fp8", "fp4")
SHALLOW_DEPTH = 3
"""Layers that tell all of a uniform model: the first, one for those in between, and the last."""


def predict(
    records: Iterable[Record], progress: Progress | None = None, *, num_workers: int | None = None
) -> tuple[Prediction, ...]:
    """A prediction for every record, in their order; one that cannot be priced says why.

    Models are captured once each, in `num_workers` processes (by default one for each processor).
    """
    records = tuple(records)
    batches = list(_by_model(records).values())
    num_workers = min(num_workers or os.cpu_count() or 1, len(batches))
    found: dict[str, Prediction] = {}
    for predictions in _predictions(batches, num_workers):
        found.update((one.record_id, one) for one in predictions)
        if progress is not None:
            progress("predict", len(found), len(records))
    return tuple(found[record.id] for record in records)


def _predictions(batches: Sequence[Sequence[Record]], num_workers: int) -> Iterator[list[Prediction]]:
    if num_workers <= 1:
        yield from map(_predicted, batches)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_predicted, batch) for batch in batches]):
            yield future.result()


def _by_model(records: Iterable[Record]) -> dict[object, list[Record]]:
    """Records of one model together; those whose model is unknown alone, to fail by themselves."""
    batches: dict[object, list[Record]] = {}
    for record in records:
        try:
            key: object = model_key(record)
        except AutoparError:
            key = record.id
        batches.setdefault(key, []).append(record)
    return batches


def _predicted(records: Sequence[Record]) -> list[Prediction]:
    """The predictions for records of one model."""
    try:
        runs = RunPredictor(captured(records[0]))
    except (AutoparError, GraphError, CostModelError, HardwareError) as error:
        return [_failure(record, error) for record in records]
    return [runs.predict(record) for record in records]


def captured(record: Record) -> Shallow:
    """The record's model, captured at the least depth that tells all of it."""
    facts = record.model
    if layer_period(facts) > 1 or num_special_layers(facts) or facts.layers <= SHALLOW_DEPTH:
        spec = model_of(record)
        return shallow(graphs.capture(spec.build_without_memory(), spec.inputs, name=spec.name))
    spec = model_of(record, num_layers=SHALLOW_DEPTH)
    capture = graphs.capture(spec.build_without_memory(), spec.inputs, name=spec.name)
    middle = capture.graph.blocks[1].path
    return Shallow(capture, {middle: facts.layers - SHALLOW_DEPTH + 1})


@dataclass(frozen=True)
class Run:
    """One way to run a record: a parallelism with the cost of its step."""

    parallelism: Parallelism
    evaluated: Evaluated


class RunPredictor:
    """Prices the records of one model."""

    def __init__(self, model: Shallow, eras: Mapping[str, Software] | None = None) -> None:
        self.programs = GivenPrograms(model)
        self.eras = eras

    def predict(self, record: Record) -> Prediction:
        """The record's step: the fastest that fits of the ways to run it, or the smallest if none does."""
        try:
            runs = self.runs(record, configuration(record), cluster_of(record))
        except (AutoparError, GraphError, CostModelError, HardwareError) as error:
            return _failure(record, error)
        fitting = [run for run in runs if run.evaluated.fits]
        if fitting:
            best = min(fitting, key=lambda run: run.evaluated.step_s)
        else:
            best = min(runs, key=lambda run: run.evaluated.peak_memory_bytes)
        return Prediction(
            record_id=record.id,
            step_time_s=best.evaluated.step_s,
            memory_bytes=best.evaluated.peak_memory_bytes,
            fits=best.evaluated.fits,
            terms=dict(best.evaluated.step.terms),
            chosen=str(best.parallelism),
            global_batch=best.parallelism.global_batch,
        )

    def runs(self, record: Record, how: Configuration, cluster: Cluster) -> list[Run]:
        """Every way to run the record, priced."""
        era = self.eras[how.era] if self.eras else software(how.era)
        if how.tp_overlap:
            era = replace(era, tensor_parallel_overlap=1.0)
        evaluator = Evaluator(cluster, optimizer_policy(policy_of(how)), era)
        low_precision = how.compute_dtype if how.compute_dtype in LOW_PRECISIONS else None
        return [
            Run(p, self._evaluated(evaluator, how, p, low_precision)) for p in how.candidates()
        ]  # fmt: skip

    def _evaluated(
        self, evaluator: Evaluator, how: Configuration, p: Parallelism, low_precision: str | None
    ) -> Evaluated:
        chain = self.programs.chain(p, evaluator.era, low_precision)
        cuts = even_cuts(chain, p.pp * p.num_virtual_stages)
        if how.recompute_share < 1:
            chain = _partly_recomputed(chain, how.recompute_share)
        return evaluator.evaluate(chain.priced(evaluator.placed(p)), p, cuts)


def policy_of(how: Configuration) -> str:
    """The optimizer policy that such a run uses."""
    return "adamw-mixed-fp32-gradients"


def _partly_recomputed(chain: Chain, share: float) -> Chain:
    """The chain with only the first of its blocks, a `share` of them, recomputed."""
    blocks = [index for index, unit in enumerate(chain.units) if unit.is_block]
    others = set(blocks[round(share * len(blocks)) :])
    units: list[Unit] = [
        replace(unit, is_block=False, saved=dict.fromkeys(unit.saved, unit.saved["none"]), kernels=(*unit.kernels,))
        if index in others
        else unit
        for index, unit in enumerate(chain.units)
    ]
    return replace(chain, units=tuple(units))


def _failure(record: Record, error: Exception) -> Prediction:
    return Prediction(record.id, None, None, fits=False, failure=str(error))
