"""One latency and one bandwidth for each kind of group: the alpha-beta line through its collectives.

The cost model says how many latencies and how many transfers of its payload a collective takes over a switch,
so a row of the table is one equation in the two unknowns:

    seconds = latency_s · a + (1 / bandwidth) · b

Solved by least squares of the relative error, so that small messages count as much as large ones. Sizes that
the cost model runs by different algorithms take the fewest latencies and the fewest transfers of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

import hardware_db
from costmodel import Collective, Group, collective_time_s
from hardware_db import Cluster, Level
from hardware_db.profile import CollectiveTime, Link

NO_TIME_BYTES_PER_S = 1e30


def links_of(rows: Sequence[CollectiveTime]) -> tuple[Link, ...]:
    """The line of each kind of group that `rows` measured with two sizes or more."""

    def group_of(row: CollectiveTime) -> tuple[int, int]:
        return row.world_size, row.stride

    grouped = [list(group) for _, group in groupby(sorted(rows, key=group_of), key=group_of)]
    return tuple(_line(group) for group in grouped if len({row.bytes for row in group}) > 1)


def _line(rows: Sequence[CollectiveTime]) -> Link:
    seconds = np.array([row.seconds for row in rows])
    terms = np.array([_terms(row) for row in rows]) / seconds[:, None]
    latency_s, s_per_byte = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)[0]
    if latency_s < 0 or s_per_byte <= 0:  # bandwidth alone explains the rows best
        latency_s, s_per_byte = 0.0, terms[:, 1].sum() / (terms[:, 1] ** 2).sum()
    missed = terms @ [latency_s, s_per_byte] - 1
    return Link(
        world_size=rows[0].world_size,
        stride=rows[0].stride,
        latency_s=float(latency_s),
        bandwidth_bytes_per_s=float(1 / s_per_byte),
        relative_error=float(np.sqrt((missed**2).mean())),
    )


def _terms(row: CollectiveTime) -> tuple[float, float]:
    """How many latencies and how many seconds at one byte per second the collective takes."""
    collective = Collective(row.kind, row.bytes, Group(row.world_size))
    return (
        collective_time_s(collective, _switch(row.world_size, NO_TIME_BYTES_PER_S, 1.0)),
        collective_time_s(collective, _switch(row.world_size, 1.0, 0.0)),
    )


def _switch(num_devices: int, bandwidth_bytes_per_s: float, latency_s: float) -> Cluster:
    level = Level("switch", num_devices, bandwidth_bytes_per_s, latency_s, "switch")
    device = hardware_db.accelerator("cpu")
    return Cluster("switch", "switch", device, num_devices, num_devices, (level,))
