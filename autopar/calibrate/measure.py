"""Runs the measurements, the most important first, and makes the profile of them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import TypeVar

import torch

from autopar.calibrate import machine
from autopar.calibrate.collectives import KINDS, GroupBench, groups_of, slowest, world
from autopar.calibrate.compute import TORCH_DTYPES, Bench
from autopar.calibrate.links import links_of
from autopar.calibrate.sizes import SIZES, Sizes
from autopar.errors import AutoparError
from hardware_db.errors import did_you_mean
from hardware_db.facts import Record
from hardware_db.profile import (
    AttentionRate,
    CollectiveTime,
    LaunchOverhead,
    MatmulRate,
    MemoryRate,
    Profile,
)
from hardware_db.schema import Dtype

DEFAULT_DTYPES: Mapping[str, Sequence[Dtype]] = {"cuda": ("bf16", "fp32"), "cpu": ("fp32", "bf16")}

Progress = Callable[[str, int, int], None]
"""Told the phase, what is done of it and how much there is."""
R = TypeVar("R", bound=Record)


def calibrate(
    device: str | None = None,
    dtypes: Sequence[str] = (),
    *,
    accelerator: str | None = None,
    quick: bool = False,
    max_seconds: float = 60.0,
    progress: Progress = lambda phase, done, total: None,
) -> Profile:
    """The profile of the device that this process sees; under torchrun also of the links between the ranks.

    Ranks measure at the same time, as in training, and each returns its own device's profile with the links.

    Args:
        device: "cuda" or "cpu"; by default CUDA where there is any.
        dtypes: what to multiply in, of bf16, fp16, fp32 and fp64; the first one stands for all where one
            number has to. By default bf16 and fp32, on a CPU the other way round.
        accelerator: the catalog's id of the device, where its reported name does not tell.
        quick: one size of everything.
        max_seconds: leave out sizes that would begin later, except the first of everything.
        progress: told what is being measured.

    Raises AutoparError for a device or dtype that cannot be measured, UnknownHardwareError for an accelerator
    that nobody knows.
    """
    began = time.monotonic()
    here = machine.device_of(device)
    wanted = _checked(dtypes or DEFAULT_DTYPES[here.type])
    known_as = machine.accelerator_named(accelerator, here)
    sizes = SIZES[here.type].quick() if quick else SIZES[here.type]
    with world(here) as world_size:
        own_seconds = max_seconds / 2 if world_size > 1 else max_seconds
        jobs = _jobs(Bench(here, sizes.limit_s), sizes, wanted)
        rows = _measured(jobs, began + own_seconds, progress)
        collectives = _collectives(here, world_size, sizes, began + max_seconds, progress)
    (overhead,) = _of(LaunchOverhead, rows)
    return Profile(
        device=machine.name_of(here),
        accelerator=known_as,
        kind="cpu" if here.type == "cpu" else "gpu",
        memory_bytes=machine.memory_bytes_of(here),
        software=machine.software_of(here),
        date=datetime.now(UTC).date().isoformat(),
        num_threads=torch.get_num_threads(),
        launch_overhead=overhead,
        memory=_of(MemoryRate, rows),
        matmul=_of(MatmulRate, rows),
        attention=_of(AttentionRate, rows),
        links=links_of(collectives),
        collectives=collectives,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One measurement; a first one is made however late it is."""

    phase: str
    is_first: bool
    run: Callable[[], Record]


def _checked(dtypes: Sequence[str]) -> list[Dtype]:
    """The dtypes, each once; raises AutoparError for one that cannot be measured."""
    for dtype in dtypes:
        if dtype not in TORCH_DTYPES:
            raise AutoparError(
                f"cannot measure dtype {dtype!r}{did_you_mean(dtype, TORCH_DTYPES)} "
                f"(known: {', '.join(TORCH_DTYPES)})"
            )
    return [known for dtype in dict.fromkeys(dtypes) for known in TORCH_DTYPES if known == dtype]


def _jobs(bench: Bench, sizes: Sizes, dtypes: Sequence[Dtype]) -> Iterator[_Job]:
    """All measurements of a device, in the order in which their rows stand in the profile."""
    yield _Job("launch overhead", True, bench.launch_overhead)
    for position, num_bytes in enumerate(sizes.memory_bytes):
        yield _Job("memory bandwidth", not position, partial(bench.memory, num_bytes))
    for dtype in dtypes:
        for position, product_of in enumerate(sizes.products):
            yield _Job("matrix products", not position, partial(bench.matmul, dtype, *product_of))
    for dtype in dtypes:
        if dtype == "fp64":  # nothing fused is made for it
            continue
        for position, attention in enumerate(sizes.attentions):
            yield _Job("attention", not position, partial(bench.attention, dtype, *attention))


def _measured(jobs: Iterable[_Job], deadline_s: float, progress: Progress) -> list[Record]:
    """The rows of all jobs that begin before the deadline, in the order of the jobs; first ones run first."""
    numbered = sorted(enumerate(jobs), key=lambda item: not item[1].is_first)
    totals = Counter(job.phase for _, job in numbered)
    done: Counter[str] = Counter()
    rows: dict[int, Record] = {}
    for position, job in numbered:
        if job.is_first or time.monotonic() < deadline_s:
            progress(job.phase, done[job.phase], totals[job.phase])
            rows[position] = job.run()
            done[job.phase] += 1
            progress(job.phase, done[job.phase], totals[job.phase])
    return [rows[position] for position in sorted(rows)]


def _collectives(
    device: torch.device, world_size: int, sizes: Sizes, deadline_s: float, progress: Progress
) -> tuple[CollectiveTime, ...]:
    """The rows of every kind of group; ranks agree when time is up."""
    if world_size == 1:
        return ()
    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    benches = [GroupBench(group, device, sizes.limit_s) for group in groups_of(world_size, ranks_per_host)]
    jobs = list(product(sizes.message_bytes, KINDS, benches))
    num_first = 2 * len(KINDS) * len(benches)
    rows = []
    for position, (num_bytes, kind, bench) in enumerate(jobs):
        progress("collectives", position, len(jobs))
        if position >= num_first and slowest(time.monotonic() - deadline_s, device) > 0:
            break
        rows.append(bench.measure(kind, num_bytes))
    progress("collectives", len(rows), len(jobs))
    return tuple(sorted(rows, key=lambda row: (row.stride, row.world_size, KINDS.index(row.kind), row.bytes)))


def _of(kind: type[R], rows: Iterable[Record]) -> tuple[R, ...]:
    return tuple(row for row in rows if isinstance(row, kind))
