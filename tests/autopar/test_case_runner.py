"""What counts as the rounding of half precision, and what as a wrong program."""

from __future__ import annotations

import pytest
import torch

from tests.autopar.case_runner import Result, is_rounding, original, own_rounding

PRINTED = """NOT EQUAL
loss: largest relative difference {loss} of 5e-02 allowed (step 1)
gradients: largest relative difference {gradients} of 5e-02 allowed (layers.0.weight)
NOT EQUAL to the original
"""


@pytest.mark.parametrize(
    ("dtype", "loss", "times_own", "expected"),
    [
        (torch.bfloat16, "1e-02", 1.9, True),
        (torch.bfloat16, "1e-02", 2.1, False),
        (torch.bfloat16, "1e-02", float("inf"), False),
        (torch.bfloat16, "nan", 1.9, False),
        (torch.bfloat16, "6e-02", 1.9, False),
        (torch.float64, "1e-02", 0.0, False),
    ],
)
def test_only_gradients_in_half_precision_may_be_off_and_as_far_as_the_originals_own(
    dtype: torch.dtype, loss: str, times_own: float, expected: bool
) -> None:
    off = times_own * own_rounding("mlp", torch.bfloat16)
    failed = Result("failed", off, PRINTED.format(loss=loss, gradients=off))
    assert is_rounding(failed, "mlp", original("mlp", dtype)) == expected


def test_a_crash_is_no_rounding() -> None:
    crashed = Result("failed", text="ZeroDivisionError")
    assert not is_rounding(crashed, "mlp", original("mlp", torch.bfloat16))
