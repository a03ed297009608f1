"""When the ranks of 1F1B end, for any stages and messages, row by row instead of event by event.

Pair rank r's k-th forward with the backward after it, microbatch k - (p - 1 - r), and call both together its
row k. With forward f, backward b, t = f + b, the message d_r between ranks r and r + 1, and y_r the end of
rank r's row less Σ_{q<r} (f_q + d_q), the next row ends at

    y_r  <-  max( max_{q<=r} y_q + t_r,  y_{r+1} + t_r + 2 d_r )

for its forward waits for itself and for what comes down from the ranks before it in the same row, its
backward for the row before on the next rank. In other words: the longest walk over the ranks that at each row
falls as far as it likes or climbs by one, where a climb earns its two messages. Rank r enters at its row
p - 1 - r, after the warm-up; from the last forward's row m - 1 on there are only backwards. Warm-up and
cool-down are flow shops of equal jobs, which take Σ t + (jobs - 1) max t.

Where messages block, a rank always exchanges d_r + d_{r-1} in a row: with that in t, and d_{r-1} more in y_r,
climbs earn nothing.

A long walk repeats itself around the ranks a .. b whose (Σ t + 2 Σ d) / (b - a + 1) is largest, with that
many rows a turn (Baccelli et al., Synchronization and Linearity, 1992, chapter 3); once it does, turns are
counted, not walked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def one_f_one_b_finish_s(
    num_microbatches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: Sequence[float],
    blocking_sends: bool = False,
) -> tuple[float, ...]:
    """When each rank ends its last backward, with at least as many microbatches as ranks.

    `send_s` has one entry for each boundary between ranks; `blocking_sends` as in `schedule.simulate`.
    """
    f, b, d = np.array(forward_s, float), np.array(backward_s, float), np.array(send_s, float)
    num_ranks = len(f)
    before, after = np.concatenate(([0.0], d)), np.concatenate((d, [0.0]))
    if blocking_sends:
        t, between = f + b + before + after, np.maximum(before, after)
        climb, shift = t[:-1], before
    else:
        t, between = f + b, np.zeros(num_ranks)
        climb, shift = t[:-1] + 2 * d, between
    away = np.arange(num_ranks - 1, -1, -1.0)
    entry = away * np.maximum.accumulate(f + between)
    y = np.full(num_ranks, -np.inf)
    step = _row_step(y, t, climb)
    for rank in reversed(range(num_ranks)):
        y[rank] = entry[rank]
        step()
    _walk(y, step, num_microbatches - num_ranks, _rows_per_turn(t, climb))

    # The cool-down: from rank x the last rows lead up to rank r, staying at the slowest backward between.
    down, up = _sums(f[:-1] + d), _sums(b[:-1] + d)
    slowest = np.maximum.accumulate(np.triu(np.broadcast_to(b + between, (num_ranks, num_ranks))), axis=1)
    ways = np.triu(y + down - shift + up + away * slowest)  # [r, x]
    return tuple((ways.max(axis=1) - up).tolist())


def _row_step(y: Times, t: Times, climb: Times) -> Callable[[], None]:
    """A function that takes `y` one row on, in place."""
    above, below, climbed = y[:-1], y[1:], np.empty_like(climb)
    add, maximum, fall = np.add, np.maximum, np.maximum.accumulate

    def step() -> None:
        add(below, climb, out=climbed)
        fall(y, out=y)
        add(y, t, out=y)
        maximum(above, climbed, out=above)

    return step


def _walk(y: Times, step: Callable[[], None], num_rows: int, per_turn: int) -> None:
    """Takes `y` many rows on, in place; `per_turn` as `_rows_per_turn`."""
    stride = per_turn * -(-8 // per_turn)  # rows between looks, which cost a few rows themselves
    while num_rows >= stride:
        before = y.copy()
        for _ in range(stride):
            step()
        num_rows -= stride
        gain = y - before
        shortest, longest = float(gain.min()), float(gain.max())
        if longest - shortest <= 1e-12 * longest:
            num_more, num_rows = divmod(num_rows, stride)
            y += num_more * gain
    for _ in range(num_rows):
        step()


def _rows_per_turn(t: Times, climb: Times) -> int:
    """The length of the stretch of ranks around which the longest walk turns."""
    rows, climbs = _sums(t), _sums(climb - t[:-1])
    length = np.arange(1, len(t) + 1) - np.arange(len(t))[:, None]  # [first, last]
    cost = rows[1:] - rows[:-1, None] + climbs - climbs[:, None]
    mean = np.where(length > 0, cost, 0.0) / np.maximum(length, 1)
    best = mean >= mean.max() * (1 - 1e-12)
    return int(length[best].min())


def _sums(times: Times) -> Times:
    """What comes before each rank."""
    return np.concatenate(([0.0], np.cumsum(times)))
