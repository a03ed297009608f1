"""Orders of the schedules whose stages lie in a V: rank r holds stage r, here `down`, and 2 p - 1 - r, `up`.

    ZBVZeroBubble  backwards split in input and weight part; no rank that has begun ever waits when forward,
                   input and weight part take equally long (arXiv:2401.10241, section 6)
    DualPipeV      a forward of one stage runs together with a backward of the other, so that the
                   communication of one may hide behind the compute of the other
                   (github.com/deepseek-ai/DualPipe)

Each phase of each stage takes the microbatches one after the other.
"""

from __future__ import annotations

from collections import deque
from itertools import count

from costmodel.phases import Op, Phase


def zero_bubble_v_order(rank: int, num_stages: int, num_microbatches: int) -> tuple[Op, ...]:
    """What one rank runs in ZBVZeroBubble.

    The order is made for at least 2 p - 1 microbatches; with fewer, those that do not exist are left out.
    """
    made_for = max(2 * num_stages - 1, num_microbatches)
    down, up = rank, 2 * num_stages - 1 - rank
    order = _Order()
    ahead = num_stages - rank
    order.run(("F", down), times=2 * ahead - 1)
    order.run(("F", up), ("F", down), times=rank)
    order.run(("F", up), ("I", up), ("W", up), times=ahead)
    steady: tuple[tuple[Phase, int], ...] = ("I", down), ("W", down), ("F", up), ("I", up), ("W", up)
    num_down_left = made_for - (2 * ahead - 1) - rank
    order.run(("F", down), *steady, times=num_down_left)
    order.run(*steady, times=made_for - num_stages - num_down_left)
    order.run(("I", down), ("I", up), times=rank)
    order.run(("I", down), ("W", down), times=ahead)
    order.run(("W", up), times=rank)
    order.run(("W", down), times=rank)
    return tuple(op for op in order.ops if op[2] < num_microbatches)


def dual_pipe_v_order(rank: int, num_stages: int, num_microbatches: int) -> tuple[Op, ...]:
    """What one rank runs in DualPipeV, of at least 2 p microbatches; the eight steps are DeepSeek's."""
    down, up = rank, 2 * num_stages - 1 - rank
    ahead, here = num_stages - 1 - rank, rank + 1
    order = _Order()
    order.run(("F", down), times=2 * ahead)
    order.run(("F", down), ("F", up), times=here)
    order.run(("I", up), ("W", up), ("F", up), times=ahead)
    # The last rank does not overlap the first pair: its backward can start no earlier.
    order.run(("F", down), ("B" if ahead == 0 else "O", up), ("F", up), ("O", down))
    order.run(("F", down), ("O", up), ("F", up), ("O", down), times=num_microbatches - 2 * num_stages + rank)
    order.run(("B", up), ("F", up), ("O", down), times=ahead)
    # In the second half of what is left, weight gradients wait for the bubbles behind.
    left = [up, down] * here
    for stage in left[:here]:
        order.run(("B", stage))
    for stage in left[here:]:
        order.run(("I", stage))
    weights: deque[tuple[Phase, int]] = deque(("W", stage) for stage in left[here:])
    for _ in range(ahead):
        order.run(weights.popleft(), ("I", down))
        weights.append(("W", down))
    order.run(*weights)
    return tuple(order.ops)


class _Order:
    """Work in order; counts the microbatches."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._next: dict[tuple[str, int], count[int]] = {}

    def run(self, *steps: tuple[Phase, int], times: int = 1) -> None:
        for _ in range(times):
            for phase, stage in steps:
                self.ops.append((phase, stage, self._microbatch(phase, stage)))

    def _microbatch(self, phase: Phase, stage: int) -> int:
        if phase in ("B", "O"):  # both an input and a weight gradient
            self._microbatch("W", stage)
            return self._microbatch("I", stage)
        return next(self._next.setdefault((phase, stage), count()))
