from __future__ import annotations

import pytest

from costmodel import Collective, CostModelError, Group, Work


@pytest.mark.parametrize(
    ("flops", "num_bytes", "num_launches"), [(-1.0, 0.0, 1), (0.0, -1.0, 1), (0.0, 0.0, -1)]
)
def test_work_is_not_negative(flops: float, num_bytes: float, num_launches: int) -> None:
    with pytest.raises(CostModelError, match="-1"):
        Work(flops, num_bytes, num_launches=num_launches)


@pytest.mark.parametrize(("size", "stride"), [(0, 1), (2, 0)])
def test_a_group_has_members(size: int, stride: int) -> None:
    with pytest.raises(CostModelError, match=f"{size}, {stride}"):
        Group(size, stride)


def test_a_payload_is_not_negative() -> None:
    with pytest.raises(CostModelError, match="-8 bytes"):
        Collective("all_reduce", -8, Group(2))
