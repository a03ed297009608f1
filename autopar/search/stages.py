"""The stage layer: where to cut a chain of units, one stage a rank, so that memory holds.

A stage s that takes units [i, j) computes T_ij seconds a microbatch, has O_ij to do once a step, and holds
R_ij bytes whatever is in flight and A_ij for each of its k_s microbatches in flight
(`autopar.search.stage_costs`). With D the bytes that do not fit, each microbatch must keep D / k_s less, for
which units compute E_ij(D / k_s) seconds again (`autopar.search.stage_table`). Stage s cannot begin before
its first microbatch has come through earlier stages, in P_si seconds with messages, and takes B_sij for m
microbatches of T_ij + E_ij by the order of its schedule (`autopar.search.stage_times`), so

    best_1(j) = V_10j       best_s(j) = min over i < j of max(best_{s-1}(i), V_sij)
    V_sij = P_si + B_sij + the larger of O_ij and a backward through earlier stages

is the least that any cuts and any variants take (`best_cut`): exact for the relaxation, since units are a
chain, and a proven bound for the step. The whole numbers of `autopar.search.variants` come after it. Several
stages on a rank are `autopar.search.even_stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.plan import Parallelism
from autopar.search.run_sums import RunSums
from autopar.search.runs import Array
from autopar.search.stage_costs import Machine, accumulating, fitted_times, moved_once, room_bytes
from autopar.search.stage_table import StageTable
from autopar.search.stage_times import StageTimes, busy_s
from costmodel import peak_in_flight

Where = NDArray[np.bool_] | None
"""At (i, j) whether the units [i, j) may be a stage; None for all."""


class Cut(NamedTuple):
    """Where stages begin, 0 first, and the least that any step takes."""

    cuts: tuple[int, ...]
    bound_s: float


def best_cut(
    table: StageTable,
    p: Parallelism,
    machine: Machine,
    send_s: Sequence[float],
    where: Where = None,
    *,
    fitting: bool = True,
) -> Cut | None:
    """The best cuts into one stage a rank; without `fitting` memory is no matter. `send_s` are the messages
    with which each unit would begin a stage. None where memory, or the number of units, allows no cuts."""
    if p.pp > table.num_units:
        return None
    once, sums = moved_once(table, p, machine), accumulating(table.all_runs, p, machine)
    room = room_bytes(table, sums, p, machine) if fitting else np.full_like(sums.forward_s, np.inf)
    known: dict[int, StageTimes] = {}
    values = []
    for stage, flight in enumerate(peak_in_flight(p.schedule, p.pp, p.num_microbatches, 1)):
        if flight not in known:
            known[flight] = fitted_times(sums, once, machine.overlap, room / flight)
        around_s = _messages_s(np.array(send_s), stage, p.pp)
        found = _values_s(sums, known[flight], around_s, p.num_microbatches, flight)
        values.append(legal(found, where))
    return cheapest(values)


def _values_s(
    sums: RunSums, times: StageTimes, around_s: tuple[Array, Array], m: int, in_flight: int
) -> Array:
    """V of all runs as one of the stages, with messages of a microbatch before it and after it."""
    before_s, after_s = around_s
    microbatch_s = sums.forward_s[0, -1] + sums.backward_s[0, -1]
    rest_s = microbatch_s - sums.arrival_s - sums.return_s - sums.forward_s - sums.backward_s
    ends_s = sums.arrival_s + before_s + busy_s(times, rest_s + 2 * after_s, m, in_flight)
    values_s: Array = ends_s + np.maximum(sums.return_s + before_s, times.once_s)
    return values_s


def _messages_s(send_s: Array, stage: int, num_stages: int) -> tuple[Array, Array]:
    """The least that the messages to a stage and those from it take on the way of a microbatch to the last
    one: for each unit that it may begin with, and for each with which the next one may."""
    least_s = float(send_s[1:].min(initial=np.inf)) if num_stages > 1 else 0.0
    at_s = np.append(send_s, 0.0)
    num_after = num_stages - 1 - stage
    before_s = at_s + (stage - 1) * least_s if stage else np.zeros_like(at_s)
    after_s = at_s + (num_after - 1) * least_s if num_after else np.zeros_like(at_s)
    return before_s[:, None], after_s


def legal(values: Array, where: Where) -> Array:
    """The values, infinite where there is no run, or none that may be a stage."""
    may_be = np.triu(np.ones_like(values, dtype=bool), 1)
    found: Array = np.where(may_be if where is None else may_be & where, values, np.inf)
    return found


def cheapest(values: Sequence[Array]) -> Cut | None:
    """The cuts whose largest value is smallest, given the value of every run for each stage; None where all
    cuts have an infinite one."""
    best = values[0][0]
    came_from = []
    for stage in values[1:]:
        through = np.maximum(best[:, None], stage)
        came_from.append(through.argmin(axis=0))
        best = through[came_from[-1], np.arange(len(best))]
    if not np.isfinite(best[-1]):
        return None
    cuts = [len(best) - 1]
    for previous in reversed(came_from):
        cuts.append(int(previous[cuts[-1]]))
    return Cut((0, *reversed(cuts[1:])), float(best[-1]))


def largest_before(values: Sequence[Array]) -> Array:
    """The largest value of the cheapest cuts of all units before each, whose stages have these values."""
    best: Array = values[0][0]
    for stage in values[1:]:
        best = np.maximum(best[:, None], stage).min(axis=0)
    return best


def largest_after(values: Sequence[Array]) -> Array:
    """The same of all units from each on."""
    best: Array = values[-1][:, -1]
    for stage in reversed(values[:-1]):
        best = np.maximum(stage, best).min(axis=1)
    return best
