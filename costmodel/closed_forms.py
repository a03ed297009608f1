"""When the ranks of a pipeline end whose stages are all alike and whose messages take no time.

With n = p - 1, a stage's forward f, backward b = i + w (input and weight part), x+ = max(x, 0), and
T = m v (f + b), the work of a rank, rank r ends its last backward at T plus

    GPipe, 1F1B, Interleaved1F1B, LoopedBFS    n f + (n - r) b
    InterleavedZeroBubble                      max(r f + (n - r) i, n f + (n - r) (i - w))
    DualPipeV                                  n f + max(n f, n i - f) + (n - r) (i - w)+
    ZBVZeroBubble                              the longest of the paths in `_zero_bubble_v_s`

The first row is arXiv:2104.04473, section 2.2 (a stage here is 1 / v of a rank's work there). On rank 0 the
second is the bubble of ZB-H1, n (f + i - w), of arXiv:2401.10241, unless f or i alone is larger than
f + i - w; DualPipeV's is n (f + b + b - 3 w), github.com/deepseek-ai/DualPipe, when f = i = w. The others
were read off the critical paths of the simulation, which tests compare them with.
"""

from __future__ import annotations


def uniform_finish_s(
    schedule_name: str,
    num_stages: int,
    num_microbatches: int,
    num_virtual: int,
    forward_s: float,
    backward_s: float,
    weight_s: float = 0.0,
) -> tuple[float, ...] | None:
    """When each rank ends its last backward; the times are of one virtual stage. None for too few or, in
    interleaved schedules, broken rounds of microbatches, which have no closed form."""
    if not _has_closed_form(schedule_name, num_stages, num_microbatches, num_virtual):
        return None
    work_s = num_microbatches * num_virtual * (forward_s + backward_s)
    last = num_stages - 1
    if last == 0:
        return (work_s,)
    f, i, w = forward_s, backward_s - weight_s, weight_s
    ranks = range(num_stages)
    if schedule_name == "ZBVZeroBubble":
        return tuple(work_s + more_s for more_s in _zero_bubble_v_s(last, f, i, w))
    if schedule_name == "DualPipeV":
        first_s = work_s + last * f + max(last * f, last * i - f)
        return tuple(first_s + (last - rank) * max(i - w, 0.0) for rank in ranks)
    if schedule_name == "InterleavedZeroBubble":
        return tuple(
            work_s + max(rank * f + (last - rank) * i, last * f + (last - rank) * (i - w)) for rank in ranks
        )
    return tuple(work_s + last * f + (last - rank) * backward_s for rank in ranks)


def _has_closed_form(schedule_name: str, num_stages: int, num_microbatches: int, num_virtual: int) -> bool:
    if schedule_name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return num_microbatches % num_stages == 0
    if schedule_name == "LoopedBFS":
        return num_virtual == 1 or num_microbatches >= num_stages
    return schedule_name != "ZBVZeroBubble" or num_microbatches >= 2 * num_stages


def _zero_bubble_v_s(last: int, f: float, i: float, w: float) -> list[float]:
    """What each rank takes beyond its own work: the longest of eight paths, linear in the rank."""
    n = last
    early_s = max(2 * n * (i - w), (2 * n - 1) * f + i - 2 * n * w, 2 * n * f - (2 * n + 1) * w)
    late_s = max(max(f, i), 2 * n * f - n * (i + w), (2 * n - 1) * f - (n - 1) * (i + w))
    first_s = max(0.0, early_s, 2 * n * f - n * (i + w))
    further = range(1, n + 1)
    return [first_s, *(max(early_s + rank * (2 * w - i), late_s + (rank - 1) * w) for rank in further)]
