from __future__ import annotations

import pytest

from costmodel import CostModelError, end_to_end_training_s, model_flops_utilization, scale_factor

DAY_S = 24 * 3600


@pytest.mark.parametrize(
    ("parameters", "tokens", "num_devices", "flops_per_s", "published_days"),
    [
        # arXiv:2104.04473, section 5.1: "34 days" and "84 days".
        (175e9, 300e9, 1024, 140e12, 34),
        (1e12, 450e9, 3072, 163e12, 84),
    ],
)
def test_megatron_paper(
    parameters: float, tokens: float, num_devices: int, flops_per_s: float, published_days: float
) -> None:
    seconds = end_to_end_training_s(tokens, parameters, num_devices, flops_per_s, recompute=True)
    assert seconds / DAY_S == pytest.approx(published_days, abs=1)


def test_recomputation_is_a_third_more_work() -> None:
    with_it, without = (end_to_end_training_s(1e9, 1e9, 8, 1e14, recompute=r) for r in (True, False))
    assert with_it / without == pytest.approx(8 / 6)


def test_scale_factor_of_linear_scaling_is_one() -> None:
    assert scale_factor(100, 800, 8) == 1
    assert scale_factor(100, 600, 8) == 0.75


def test_utilisation() -> None:
    assert model_flops_utilization(4e15, step_s=1, num_devices=8, peak_flops_per_s=1e15) == 0.5


def test_impossible_input_is_refused() -> None:
    with pytest.raises(CostModelError, match="got 0 at 1 FLOP/s"):
        end_to_end_training_s(1, 1, 0, 1, recompute=False)
    with pytest.raises(CostModelError, match="baseline"):
        scale_factor(0, 1, 1)
    with pytest.raises(CostModelError, match="0 s"):
        model_flops_utilization(1, 0, 1, 1)
