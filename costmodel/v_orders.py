"""Orders of the schedules whose stages lie in a V: rank r holds stage r, on its way down, and 2 p - 1 - r.

    ZBVZeroBubble  backwards split in input and weight part; no rank that has begun ever waits when forward,
                   input and weight part take equally long (arXiv:2401.10241, section 6)
    DualPipeV      a forward of one stage runs together with a backward of the other, so that the
                   communication of one may hide behind the compute of the other
                   (github.com/deepseek-ai/DualPipe)

Each phase of each stage takes the microbatches one after the other, so a rank's order is written as a string
of phases: in small letters those of its stage on the way down, in capitals those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodel.phases import BACKWARD, FORWARD, INPUT, OVERLAPPING, WEIGHT, Orders, phase_numbers


def zero_bubble_v_orders(num_stages: int, num_microbatches: int) -> Orders:
    """What all ranks run in ZBVZeroBubble.

    The orders are made for at least 2 p - 1 microbatches; with fewer, those that do not exist are left out.
    """
    made_for = max(2 * num_stages - 1, num_microbatches)
    texts = [_zero_bubble(rank, num_stages, made_for) for rank in range(num_stages)]
    orders = _orders(texts, made_for)
    there = orders.microbatches < num_microbatches
    return Orders(*(each[there] for each in orders))


def dual_pipe_v_orders(num_stages: int, num_microbatches: int) -> Orders:
    """What all ranks run in DualPipeV, of at least 2 p microbatches."""
    texts = [_dual_pipe(rank, num_stages, num_microbatches) for rank in range(num_stages)]
    return _orders(texts, num_microbatches)


def _zero_bubble(rank: int, num_stages: int, num_microbatches: int) -> str:
    ahead = num_stages - rank
    num_down_left = num_microbatches - (2 * ahead - 1) - rank
    return (
        "f" * (2 * ahead - 1)
        + "Ff" * rank
        + "FIW" * ahead
        + "fiwFIW" * num_down_left
        + "iwFIW" * (num_microbatches - num_stages - num_down_left)
        + "iI" * rank
        + "iw" * ahead
        + "W" * rank
        + "w" * rank
    )


def _dual_pipe(rank: int, num_stages: int, num_microbatches: int) -> str:
    """The eight steps are DeepSeek's."""
    ahead, here = num_stages - 1 - rank, rank + 1
    # In the second half of the backwards that are left, weight gradients wait for the bubbles behind.
    whole, inputs = ("Bb" * here)[:here], ("Ii" * here)[here:]
    weights = ("Ww" * here)[here:] + "w" * ahead
    return (
        "f" * (2 * ahead)
        + "fF" * here
        + "IWF" * ahead
        # The last rank does not overlap the first pair: its backward can start no earlier.
        + ("fOFo" if ahead else "fBFo")
        + "fOFo" * (num_microbatches - 2 * num_stages + rank)
        + "BFo" * ahead
        + whole
        + inputs
        + "".join(weight + "i" for weight in weights[:ahead])
        + weights[ahead:]
    )


def _orders(texts: Sequence[str], num_microbatches: int) -> Orders:
    """The orders so written, with the microbatches counted."""
    num_stages = len(texts)
    letters = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    phases, is_up = phase_numbers(letters), letters < ord("a")
    ranks = np.repeat(np.arange(num_stages, dtype=np.int32), [len(text) for text in texts])
    stages = np.where(is_up, 2 * num_stages - 1 - ranks, ranks)
    microbatches = np.empty_like(stages)
    turn = np.tile(np.arange(num_microbatches), num_stages)
    whole = (BACKWARD, OVERLAPPING)  # each is both an input and a weight gradient
    for kinds in ((FORWARD,), (WEIGHT, *whole), (INPUT, *whole)):
        there = np.isin(phases, kinds)
        microbatches[there & is_up] = turn
        microbatches[there & ~is_up] = turn
    return Orders(ranks, phases, stages, microbatches)
