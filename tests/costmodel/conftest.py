"""Machines with round numbers, so that tests can do the arithmetic in their heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import hardware_db
from hardware_db import Cluster, Level


@pytest.fixture
def machine() -> Callable[..., Cluster]:
    """Makes a cluster of the levels it is given; its device does not matter to communication."""

    def build(*levels: Level) -> Cluster:
        return Cluster(
            id="test",
            name="test",
            device=hardware_db.accelerator("h100-sxm"),
            num_devices=levels[-1].num_devices,
            devices_per_node=levels[0].num_devices,
            levels=levels,
        )

    return build


@pytest.fixture
def cluster(machine: Callable[..., Cluster]) -> Cluster:
    """16 nodes of 8: 100 GB/s and 1 us inside, 10 GB/s and 10 us across, per device."""
    return machine(
        Level("inside", 8, bandwidth_bytes_per_s=100e9, latency_s=1e-6, topology="switch"),
        Level("across", 128, bandwidth_bytes_per_s=10e9, latency_s=10e-6, topology="fat_tree"),
    )
