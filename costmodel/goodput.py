"""Figures that training runs are compared by: time to a token budget, scaling, utilisation."""

from __future__ import annotations

from costmodel.errors import CostModelError


def end_to_end_training_s(
    tokens: float, parameters: float, num_devices: int, achieved_flops_per_s: float, recompute: bool
) -> float:
    """Seconds to train `parameters` on `tokens` when each of `num_devices` achieves `achieved_flops_per_s`.

    8 T P / (n X) with full activation recomputation (a forward, its repetition, and a backward of twice its
    cost), 6 T P / (n X) without: equation 4 of arXiv:2104.04473, which leaves attention and vocabulary out.
    Raises CostModelError unless devices and rate are positive.
    """
    if num_devices < 1 or achieved_flops_per_s <= 0:
        raise CostModelError(
            f"training time needs devices that compute: got {num_devices} at {achieved_flops_per_s:g} FLOP/s"
        )
    return (8 if recompute else 6) * tokens * parameters / (num_devices * achieved_flops_per_s)


def scale_factor(throughput_1: float, throughput_n: float, num_devices: int) -> float:
    """T_n / (n · T_1): the throughput of n devices over n times that of one; 1 is linear scaling.

    Raises CostModelError unless `throughput_1` and `num_devices` are positive.
    """
    if throughput_1 <= 0 or num_devices < 1:
        raise CostModelError(
            f"scaling needs a positive baseline: got {throughput_1:g} and {num_devices} devices"
        )
    return throughput_n / (num_devices * throughput_1)


def model_flops_utilization(
    model_flops: float, step_s: float, num_devices: int, peak_flops_per_s: float
) -> float:
    """MFU (arXiv:2204.02311, appendix B): the FLOPs that the model itself needs in a step, forward and
    backward and without recomputation, over what `num_devices` could do in `step_s` at `peak_flops_per_s`
    each.

    Raises CostModelError unless time, devices and peak are positive.
    """
    if step_s <= 0 or num_devices < 1 or peak_flops_per_s <= 0:
        raise CostModelError(
            f"utilisation needs time and devices: got {step_s:g} s, {num_devices} devices, "
            f"{peak_flops_per_s:g} FLOP/s"
        )
    return model_flops / (step_s * num_devices * peak_flops_per_s)
