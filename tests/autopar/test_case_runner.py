"""What counts as the rounding of half precision, and what as a wrong program."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from tests.autopar.case_runner import CaseRunner, Original, Result, is_rounding, original, own_rounding
from tests.autopar.random_cases import plan_for, random_case

BATCH = 4
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
    off = times_own * own_rounding("mlp", torch.bfloat16, BATCH)
    failed = Result("failed", off, PRINTED.format(loss=loss, gradients=off))
    assert is_rounding(failed, "mlp", BATCH, original("mlp", dtype)) == expected


def test_a_crash_is_no_rounding() -> None:
    crashed = Result("failed", text="ZeroDivisionError")
    assert not is_rounding(crashed, "mlp", BATCH, original("mlp", torch.bfloat16))


def test_models_of_several_dtypes_have_no_rounding_of_their_own() -> None:
    given = original("mlp", torch.bfloat16)
    mixed = deepcopy(given.model)
    next(mixed.parameters()).data = next(mixed.parameters()).data.double()
    several = Original(mixed, given.inputs, given.capture)
    off = Result("failed", 0.06, PRINTED.format(loss="1e-02", gradients=0.06))
    for result in (Result("equal"), off):
        assert not is_rounding(result, "mlp", BATCH, several)


@pytest.mark.parametrize(("times_own", "fails"), [(1.9, False), (2.1, True)])
def test_what_shrinks_a_case_is_no_rounding(
    times_own: float, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(random_case("gpt2", "tp", 0), dtype=torch.bfloat16)
    plan = plan_for(case, original("gpt2", torch.bfloat16).capture)
    off = times_own * own_rounding("gpt2", torch.bfloat16, case.parallelism.global_batch)
    with CaseRunner(num_steps=1) as runner:
        verdict = Result("failed", off, PRINTED.format(loss="1e-02", gradients=off))
        monkeypatch.setattr(runner, "check", lambda *_: verdict)
        assert runner.fails(case, plan) == fails


def test_samples_that_cancel_are_rounded_away() -> None:
    """Of a batch of 12 the gradients of ViT's classifier nearly cancel, of one of 4 they do not."""
    few, many = (own_rounding("vit", torch.bfloat16, batch) for batch in (4, 12))
    assert few < 0.3 < many
