"""Fits the constants of the cost model to published runs, and tells how well it predicts groups left out.

    .venv/bin/python -m benchmarks.fit                         fit; print constants and errors
    .venv/bin/python -m benchmarks.fit --leave-one-group-out   the honest figure beside them
    .venv/bin/python -m benchmarks.fit --write                 put the constants into the data files

`constants.json` lists what is fitted, each with a prior: the value to believe before seeing any run, and by
how much, in logarithms, it may be wrong. Over θ, the logarithms of the constants, this minimises

    Σ_groups Σ_rows huber(log predicted / measured) / rows of the group  +  λ Σ ((θ - prior) / spread)²

by Gauss-Newton steps with numerical derivatives. Groups weigh the same, since they differ in size a
hundredfold. A group is left out by fitting the others again from the common fit, with its derivatives.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.cli.output import progress
from autopar.records.assess import select
from autopar.records.clusters import cluster_of
from autopar.records.configuration import Configuration, configuration
from autopar.records.predict import RunPredictor, by_model, captured_all
from autopar.records.schema import Record, read_records
from autopar.report.table import table
from benchmarks.accuracy import FITTED, PUBLISHED
from benchmarks.constants import Constant, constants, write_constants
from costmodel import Software, software, software_eras
from hardware_db import Accelerator, Cluster, Fact
from hardware_db.schema import EfficiencyFacts

Vector = NDArray[np.float64]

PRIOR_WEIGHT = 2e-4
"""λ: a constant one spread away from its prior costs as much as 0.6 % of error in every group."""

HUBER = 0.1
"""Errors above this share count linearly: published rows have outliers that no model explains."""

STEP = 0.03
LONGEST = 0.4
"""Of a derivative's difference, and of one Gauss-Newton step, in logarithms."""


@dataclass(frozen=True)
class Run:
    """One record, ready to be priced again and again."""

    record: Record
    how: Configuration
    cluster: Cluster
    predictor: RunPredictor


class Model:
    """Log errors of all runs as a function of the constants' logarithms."""

    def __init__(self, runs: Sequence[Run], fitted: Sequence[Constant]) -> None:
        self.runs = runs
        self.fitted = fitted

    @cached_property
    def prior(self) -> Vector:
        return np.log([constant.prior for constant in self.fitted])

    @cached_property
    def spread(self) -> Vector:
        return np.array([constant.spread for constant in self.fitted])

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return tuple(run.record.group for run in self.runs)

    @cached_property
    def weights(self) -> Vector:
        count = Counter(self.groups)
        return np.array([1 / count[group] for group in self.groups])

    def log_errors(self, theta: Vector) -> Vector:
        """log(predicted / measured) of every run."""
        values = dict(zip(self.fitted, np.exp(theta), strict=True))
        eras = {name: _era(name, values) for name in software_eras()}
        devices: dict[str, Accelerator] = {}
        found = []
        for run in self.runs:
            card = run.cluster.device
            if card.id not in devices:
                devices[card.id] = _device(card, values)
            run.predictor.eras = eras
            cluster = replace(run.cluster, device=devices[card.id])
            found.append(run.predictor.log_error(run.record, run.how, cluster))
        return np.array(found)

    def loss(self, errors: Vector, theta: Vector, weights: Vector) -> float:
        size = np.abs(errors)
        huber = np.where(size < HUBER, size**2 / (2 * HUBER), size - HUBER / 2)
        return float(weights @ huber + PRIOR_WEIGHT / 2 * np.sum(((theta - self.prior) / self.spread) ** 2))

    def gauss_newton_step(
        self, theta: Vector, errors: Vector, derivatives: Vector, weights: Vector
    ) -> Vector:
        """The change of the constants that the linearised model asks for."""
        weighted = weights / np.maximum(np.abs(errors), HUBER)
        stiffness = PRIOR_WEIGHT / self.spread**2
        matrix = derivatives.T @ (weighted[:, None] * derivatives) + np.diag(stiffness)
        gradient = derivatives.T @ (weighted * errors) + stiffness * (theta - self.prior)
        return np.clip(-np.linalg.solve(matrix, gradient), -LONGEST, LONGEST)


def _era(name: str, values: Mapping[Constant, float]) -> Software:
    """The era with the constants shared by all, and then its own, replaced."""
    era = software(name)
    known = {field.name for field in fields(Software)}
    for place in ("software.shared", f"software.{name}"):
        mine = (c for c in values if c.place == place and c.name in known)
        own = {c.name: c.within_bounds(float(values[c])) for c in mine}
        # Only numbers are fitted, which a type checker cannot see in the names of fields.
        era = replace(era, **own)  # type: ignore[arg-type]
    return era


def _device(card: Accelerator, values: Mapping[Constant, float]) -> Accelerator:
    """The accelerator with the constants of its kind, and then of its family, replaced."""
    facts: dict[str, Any] = {}
    for is_own in (False, True):
        for constant, value in values.items():
            if constant.applies_to(card, own=is_own):
                value = constant.within_bounds(value)
                facts[constant.name] = Fact(value=value, source="fit", confidence="fitted")
    return card.with_efficiency(EfficiencyFacts(**facts))


# --- fitting ------------------------------------------------------------------------------------------------

_MODEL: Model | None = None  # set before the workers fork, which is how they get it


def _log_errors(theta: Vector) -> Vector:
    assert _MODEL is not None
    return _MODEL.log_errors(theta)


@dataclass(frozen=True)
class Fit:
    """Constants with the errors that they leave, and the errors' derivatives."""

    theta: Vector
    errors: Vector
    derivatives: Vector


Evaluate = Callable[[list[Vector]], list[Vector]]


def fit(model: Model, start: Vector, evaluate: Evaluate, num_steps: int) -> Fit:
    """Gauss-Newton from `start`; each step is halved until it gains."""
    theta, weights = start, model.weights
    (errors,) = evaluate([theta])
    for number in range(num_steps):
        derivatives = _derivatives(theta, errors, evaluate)
        before = model.loss(errors, theta, weights)
        step = model.gauss_newton_step(theta, errors, derivatives, weights)
        tried = [theta + step * share for share in (1.0, 0.5, 0.25, 0.1)]
        outcomes = list(zip(tried, evaluate(tried), strict=True))
        best, left = min(outcomes, key=lambda outcome: model.loss(outcome[1], outcome[0], weights))
        loss = model.loss(left, best, weights)
        print(f"step {number + 1}: loss {before:.4f} -> {loss:.4f}", file=sys.stderr)
        if loss >= before * (1 - 1e-3):
            break
        theta, errors = best, left
    return Fit(theta, errors, _derivatives(theta, errors, evaluate))


def _derivatives(theta: Vector, errors: Vector, evaluate: Evaluate) -> Vector:
    moved = [theta + STEP * unit for unit in np.eye(len(theta))]
    return np.stack([(column - errors) / STEP for column in evaluate(moved)], axis=1)


def left_out_errors(model: Model, found: Fit, evaluate: Evaluate, num_steps: int = 2) -> dict[str, float]:
    """The mean |error| of every group under constants fitted to all other groups."""
    names = sorted(set(model.groups))
    thetas = []
    for name in names:
        weights = np.where(np.array(model.groups) == name, 0.0, model.weights)
        theta, errors = found.theta, found.errors
        for _ in range(num_steps):
            step = model.gauss_newton_step(theta, errors, found.derivatives, weights)
            theta, errors = theta + step, errors + found.derivatives @ step
        thetas.append(theta)
    result = {}
    for name, errors in zip(names, evaluate(thetas), strict=True):
        mine = np.array(model.groups) == name
        result[name] = float(np.mean(np.abs(np.expm1(errors[mine]))))
    return result


# --- command ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    global _MODEL
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="?", default=PUBLISHED, help="JSON file of measured runs")
    parser.add_argument("--steps", type=int, default=4, help="Gauss-Newton steps (default: 4; 0: none)")
    parser.add_argument("--from-priors", action="store_true", help="start from the priors, not from the data")
    parser.add_argument("--leave-one-group-out", action="store_true", help="fit without each group in turn")
    parser.add_argument("--models", type=Path, metavar="FILE", help="keep captured models here between runs")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the constants into the data files and, of groups left out, the errors to fit.json",
    )
    options = parser.parse_args(argv)

    model = _MODEL = Model(_runs(select(read_records(options.records)), options.models), constants())
    start = model.prior if options.from_priors else np.log([c.value for c in model.fitted])
    with get_context("fork").Pool() as pool:

        def evaluate(thetas: list[Vector]) -> list[Vector]:
            return pool.map(_log_errors, thetas, chunksize=1)

        found = fit(model, start, evaluate, options.steps)
        if options.write:
            write_constants(dict(zip(model.fitted, np.exp(found.theta).tolist(), strict=True)))
        left_out = left_out_errors(model, found, evaluate) if options.leave_one_group_out else {}
    errors = _group_errors(model, found)
    if options.write and left_out:
        FITTED.write_text(_json(model, found, errors, left_out), encoding="utf-8")
    _show(model, found, errors, left_out)
    return 0


def _runs(records: Sequence[Record], kept: Path | None) -> list[Run]:
    batches = by_model(records)
    if kept is not None and kept.exists():
        models = pickle.loads(kept.read_bytes())
    else:
        with progress(quiet=False) as tell:
            models = captured_all(batches, tell)
        if kept is not None:
            kept.write_bytes(pickle.dumps(models))
    predictors = {
        record.id: predictor
        for batch, predictor in zip(batches, map(RunPredictor, models), strict=True)
        for record in batch
    }
    return [Run(r, configuration(r), cluster_of(r), predictors[r.id]) for r in records]


def _group_errors(model: Model, found: Fit) -> dict[str, tuple[float, float]]:
    """Mean |error| and bias of every group."""
    errors = np.expm1(found.errors)
    masks = {name: np.array(model.groups) == name for name in sorted(set(model.groups))}
    return {n: (float(np.mean(np.abs(errors[m]))), float(np.mean(errors[m]))) for n, m in masks.items()}


def _show(
    model: Model, found: Fit, errors: Mapping[str, tuple[float, float]], left_out: Mapping[str, float]
) -> None:
    rows = [
        (name, f"{100 * size:.1f} %", f"{100 * bias:+.1f} %", _percent(left_out.get(name)))
        for name, (size, bias) in errors.items()
    ]
    sizes, biases = (float(np.mean(column)) for column in zip(*errors.values(), strict=True))
    rest = float(np.mean(list(left_out.values()))) if left_out else None
    rows.append(("mean over groups", f"{100 * sizes:.1f} %", f"{100 * biases:+.1f} %", _percent(rest)))
    _print(("group", "fitted", "bias", "left out"), rows)
    values = np.exp(found.theta)
    lines = [
        (f"{c.place}.{c.name}", f"{c.prior:.4g}", f"{value:.4g}")
        for c, value in zip(model.fitted, values, strict=True)
    ]
    _print(("constant", "prior", "fitted"), lines)


def _print(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    print("\n".join(table([head, *rows], right=range(1, len(head)), indent="")) + "\n")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _json(
    model: Model, found: Fit, errors: Mapping[str, tuple[float, float]], left_out: Mapping[str, float]
) -> str:
    thetas = zip(model.fitted, np.exp(found.theta).tolist(), strict=True)
    values = ((constant, constant.within_bounds(value)) for constant, value in thetas)
    document = {
        "constants": {f"{c.place}.{c.name}": value for c, value in values},
        "mean_error": {name: size for name, (size, _) in errors.items()},
        "left_out_error": dict(left_out),
    }
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
