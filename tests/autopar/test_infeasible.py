"""Models that do not fit: the error says which limit binds, by how much, and what was seen to help."""

from __future__ import annotations

import re
from math import ceil

import pytest

from autopar import api
from autopar.errors import InfeasibleError, PinConflictError
from autopar.search.infeasible import FACTORS, grown
from tests.autopar.small_models import cluster, tower


def error(memory_bytes: float, num_devices: int = 2, **pins: int | str) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        api.plan(tower(), cluster(num_devices, memory_bytes), global_batch=4, **pins)  # type: ignore[arg-type]  # pins
    return caught.value


def test_names_the_largest_part_and_the_excess() -> None:
    found = error(60e6)
    assert found.limit in ("parameters", "gradients", "optimizer", "activations", "buffers")
    assert found.excess_bytes > 0
    assert f"The largest part is {found.limit}" in str(found)
    assert f"{found.excess_bytes / 1e6:.1f} MB more than the 60.0 MB of toy" in str(found)


def test_the_devices_it_asks_for_do_fit() -> None:
    small = cluster(2, 60e6)
    with pytest.raises(InfeasibleError) as caught:
        api.plan(tower(), small, global_batch=4)
    (advice,) = (line for line in caught.value.relaxations if "devices fit" in line)
    match = re.match(r"(\d+) devices fit(?: with a global batch of (\d+))?", advice)
    assert match is not None
    factor, batch = int(match[1]) // 2, int(match[2] or 4)
    plan = api.plan(tower(), grown(small, factor), global_batch=batch)
    assert plan.prediction.peak_memory_bytes <= 60e6
    for smaller in (other for other in FACTORS if other < factor):
        with pytest.raises((InfeasibleError, PinConflictError)):
            api.plan(tower(), grown(small, smaller), global_batch=4)


def test_the_memory_it_asks_for_does_fit() -> None:
    found = error(60e6)
    (advice,) = (line for line in found.relaxations if "as they are" in line)
    needed = 60e6 + found.excess_bytes
    assert f"devices with {ceil(needed / 1e6)} MB" in advice
    plan = api.plan(tower(), cluster(2, needed * 1.001), global_batch=4)
    assert plan.prediction.peak_memory_bytes <= needed * 1.001


def test_names_the_pin_that_is_in_the_way() -> None:
    found = error(100e6, 4, zero_stage=0, tp=1, pp=1)
    assert any("without " in line and "fits" in line for line in found.relaxations)
