"""Predicts published runs: each record's model is captured once, and its configuration priced.

What a record leaves open is chosen as a person tuning the run would have: the fastest of the configurations
that agree with it and fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import log, nan
from multiprocessing import get_context
from typing import TypeVar

import graphs
from autopar.errors import AutoparError
from autopar.plan import Parallelism, Recompute
from autopar.records.clusters import cluster_of
from autopar.records.configuration import Configuration, configuration
from autopar.records.metrics import Prediction
from autopar.records.models import layer_period, model_key, model_of, num_special_layers
from autopar.records.schema import MemoryKind, Record
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.given import GivenPrograms, evaluate_given, even_cuts
from autopar.search.shallow import Shallow, shallow
from autopar.search.units import Chain
from costmodel import CostModelError, Ledger, Software, software, usual_policy
from graphs import GraphError
from hardware_db import Accelerator, Cluster, HardwareError

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

FAILURES = (AutoparError, GraphError, CostModelError, HardwareError)
"""Why a record may have no prediction."""

SHALLOW_DEPTH = 3
"""Layers that tell all of a uniform model: the first, one for those in between, and the last."""


def predict(
    records: Iterable[Record], progress: Progress | None = None, *, num_workers: int | None = None
) -> tuple[Prediction, ...]:
    """A prediction for every record, in their order; one that cannot be priced says why.

    Models are captured once each, in `num_workers` processes (by default one for each processor).
    """
    records = tuple(records)
    batches = by_model(records)
    found: dict[str, Prediction] = {}
    for predictions in _in_processes(_predicted, batches, num_workers):
        found.update((one.record_id, one) for one in predictions)
        if progress is not None:
            progress("predict", len(found), len(records))
    return tuple(found[record.id] for record in records)


def by_model(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one model together; those whose model is unknown alone, to fail by themselves."""
    batches: dict[object, list[Record]] = {}
    for record in records:
        try:
            key: object = model_key(record)
        except (AutoparError, HardwareError):
            key = record.id
        batches.setdefault(key, []).append(record)
    return list(batches.values())


def captured_all(
    batches: Sequence[Sequence[Record]], progress: Progress | None = None, num_workers: int | None = None
) -> list[Shallow]:
    """The model of every batch of records, as `by_model` makes them."""
    models = []
    for model in _in_processes(_captured, batches, num_workers):
        models.append(model)
        if progress is not None:
            progress("capture", len(models), len(batches))
    return models


def _in_processes(
    work: Callable[[Sequence[Record]], T], batches: Sequence[Sequence[Record]], num_workers: int | None
) -> Iterator[T]:
    """The results of `work` in the order of `batches`."""
    num_workers = min(num_workers or os.cpu_count() or 1, len(batches))
    if num_workers <= 1:
        yield from map(work, batches)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, batches)


def _captured(records: Sequence[Record]) -> Shallow:
    return captured(records[0])


def _predicted(records: Sequence[Record]) -> list[Prediction]:
    """The predictions for records of one model."""
    try:
        runs = RunPredictor(captured(records[0]))
    except FAILURES as error:
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

    def held_bytes(self, how: Configuration, kind: MemoryKind | None = None) -> float:
        """What the fullest rank holds, of the kind that was measured, without what it keeps in the host's
        memory."""
        return max(
            _memory_bytes(ledger, kind) - how.offload_share * ledger.activations_bytes
            for ledger in self.evaluated.ledgers
        )


class RunPredictor:
    """Prices the records of one model."""

    def __init__(self, model: Shallow, eras: Mapping[str, Software] | None = None) -> None:
        self.programs = GivenPrograms(model)
        self.eras = eras

    def predict(self, record: Record) -> Prediction:
        """The record's step: the fastest that fits of the ways to run it, or the smallest if none does."""
        try:
            how, cluster = configuration(record), cluster_of(record)
            best = self.best(record, how, cluster)
        except FAILURES as error:
            return _failure(record, error)
        return Prediction(
            record_id=record.id,
            step_time_s=best.evaluated.step_s,
            memory_bytes=best.held_bytes(how, record.memory_kind),
            fits=best.held_bytes(how) <= capacity_bytes(cluster.device),
            terms=dict(best.evaluated.step.terms),
            chosen=str(best.parallelism),
            global_batch=best.parallelism.global_batch,
        )

    def log_error(self, record: Record, how: Configuration, cluster: Cluster) -> float:
        """log(predicted / measured) of the step time, or of the time per token."""
        best = self.best(record, how, cluster)
        measured_s = record.step_time_s
        if measured_s is None:
            num_tokens = best.parallelism.global_batch * record.model.seq / record.cluster.n_devices
            measured_s = num_tokens / (record.tokens_per_s_per_device or nan)
        return log(best.evaluated.step_s / measured_s)

    def best(self, record: Record, how: Configuration, cluster: Cluster) -> Run:
        """The fastest way that fits, or the smallest if none does."""
        runs = self.runs(record, how, cluster)
        most_bytes = capacity_bytes(cluster.device)
        fitting = [run for run in runs if run.held_bytes(how) <= most_bytes]
        if fitting:
            return min(fitting, key=lambda run: run.evaluated.step_s)
        return min(runs, key=lambda run: run.held_bytes(how))

    def runs(self, record: Record, how: Configuration, cluster: Cluster) -> list[Run]:
        """Every way to run the record, priced."""
        era = how.used(self.eras[how.era] if self.eras else software(how.era))
        policy = usual_policy(how.era, how.precision, how.known.zero_stage, fsdp=how.fsdp)
        evaluator = Evaluator(cluster, policy, era)
        return [Run(p, self._evaluated(evaluator, how, p)) for p in how.candidates()]

    def _evaluated(self, evaluator: Evaluator, how: Configuration, p: Parallelism) -> Evaluated:
        if how.recompute_share == 1:
            return evaluate_given(self.programs, evaluator, p, how.low_precision)
        chain = self.programs.chain(p, evaluator.era, how.low_precision)
        cuts = even_cuts(chain, p.pp * p.num_virtual_stages)
        choices = _partly_recomputed(chain, p.recompute, how.recompute_share)
        return evaluator.evaluate(evaluator.priced(chain, p), p, cuts, choices)


def _partly_recomputed(chain: Chain, mode: Recompute, share: float) -> list[str]:
    """What units keep when only the first of the blocks, a `share` of them, follow the mode."""
    num_left = round(share * sum(unit.is_block for unit in chain.units))
    names: list[str] = []
    for unit in chain.units:
        follows = unit.is_block and num_left > 0
        num_left -= follows
        names.append(mode if follows else "none")
    return names


def capacity_bytes(device: Accelerator) -> float:
    """What a run could really use: GB on a label are nearer to GiB, and planning alone need be cautious."""
    label = device.memory.capacity_published_as == "GB_label"
    return device.memory_bytes * (2**30 / 1e9 if label else 1.0)


def _memory_bytes(ledger: Ledger, kind: MemoryKind | None) -> float:
    """What is measured of a ledger: tensors, what torch's allocator holds for them, or all of the device."""
    match kind:
        case "allocated":
            return ledger.allocated_bytes
        case "reserved":
            return ledger.cached_bytes
        case _:
            return ledger.total_bytes


def _failure(record: Record, error: Exception) -> Prediction:
    return Prediction(record.id, None, None, fits=False, failure=str(error))
