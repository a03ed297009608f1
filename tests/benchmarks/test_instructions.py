"""Instructions of a process, where they can be counted."""

from itertools import pairwise

import pytest

from benchmarks.instructions import Instructions


def test_they_are_those_of_the_work_alone() -> None:
    counter = Instructions()

    def counted(rounds: int) -> int:
        before = counter.count
        if before is None:
            pytest.skip("this system does not let instructions be counted")
        sum(range(rounds))
        after = counter.count
        assert after is not None
        return after - before

    # The least of several: what else the process does now and then (collecting garbage) only adds.
    idle, *working = (min(counted(rounds) for _ in range(7)) for rounds in (0, 100_000, 200_000, 400_000))
    assert working[0] > 10 * idle
    for less, more in pairwise(working):
        assert more - idle == pytest.approx(2 * (less - idle), rel=0.05)
