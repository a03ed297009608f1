from __future__ import annotations

import pytest

from costmodel import CostModelError, peak_activation_bytes, simulate
from costmodel.held import held_bytes


def test_two_stages_over_time_by_hand() -> None:
    # Rank 0 runs F0 F1 B0 B1; its backwards end at 7 and 10.
    timeline = simulate("1F1B", 2, 2, [1, 1], [2, 2], send_s=0.5)
    first, last = held_bytes(timeline, [100, 30])
    assert first.times_s == (0, 1, 7, 10)
    assert first.num_bytes == (100, 200, 100, 0)
    assert (first.peak_bytes, first.peak_s, first.peak_microbatch) == (200, 1, 1)
    assert last.num_bytes == (30, 0, 30, 0)
    assert (last.peak_bytes, last.peak_s, last.peak_microbatch) == (30, 1.5, 0)


def test_weight_gradients_keep_their_part_until_they_run() -> None:
    # One rank, one stage: F, I, W of each microbatch in turn.
    timeline = simulate("InterleavedZeroBubble", 1, 2, [1], [3], weight_s=[2])
    (held,) = held_bytes(timeline, [10], [4])
    assert held.times_s == (0, 2, 4, 4, 6, 8)
    assert held.num_bytes == (10, 4, 0, 10, 4, 0)


@pytest.mark.parametrize(
    ("name", "v"), [("GPipe", 1), ("Interleaved1F1B", 3), ("InterleavedZeroBubble", 2), ("DualPipeV", 2)]
)
def test_the_peak_does_not_depend_on_the_times(name: str, v: int) -> None:
    n = 4 * v
    saved, kept = list(range(1, n + 1)), [0.5] * n
    timeline = simulate(name, 4, 12, list(range(1, n + 1)), [5] * n, 0.3, v, weight_s=[2] * n)
    peaks = [held.peak_bytes for held in held_bytes(timeline, saved, kept)]
    assert peaks == list(peak_activation_bytes(name, 4, 12, saved, v, kept))


def test_one_size_per_stage() -> None:
    with pytest.raises(CostModelError, match="2 virtual stages need as many sizes, got 1"):
        held_bytes(simulate("1F1B", 2, 2, [1, 1], [2, 2]), [1])
