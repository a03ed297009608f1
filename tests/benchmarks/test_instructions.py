"""Instructions of a process, where they can be counted."""

from itertools import pairwise

import pytest

from benchmarks.instructions import Instructions


def test_they_are_those_of_the_work_alone() -> None:
    counter = Instructions()
    counts = []
    for rounds in (0, 100_000, 200_000, 400_000):
        before = counter.count
        if before is None:
            pytest.skip("this system does not let instructions be counted")
        sum(range(rounds))
        after = counter.count
        assert after is not None
        counts.append(after - before)
    idle, *working = counts
    assert working[0] > 10 * idle
    for less, more in pairwise(working):
        assert more - idle == pytest.approx(2 * (less - idle), rel=0.05)
