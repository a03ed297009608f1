"""What a rank of a pipeline runs at a time, and all that the ranks run.

F  a forward
B  a whole backward
I  the part of a backward that the previous stage waits for, the gradient of the inputs
W  the rest of it, the gradient of the weights, which nobody waits for
O  a whole backward that runs together with the forward of another microbatch just before it
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Phase = Literal["F", "B", "I", "W", "O"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FORWARD, BACKWARD, INPUT, WEIGHT, OVERLAPPING = range(len(PHASES))
"""The phases as numbers, to calculate with."""

Op = tuple[Phase, int, int]  # (phase, stage, microbatch)


class Orders(NamedTuple):
    """All work of a step, rank after rank, each rank's in the order in which it runs: the rank, the number of
    the phase, the stage and the microbatch of each piece."""

    ranks: NDArray[np.int32]
    phases: NDArray[np.int32]
    stages: NDArray[np.int32]
    microbatches: NDArray[np.int32]


def phase_numbers(letters: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The numbers of phases from their letters, small or capital."""
    found = _BY_LETTER[letters]
    assert found.min(initial=0) >= 0, "these are letters of phases"
    return found


def _by_letter() -> NDArray[np.int32]:
    found = np.full(128, -1, dtype=np.int32)
    for number, phase in enumerate(PHASES):
        found[[ord(phase), ord(phase.lower())]] = number
    return found


_BY_LETTER = _by_letter()
